"""Bases whose files hold 4-bit weights already: read from config.json and the headers, checked before anything loads.

transformers writes such a checkpoint when a model that bitsandbytes quantized is saved. Each weight is packed, two
codes in a byte, beside the tensors of its quantization state: ``absmax`` (a scale for each block), ``quant_map`` (the
value of each code), ``nested_absmax`` and ``nested_quant_map`` (scales of the scales), and JSON in
``quant_state.bitsandbytes__nf4`` or ``..._fp4``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, Literal

from qlora_kit.base_files import require_supported_quantization
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import BaseModelError, Fault
from qlora_kit.safetensors_header import TensorLocation, shown
from qlora_kit.strict_json import parse_json_object

QuantType = Literal["nf4", "fp4"]
STATE = "quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4", f"{STATE}fp4")
_PART_NAME = re.compile(rf"(?P<weight>.+\.weight)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes dequantizes
NESTED_BLOCK_SIZE = 256  # the only one that its matrix product takes
_CODES, _NESTED_CODES = 16, 256
_MAX_STATE_BYTES = 4096
_MAX_FAULTS = 20
_FIX = "download or save the checkpoint again, with all of its files"


@dataclass(frozen=True)
class Prequantization:
    """How a base's files were quantized: the 4-bit codes, and whether the block scales are quantized too."""

    quant_type: QuantType
    double_quant: bool


@dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight in a file.

    Attributes:
        shape: Of the weight it stands for, (out_features, in_features).
        quantization: How it was quantized.
        parts: The tensors of its quantization state, by their full names.
    """

    shape: tuple[int, ...]
    quantization: Prequantization
    parts: tuple[str, ...]


def read_prequantization(config: Mapping[str, Any], *, where: str) -> Prequantization | None:
    """How the base's files are quantized by its ``config.json``; None for a base of plain weights.

    Args:
        config: The file's content.
        where: The file, for messages.

    Raises:
        BaseModelError: They are quantized in a way that the kit does not train on.
    """
    require_supported_quantization(config, where)
    settings = config.get("quantization_config")
    if not settings:
        return None
    # What transformers takes for a key that the file lacks.
    quant_type = settings.get("bnb_4bit_quant_type", "fp4")
    double_quant = settings.get("bnb_4bit_use_double_quant", False)
    storage = settings.get("bnb_4bit_quant_storage") or "uint8"
    if quant_type not in ("nf4", "fp4") or not isinstance(double_quant, bool) or storage != "uint8":
        raise BaseModelError(
            f"{where}: quantization_config has bnb_4bit_quant_type {quant_type!r}, "
            f"bnb_4bit_use_double_quant {double_quant!r}, bnb_4bit_quant_storage {storage!r}",
            expected="nf4 or fp4, true or false, and uint8",
            fix="save the checkpoint again with these settings, or choose the 16-bit model",
        )
    return Prequantization(quant_type, double_quant)


def agreed_quantization(
    asked: QuantizationSection, found: Prequantization | None, *, where: str
) -> QuantizationSection:
    """How a base is loaded: as asked for, and where its files hold 4-bit weights already as they hold them.

    Keys that were left at their defaults give way to the files; what was asked for by name must agree with them.

    Args:
        asked: The configuration's ``quantization``, or the contract's.
        found: How the files are quantized.
        where: The base, for messages.

    Raises:
        BaseModelError: What was asked for is not what the files hold; with every such key.
    """
    if found is None:
        return asked
    held = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": found.quant_type,
        "bnb_4bit_use_double_quant": found.double_quant,
    }
    wanted = asked.model_dump()
    faults = [
        Fault(
            f"quantization.{key} is {_as_yaml(wanted[key])}, but the files of {where} hold 4-bit weights already",
            f"{key}: {_as_yaml(value)}, as they were quantized",
            f"leave quantization.{key} out, or choose the 16-bit model as the base",
        )
        for key, value in held.items()
        if key in asked.model_fields_set and wanted[key] != value
    ]
    if faults:
        raise BaseModelError.of(faults)
    return asked.model_copy(update=held)


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_packed_weights(tensors: Mapping[str, TensorLocation]) -> dict[str, PackedWeight]:
    """Every 4-bit weight of a checkpoint by name, its quantization state found whole; shards do not matter.

    Args:
        tensors: The checkpoint's tensors by name.

    Raises:
        BaseModelError: A part is missing, belongs to no weight, or has another size than the weight calls for.
    """
    parts: dict[str, dict[str, TensorLocation]] = {}
    for name, location in tensors.items():
        match = _PART_NAME.fullmatch(name)
        if match is not None:
            parts.setdefault(match["weight"], {})[match["part"]] = location
        elif name.endswith(".weight") and location.info.dtype == "U8":
            parts.setdefault(name, {})
    packed: dict[str, PackedWeight] = {}
    faults: list[Fault] = []
    for name, found in parts.items():
        try:
            packed[name] = _packed_weight(name, tensors.get(name), found)
        except BaseModelError as error:
            faults.extend(error.faults)
    if faults:
        more = len(faults) - _MAX_FAULTS
        rest = [Fault(f"... and {more} more faults of these weights", "none", _FIX)] if more > 0 else []
        raise BaseModelError.of([*faults[:_MAX_FAULTS], *rest])
    return packed


def described_shapes(tensors: Mapping[str, TensorLocation]) -> dict[str, tuple[int, ...]]:
    """Shape of each of the model's tensors by name: that of a 4-bit weight as it was, its quantization state left out.

    Raises:
        BaseModelError: The 4-bit weights are not whole.
    """
    packed = read_packed_weights(tensors)
    parts = {part for weight in packed.values() for part in weight.parts}
    return {
        name: packed[name].shape if name in packed else location.info.shape
        for name, location in tensors.items()
        if name not in parts
    }


def _packed_weight(name: str, weight: TensorLocation | None, found: Mapping[str, TensorLocation]) -> PackedWeight:
    states = [part for part in found if part.startswith(STATE)]
    if weight is None:
        raise _broken(f"tensor {shown(f'{name}.{next(iter(found))}')} belongs to no weight", "the weight beside it")
    if len(states) != 1:
        what = f"the 4-bit weight {shown(name)} has {len(states)} tensors {STATE}..."
        raise _broken(f"{weight.file}: {what}", "one, which says how it was quantized")
    location = found[states[0]]
    try:
        state = _read_state(location, states[0].removeprefix(STATE))
    except (OSError, ValueError) as error:
        what = f"{location.file}: tensor {shown(f'{name}.{states[0]}')} cannot be used: {error}"
        raise _broken(what, "the quantization state as bitsandbytes writes it") from error
    double = "nested_absmax" in found or "nested_blocksize" in state
    numbers = prod(state["shape"])
    blocks = -(-numbers // state["blocksize"])
    sizes = {"": ("U8", -(-numbers // 2)), "quant_map": ("F32", _CODES), "absmax": ("U8" if double else "F32", blocks)}
    if double:
        sizes["nested_absmax"] = ("F32", -(-blocks // NESTED_BLOCK_SIZE))
        sizes["nested_quant_map"] = ("F32", _NESTED_CODES)
    at_hand = {"": weight, **found}
    faults = [
        fault
        for part, (dtype, count) in sizes.items()
        if (fault := _size_fault(name, part, at_hand.get(part), dtype=dtype, count=count)) is not None
    ]
    if faults:
        raise BaseModelError.of(faults)
    quantization = Prequantization(state["quant_type"], double)
    return PackedWeight(tuple(state["shape"]), quantization, tuple(f"{name}.{part}" for part in found))


def _size_fault(name: str, part: str, location: TensorLocation | None, *, dtype: str, count: int) -> Fault | None:
    full_name = shown(f"{name}.{part}".removesuffix("."))
    expected = f"{count} numbers of {dtype}, as the weight's quantization state calls for"
    if location is None:
        return Fault(f"tensor {full_name} is missing", expected, _FIX)
    info = location.info
    if info.dtype == dtype and prod(info.shape) == count:
        return None
    return Fault(f"{location.file}: tensor {full_name} holds {prod(info.shape)} of {info.dtype}", expected, _FIX)


def _read_state(location: TensorLocation, quant_type: str) -> dict[str, Any]:
    """The JSON in a ``quant_state`` tensor, every key checked.

    Raises:
        ValueError: It is not what bitsandbytes writes, or what it can compute with.
        OSError: The file cannot be read.
    """
    info = location.info
    if info.dtype != "U8" or info.size_bytes > _MAX_STATE_BYTES:
        raise ValueError(f"{info.size_bytes} bytes of {info.dtype}")
    with location.file.open("rb") as file:
        file.seek(info.start)
        state = parse_json_object(file.read(info.size_bytes))
    shape, offset = state.get("shape"), state.get("nested_offset", 0.0)
    sound = {
        "quant_type": state.get("quant_type") == quant_type,
        "dtype": state.get("dtype") in ("float16", "bfloat16", "float32"),
        "blocksize": type(state.get("blocksize")) is int and state["blocksize"] in _BLOCK_SIZES,
        "shape": isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape),
        "nested_blocksize": state.get("nested_blocksize", NESTED_BLOCK_SIZE) == NESTED_BLOCK_SIZE,
        "nested_dtype": state.get("nested_dtype", "float32") == "float32",
        "nested_offset": type(offset) in (int, float) and isfinite(offset),
    }
    wrong = [key for key, is_sound in sound.items() if not is_sound]
    if wrong:
        raise ValueError(", ".join(f"{key} is {state.get(key)!r}" for key in wrong))
    return state


def _broken(what: str, expected: str) -> BaseModelError:
    return BaseModelError(what, expected=expected, fix=_FIX)
