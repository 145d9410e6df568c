"""Refuses keys in a base's JSON files that make libraries run code, read unchecked files, or fetch kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import BaseModelError, Fault
from qlora_kit.safetensors_header import shown
from qlora_kit.strict_json import read_json_object

MAX_JSON_BYTES = 100_000_000
# File -> whether the objects inside it are searched too. Of a tokenizer's files only the outer keys become settings;
# what lies deeper are tokens (`{"__type": "AddedToken", ...}`) and templates, which run in jinja2's sandbox.
_SEARCHED_DEEP = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer_config.json": False,
    "special_tokens_map.json": False,
}
_FIX = "choose another base, or delete the key in a local copy of this one (`hf download ID --local-dir DIR`)"
_CODE_KEY = "auto_map"
# What transformers 5 does with the underscored keys that honest checkpoints carry; it sets any other one as a private
# attribute of its configuration, where `_attn_implementation`, say, names code to fetch from the Hub.
_HARMLESS: dict[str, tuple[type, ...]] = {
    "_name_or_path": (str, type(None)),  # replaced by the folder once loaded; chooses among tokenizer classes before
    "_commit_hash": (str, type(None)),  # dropped
    "_attn_implementation_autoset": (bool,),  # read by nothing any more
    "_from_model_config": (bool,),  # a note in generation_config.json
    "_load_in_4bit": (bool,),  # bitsandbytes' settings repeat two public keys; ignored
    "_load_in_8bit": (bool,),
}
_DIVERTING = {
    "configuration_files": "another configuration than the one that is checked",
    "transformers_weights": "other weights than those that are checked",
    "fusion_config": "modules that are patched while loading",
}
_KERNEL_KEYS = ("attn_implementation", "experts_implementation")
_BUILT_IN_KERNELS = (None, "eager", "sdpa")


def read_base_json(path: Path, *, fix: str) -> dict[str, Any]:
    """Read one of a base's JSON files and refuse what it must not ask for.

    Args:
        path: The file; its name says how deep it is searched.
        fix: What the user can do when it cannot be read.

    Raises:
        BaseModelError: No sound JSON object, or keys that are refused, all of them.
    """
    content = read_json_object(path, max_bytes=MAX_JSON_BYTES, error=BaseModelError, fix=fix)
    faults = _key_faults(path, content)
    if faults:
        raise BaseModelError.of(faults)
    return content


def refuse_unsafe_keys(folder: Path) -> None:
    """Search the JSON files of the base in ``folder``, as far as they are there.

    Raises:
        BaseModelError: A file is no sound JSON object, or holds keys that are refused.
    """
    for name in _SEARCHED_DEEP:
        if (folder / name).exists():
            read_base_json(folder / name, fix="copy or download the base's file again")


def _key_faults(path: Path, content: Mapping[str, Any]) -> list[Fault]:
    entries = _all_entries(content) if _SEARCHED_DEEP[path.name] else content.items()
    faults = []
    for key, value in entries:
        refusal = _refusal(key, value)
        if refusal is not None:
            faults.append(Fault(f"{path}: {refusal[0]}", refusal[1], _FIX))
    return faults


def _refusal(key: str, value: Any) -> tuple[str, str] | None:
    """What is wrong with an entry, and what was expected; None where nothing is."""
    if key == _CODE_KEY:
        return f"the model brings code of its own ({key})", "an architecture and a tokenizer that transformers has"
    if key in _DIVERTING and value:
        return f"{key} makes transformers use {_DIVERTING[key]}", "a checkpoint that is loaded as it lies"
    if key in _KERNEL_KEYS and value not in _BUILT_IN_KERNELS:
        expected = "eager or sdpa, which are built in: other names can fetch code from the Hub"
        return f"{key} is {shown(str(value))}", expected
    if key.startswith("_") and not isinstance(value, _HARMLESS.get(key, ())):
        what = f"{shown(key)} sets a private attribute of transformers to {shown(str(value))}"
        return what, f"no key with an underscore before it but {', '.join(_HARMLESS)}"
    return None


def _all_entries(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and value, in objects and lists at any depth."""
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
