"""``push_folder``: a merged model, an adapter or an export, with a model card, to the Hub; private unless told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from qlora_kit.adapters.names import NAME_PATTERN
from qlora_kit.adapters.store import DEFAULT_STORE, AdapterStore
from qlora_kit.base_files import HUB_ID
from qlora_kit.errors import AdapterError, OutputError, QloraKitError
from qlora_kit.export.push_card import CARD_FILE, Published, published, write_card
from qlora_kit.safetensors_header import shown

# What a model folder, an adapter or an export consists of; nothing else is ever sent.
_FILE = re.compile(
    r"adapter_model\.safetensors|adapter_config\.json|qlora_kit\.json|config\.yaml"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|config\.json|generation_config\.json|chat_template\.(jinja|json)"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt|(merge|export)_report\.json"
    r"|[A-Za-z0-9][A-Za-z0-9._-]*\.gguf|Modelfile|serve\.sh|LICENSE(\.txt|\.md)?|NOTICE"
)
_FOLDERS = re.compile(r"base|adapters/[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_LOCAL_PATH = re.compile(r'["\s](/[^"\s,/]+/[^"\s,]+)')  # an absolute path of at least two parts
_TEXT_FILES = ("adapter_config.json", "qlora_kit.json", "merge_report.json", "export_report.json")


class HubApi(Protocol):
    """The part of ``huggingface_hub.HfApi`` that is used; it finds its token by itself."""

    def repo_exists(self, repo_id: str) -> bool:
        """Whether there is such a repository."""

    def create_repo(self, repo_id: str, *, private: bool | None = None) -> Any:
        """Make it."""

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> Any:
        """Send files of a folder."""

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str, commit_message: str) -> Any:
        """Send one file."""


@dataclass(frozen=True)
class PushedFile:
    """A file that is sent: its path in the repository, and its size."""

    path: str
    bytes: int


@dataclass(frozen=True)
class PushResult:
    """What was sent, or would be.

    Attributes:
        folder: Where it lies here.
        repo_id: Where it goes.
        private: Whether only its owner sees it; None for a repository that was there, which stays as it is.
        kind: ``adapter``, ``merged`` or the name of an export's format.
        files: Every file, the card too.
        left_out: Files of the folder that are not sent.
        remarks: What a user should know before it is public.
        card: The model card.
        sent: False for a dry run.
        url: Where it can be seen; None for a dry run.
    """

    folder: Path
    repo_id: str
    private: bool | None
    kind: str
    files: tuple[PushedFile, ...]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]
    card: str
    sent: bool
    url: str | None

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command."""
        return {**asdict(self), "folder": str(self.folder)}


def push_folder(
    folder: str | Path,
    to: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    update: bool = False,
    store: Path = DEFAULT_STORE,
    api: HubApi | None = None,
) -> PushResult:
    """Send a folder's own files, chosen by an allow-list, and a model card to a repository of the Hub.

    Optimizer states, checkpoints, logs and data are never sent; links are not followed.

    Args:
        folder: What ``merge`` or ``export`` wrote, or an adapter: a folder, or a name in the store.
        to: ``ORG/NAME``.
        public: Make the repository visible to everybody.
        dry_run: Only say what would be sent; nothing reaches for the network.
        update: Go on where the repository exists; it keeps its visibility.
        store: Where adapters are looked up: data and scores for the card come from there too.
        api: In place of ``huggingface_hub.HfApi()``.

    Raises:
        OutputError: ``to`` is no repository's name, is there already, or the Hub refuses.
        AdapterError, BaseModelError: The folder is nothing that can be published, or its reports are broken.
    """
    path = _locate(folder, store)
    if not HUB_ID.fullmatch(to) or "--" in to or ".." in to:
        raise OutputError(
            f"--to {shown(to)}: is no repository of the Hub",
            expected="ORG/NAME: letters, digits, '-', '_' and '.'",
            fix="write it like my-name/my-model",
        )
    about = published(path, store)
    files, left_out = _sorted_files(path)
    card = write_card(about, to)
    card_file = PushedFile(CARD_FILE, len(card.encode()))
    sizes = [PushedFile(name, (path / name).stat().st_size) for name in files]
    result = PushResult(
        folder=path,
        repo_id=to,
        private=not public,
        kind=about.kind,
        files=(*sizes, card_file),
        left_out=tuple(left_out),
        remarks=tuple(_remarks(path, files, about)),
        card=card,
        sent=False,
        url=None,
    )
    if dry_run:
        return result
    return _sent(result, api, update=update)


