"""Where a base model's files are: `tiny`, a folder or a Hub id in, a checked local folder out; no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.base_keys import read_base_json, refuse_unsafe_keys
from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import locate_tensors, shown

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "bases" / "tiny"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
REVISION = re.compile(r"(?!.*\.\.)[\w.-][\w./-]*")
SMALL_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_FILES = ["*.safetensors", *SMALL_HUB_FILES]
# Other formats in folders of their own, and Mistral's second copy of the weights.
UNUSED_HUB_FILES = ["*/*", "consolidated*"]
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class BaseRef:
    """A base model that was found.

    Attributes:
        id: ``tiny``, a folder as an absolute path, or a Hub id (without a revision).
        path: The local folder with its files.
        revision: The commit, for a Hub id.
    """

    id: str
    path: Path
    revision: str | None = None


def resolve_base(base: str, revision: str | None = None) -> BaseRef:
    """Find a base by name, weights and all: downloaded to the Hub's cache unless it is there.

    Args:
        base: ``tiny``, a folder, or a Hub id, which may name its revision: ``Qwen/Qwen2.5-7B-Instruct@main``.
        revision: Commit, tag or branch of a Hub id, where ``base`` does not name it.

    Raises:
        BaseModelError: It is none of these, cannot be downloaded, or is not a whole checkpoint of a usable kind.
    """
    ref = _find(base, revision, HUB_FILES)
    _require_checkpoint(ref)
    return ref


def resolve_description(base: str, revision: str | None = None) -> BaseRef:
    """Find a base's configs and tokenizer files as ``resolve_base`` does; no weights are downloaded or asked for.

    Raises:
        BaseModelError: It is no base's name, cannot be downloaded, or its files ask for what is refused.
    """
    return _find(base, revision, SMALL_HUB_FILES)


def read_model_config(ref: BaseRef) -> dict[str, Any]:
    """The base's ``config.json``.

    Raises:
        BaseModelError: It is missing, not JSON, or asks for what is refused, such as code of its own.
    """
    return read_base_json(
        ref.path / "config.json", fix="point model.base at the folder that holds the whole checkpoint"
    )


def require_supported_quantization(config: Mapping[str, Any], where: str) -> None:
    """Let a ``config.json`` pass whose weights are not quantized, or in 4 bits by bitsandbytes.

    Args:
        config: The file's content.
        where: The file, for messages.

    Raises:
        BaseModelError: Weights in another format, by its name.
    """
    inner = config.get("text_config")
    settings = config.get("quantization_config") or (isinstance(inner, dict) and inner.get("quantization_config"))
    if not settings:
        return
    method = settings.get("quant_method", "bitsandbytes") if isinstance(settings, dict) else settings
    if method == "bitsandbytes" and settings.get("load_in_4bit") is True:
        return
    name = "bitsandbytes in 8 bits" if method == "bitsandbytes" else shown(str(method))
    raise BaseModelError(
        f"{where}: the base is quantized already, by {name}",
        expected="16-bit weights, quantized to 4 bits while they are loaded, or bitsandbytes' own 4-bit weights",
        fix="choose the unquantized model, or its bnb-4bit version",
    )


def _refuse_other_things(base: str) -> None:
    """Refuse a file, which no Hub id can mean here, and the folder of an adapter alone."""
    expected = f"{TINY!r}, a base's folder with config.json, or an id such as Qwen/Qwen2.5-7B-Instruct"
    path = Path(base)
    if os.path.isfile(path):  # never raises, whatever the text
        fix = "give the base that the file names (model.base of a config), or its folder"
        raise BaseModelError(f"{base}: is a file, not a base", expected=expected, fix=fix)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").exists():
        fix = f"give the adapter's base; `qlora-kit adapters show {base}` names it"
        raise BaseModelError(f"{base}: is an adapter, not a base", expected=expected, fix=fix)


def _find(base: str, revision: str | None, hub_files: list[str]) -> BaseRef:
    if base != TINY:
        _refuse_other_things(base)
    if base == TINY or Path(base).is_dir():
        _refuse_revision(base, revision)
        ref = BaseRef(TINY, TINY_FOLDER) if base == TINY else BaseRef(os.path.abspath(base), Path(base))
    else:
        ref = _download(*_parse_hub_id(base, revision), hub_files)
    refuse_unsafe_keys(ref.path)
    return ref


def _refuse_revision(base: str, revision: str | None) -> None:
    if revision is not None:
        raise BaseModelError(
            f"the base {base!r} is a folder here, which has no revisions; asked for is {revision!r}",
            expected="a revision with a Hub id only",
            fix="leave the revision out; or, if the Hub's model is meant, work where no folder has its name",
        )


def _parse_hub_id(base: str, revision: str | None) -> tuple[str, str | None]:
    """Hub id and revision of ``org/name`` or ``org/name@revision``."""
    name, at, named = base.partition("@")
    if not HUB_ID.fullmatch(name):
        raise BaseModelError(
            f"model.base {base!r} is neither a folder nor a Hub id",
            expected=f"{TINY!r}, a folder with config.json and safetensors, or an id such as Qwen/Qwen2.5-7B-Instruct",
            fix="correct model.base, or --base",
        )
    if at and revision not in (None, named):
        raise BaseModelError(
            f"the base {base!r} names a revision, and model.revision is {revision!r}",
            expected="one revision",
            fix="leave one of the two out",
        )
    chosen = named if at else revision
    if chosen is not None and not REVISION.fullmatch(chosen):
        raise BaseModelError(
            f"the base {name!r}: {shown(chosen)} is no revision",
            expected="a branch, a tag or a commit",
            fix="correct what follows the @, or model.revision",
        )
    return name, chosen


def _download(base: str, revision: str | None, files: list[str]) -> BaseRef:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(base, revision=revision, allow_patterns=files, ignore_patterns=UNUSED_HUB_FILES)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        at, option = ("", "") if revision is None else (f" at revision {revision!r}", f" --revision {revision}")
        raise BaseModelError(
            f"the base {base!r}{at} cannot be had from the Hub ({type(error).__name__})",
            expected="a public id, or one that your token may read, and a network connection or a filled cache",
            fix=f"check the id, run `hf download {base}{option}` where there is a network, or give a local folder",
        ) from error
    return BaseRef(base, Path(path), revision=Path(path).name)


def _require_checkpoint(ref: BaseRef) -> None:
    require_supported_quantization(read_model_config(ref), str(ref.path / "config.json"))
    if (ref.path / ADAPTER_CONFIG).exists():
        raise BaseModelError(
            f"{ref.path}: holds an adapter beside the model ({ADAPTER_CONFIG}), which transformers would load with it",
            expected="a base alone",
            fix="move the adapter's files to a folder of their own",
        )
    if not any(ref.path.glob("*.safetensors")):
        raise BaseModelError(
            f"{ref.path}: no safetensors weights",
            expected="model.safetensors or its shards (pickled .bin files are never loaded)",
            fix="convert the checkpoint with `save_pretrained` of transformers, or choose another base",
        )
    locate_tensors(ref.path, error=BaseModelError)
