"""Where a base model's files are: `tiny`, a folder or a Hub id in, a checked local folder out; no torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.errors import BaseModelError

TINY = "tiny"
TINY_FOLDER = Path(__file__).parent / "bases" / "tiny"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
SMALL_HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
HUB_FILES = ["*.safetensors", *SMALL_HUB_FILES]


@dataclass(frozen=True)
class BaseRef:
    """A base model that was found.

    Attributes:
        id: What the user called it: ``tiny``, a folder, or a Hub id.
        path: The local folder with its files.
        revision: The commit, for a Hub id.
    """

    id: str
    path: Path
    revision: str | None = None


def resolve_base(base: str, revision: str | None = None) -> BaseRef:
    """Find a base by name: ``tiny``, a folder, or a Hub id (downloaded to the Hub's cache unless it is there).

    Raises:
        BaseModelError: It is none of these, cannot be downloaded, or is not a usable checkpoint.
    """
    ref = _find(base, revision, HUB_FILES)
    _require_checkpoint(ref)
    return ref


def resolve_description(base: str, revision: str | None = None) -> BaseRef:
    """Find a base's configs and tokenizer files as ``resolve_base`` does; no weights are downloaded or asked for.

    Raises:
        BaseModelError: It is no base's name, or cannot be downloaded.
    """
    return _find(base, revision, SMALL_HUB_FILES)


def _find(base: str, revision: str | None, hub_files: list[str]) -> BaseRef:
    if base == TINY:
        return BaseRef(TINY, TINY_FOLDER)
    if Path(base).is_dir():
        return BaseRef(base, Path(base))
    if HUB_ID.match(base):
        return _download(base, revision, hub_files)
    raise BaseModelError(
        f"model.base {base!r} is neither a folder nor a Hub id",
        expected=f"{TINY!r}, a folder with config.json and safetensors, or an id such as Qwen/Qwen2.5-7B-Instruct",
        fix="correct model.base, or --base",
    )


def _download(base: str, revision: str | None, files: list[str]) -> BaseRef:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(base, revision=revision, allow_patterns=files))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise BaseModelError(
            f"the base {base!r} cannot be had from the Hub ({type(error).__name__})",
            expected="a public id, or one that your token may read, and a network connection or a filled cache",
            fix=f"check the id, run `hf download {base}` where there is a network, or give a local folder",
        ) from error
    return BaseRef(base, path, revision=path.name)


def read_model_config(ref: BaseRef) -> dict[str, Any]:
    """The base's ``config.json``.

    Raises:
        BaseModelError: It is missing, not JSON, or wants to run code of its own.
    """
    path = ref.path / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{path}: cannot be read as JSON ({type(error).__name__})",
            expected="the config.json of a transformers causal language model",
            fix="point model.base at the folder that holds the whole checkpoint",
        ) from error
    if not isinstance(config, dict):
        raise BaseModelError(
            f"{path}: holds {type(config).__name__}, not an object",
            expected="the config.json of a transformers causal language model",
            fix="point model.base at the folder that holds the whole checkpoint",
        )
    if "auto_map" in config:
        raise BaseModelError(
            f"{path}: the model brings code of its own (auto_map)",
            expected="an architecture that transformers itself has",
            fix="choose a base that needs no remote code: the kit never runs any",
        )
    return config


def _require_checkpoint(ref: BaseRef) -> None:
    read_model_config(ref)
    if not any(ref.path.glob("*.safetensors")):
        raise BaseModelError(
            f"{ref.path}: no safetensors weights",
            expected="model.safetensors or its shards (pickled .bin files are never loaded)",
            fix="convert the checkpoint with `save_pretrained` of transformers, or choose another base",
        )
