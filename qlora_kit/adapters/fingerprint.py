"""Identifies a base model by what its files hold, however it is called and sharded, and an adapter by its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qlora_kit.adapters.gate import WEIGHTS_FILE
from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import TensorInfo, locate_tensors
from qlora_kit.strict_json import read_json_object

SAMPLES = 64
SAMPLE_BYTES = 64
MAX_CONFIG_BYTES = 16_000_000
_BLOCK_BYTES = 1 << 20
# Keys that change what the weights compute. Everything else in config.json (library version, dtype
# on load, cache flags) may differ between two copies of one model.
_ARCHITECTURE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
    "rms_norm_eps",
)


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of an adapter's weights' file."""
    return file_sha256(folder / WEIGHTS_FILE)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def base_fingerprint(folder: Path, *, full: bool = False) -> str:
    """The identity of the weights in ``folder``: equal for every copy, whatever its folder, sharding or file order.

    Args:
        folder: A model folder: ``config.json`` and safetensors weights, in one file or sharded.
        full: Hash every byte. Otherwise 64 samples of 64 bytes, evenly spread, stand for each tensor (small ones
            count whole), which a change of a few weights may escape.

    Returns:
        ``sampled-1:<sha256>`` or ``full-1:<sha256>``; only fingerprints of one kind can be compared.

    Raises:
        BaseModelError: The configuration or the weights cannot be read.
    """
    fix = "give the folder of a complete model (config.json and its safetensors files)"
    config = read_json_object(folder / "config.json", max_bytes=MAX_CONFIG_BYTES, error=BaseModelError, fix=fix)
    digest = hashlib.sha256(json.dumps(_architecture(config), sort_keys=True).encode())
    locations = locate_tensors(folder, error=BaseModelError)
    files: dict[Path, BinaryIO] = {}
    try:
        for name in sorted(locations):
            location = locations[name]
            if location.file not in files:
                files[location.file] = location.file.open("rb")
            info = location.info
            digest.update(json.dumps([name, info.dtype, info.shape]).encode())
            for chunk in _chunks(files[location.file], info, full=full):
                digest.update(chunk)
    except OSError as error:
        raise BaseModelError(
            f"{folder}: cannot be read: {error.strerror}", expected="readable weights", fix=fix
        ) from error
    finally:
        for file in files.values():
            file.close()
    return f"{'full' if full else 'sampled'}-1:{digest.hexdigest()}"


def _architecture(config: dict[str, Any]) -> dict[str, Any]:
    known = {key: config[key] for key in _ARCHITECTURE_KEYS if config.get(key) is not None}
    rope: dict[str, Any] = {}
    # transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling: one model, one identity.
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            rope.update(config[key])
    if config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    rope_type = rope.pop("type", None)
    rope.setdefault("rope_type", rope_type)
    if rope["rope_type"] in (None, "default"):
        del rope["rope_type"]
    numbers = {key: float(value) if type(value) is int else value for key, value in rope.items()}
    return {**known, "rope": numbers}


def _chunks(file: BinaryIO, info: TensorInfo, *, full: bool) -> Iterator[bytes]:
    if full or info.size_bytes <= SAMPLES * SAMPLE_BYTES:
        file.seek(info.start)
        remaining = info.size_bytes
        while remaining > 0:
            block = file.read(min(remaining, _BLOCK_BYTES))
            if not block:
                raise OSError(0, "the file became shorter while it was read")
            remaining -= len(block)
            yield block
        return
    for index in range(SAMPLES):
        file.seek(info.start + index * (info.size_bytes - SAMPLE_BYTES) // (SAMPLES - 1))
        yield file.read(SAMPLE_BYTES)