def _locate(folder: str | Path, store: Path) -> Path:
    text = str(folder)
    is_stored = re.fullmatch(NAME_PATTERN, text) is not None and (store / text).is_dir()
    if Path(folder).is_dir() and not is_stored:
        return Path(folder)
    try:
        return AdapterStore(store).get(text)
    except AdapterError as error:
        raise AdapterError(
            f"{text!r}: is no folder, and no adapter of {store}",
            expected="what `merge` or `export` wrote, or an adapter",
            fix=error.faults[0].fix,
        ) from error


def _sorted_files(folder: Path) -> tuple[list[str], list[str]]:
    """Paths that are sent, and those that are not."""
    sent, left_out = [], []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        inside = name.rpartition("/")[0]
        known = _FILE.fullmatch(path.name) is not None and (not inside or _FOLDERS.fullmatch(inside) is not None)
        if name == CARD_FILE:
            continue  # the card that is written here takes its place
        if known and path.is_file() and not path.is_symlink() and not _names_this_machine(path):
            sent.append(name)
        else:
            left_out.append(name)
    if not sent:
        raise OutputError(
            f"{folder}: holds nothing that is sent", expected="a model, an adapter or an export", fix="give its folder"
        )
    return sorted(sent), sorted(left_out)


def _walk(folder: Path) -> Iterator[Path]:
    """Files and links, not through links; of folders that nothing is sent from, the folder alone."""
    for path in sorted(folder.iterdir()):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink() and name in ("base", "adapters"):
            yield from (entry for entry in sorted(path.rglob("*")) if not entry.is_dir() or entry.is_symlink())
        else:
            yield path


def _names_this_machine(path: Path) -> bool:
    """A run configuration with absolute paths tells about this machine and is of use on no other."""
    if path.name != "config.yaml":
        return False
    return _LOCAL_PATH.search(path.read_text(encoding="utf-8", errors="replace")) is not None


def _remarks(folder: Path, files: list[str], about: Published) -> Iterator[str]:
    for name in files:
        if Path(name).name in _TEXT_FILES:
            found = _LOCAL_PATH.search((folder / name).read_text(encoding="utf-8", errors="replace"))
            if found is not None:
                yield f"{name} names a place of this machine: {found[1]}"
    if about.base is not None and HUB_ID.fullmatch(about.base) is None:
        yield f"the base {about.base} is not on the Hub: others cannot load it by that name"
    if not any(name.startswith("LICENSE") for name in files):
        yield "there is no LICENSE file: say in the card under which license it may be used"
    if about.kind == "merged" and about.verification is None:
        yield "the merge was not verified (--no-verify)"


def _sent(result: PushResult, api: HubApi | None, *, update: bool) -> PushResult:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import httpx

    hub: HubApi = HfApi() if api is None else api
    message = f"{result.kind} by qlora-kit"
    try:
        if hub.repo_exists(result.repo_id):
            if not update:
                raise OutputError(
                    f"{result.repo_id}: the repository is there already",
                    expected="a new one",
                    fix="give another name, or --update to add a commit to this one",
                )
            result = replace(result, private=None)
        else:
            hub.create_repo(result.repo_id, private=result.private)
        names = [file.path for file in result.files if file.path != CARD_FILE]
        hub.upload_folder(
            repo_id=result.repo_id, folder_path=str(result.folder), allow_patterns=names, commit_message=message
        )
        hub.upload_file(
            path_or_fileobj=result.card.encode(),
            path_in_repo=CARD_FILE,
            repo_id=result.repo_id,
            commit_message=f"Card of the {message}",
        )
    except QloraKitError:
        raise
    except (OSError, HFValidationError, httpx.RequestError) as error:  # the Hub's own errors are OSErrors
        raise OutputError(
            f"{result.repo_id}: the Hub refused or could not be reached ({type(error).__name__}: {error})",
            expected="a repository that your token may write to, and a network connection",
            fix="log in with `hf auth login`, check the name, and push again; what was sent already stays there",
        ) from error
    return replace(result, sent=True, url=f"https://huggingface.co/{result.repo_id}")
