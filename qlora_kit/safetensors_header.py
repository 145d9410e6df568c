"""Reads safetensors headers, without torch and without trusting the file: which tensors it holds, and where.

The layout (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header,
then the tensors' bytes back to back.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from qlora_kit.errors import Fault, QloraKitError
from qlora_kit.regular_file import open_regular
from qlora_kit.strict_json import parse_json_object, read_json_object

MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000
MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 16
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
_FIX = "download or write the file again; it was cut off, damaged, or is no safetensors file"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file.

    Attributes:
        dtype: The format's own name (``F32``, ``BF16``, ``U8``, ...).
        shape: Its dimensions; empty for a scalar.
        start: Position of its first byte in the file.
        end: Position after its last byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """How many bytes of the file it takes."""
        return self.end - self.start


@dataclass(frozen=True)
class TensorLocation:
    """Which file of a model folder holds a tensor, and where in it."""

    file: Path
    info: TensorInfo


def shown(name: str) -> str:
    """``name`` as it may be printed: quoted, control characters escaped, cut at 120 characters."""
    return repr(name if len(name) <= 120 else name[:117] + "...")


def read_safetensors_header(
    path: Path, *, error: type[QloraKitError], max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorInfo]:
    """The tensors of ``path`` by name, in the order of their bytes, after checking every bound against the file.

    Args:
        path: The file; its tensors' bytes are not read.
        error: The class to raise, because a base model and an adapter are different mistakes.
        max_header_bytes: Larger headers are refused unread.

    Raises:
        QloraKitError: Of class ``error``: not a regular file, cut off, a header that is no sound JSON, an unknown
            dtype, sizes that disagree, or bytes that overlap, leave gaps or lie outside the file.
    """
    try:
        if not path.is_file():
            raise error(f"{path}: there is no such file", expected="a safetensors file", fix=_FIX)
        with open_regular(path) as file:
            return read_open_header(file, path, error=error, max_header_bytes=max_header_bytes)
    except OSError as problem:
        raise _unreadable(path, problem, error) from problem


def read_open_header(
    file: BinaryIO, path: Path, *, error: type[QloraKitError], max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorInfo]:
    """As ``read_safetensors_header``, of a file that is open at its start; ``path`` is only named in messages.

    Raises:
        QloraKitError: Of class ``error``, as there.
    """
    expected = "a safetensors file"
    try:
        file_bytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise error(f"{path}: {file_bytes} bytes are too few", expected=expected, fix=_FIX)
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes < 2 or header_bytes > min(max_header_bytes, file_bytes - 8):
            what = f"{path}: the header claims {header_bytes} bytes in a file of {file_bytes}"
            raise error(what, expected=f"a header of 2 to {max_header_bytes} bytes inside the file", fix=_FIX)
        text = file.read(header_bytes)
    except OSError as problem:
        raise _unreadable(path, problem, error) from problem
    try:
        return _checked_tensors(text, data_start=8 + header_bytes, file_bytes=file_bytes)
    except ValueError as problem:
        raise error(f"{path}: {problem}", expected="a sound safetensors header", fix=_FIX) from problem


def locate_tensors(folder: Path, *, error: type[QloraKitError]) -> dict[str, TensorLocation]:
    """Every tensor of a model folder: of ``model.safetensors``, else of the shards that the index names.

    Raises:
        QloraKitError: Of class ``error``, with every fault found: no weights, an index that names files outside the
            folder, a shard that is missing or cut off, a tensor missing from its shard or the index, or in two shards.
    """
    if (folder / WEIGHTS_FILE).exists():
        path = folder / WEIGHTS_FILE
        return {name: TensorLocation(path, info) for name, info in read_safetensors_header(path, error=error).items()}
    if not (folder / INDEX_FILE).exists():
        raise error(
            f"{folder}: no {WEIGHTS_FILE} and no {INDEX_FILE}",
            expected="a folder with the weights as safetensors",
            fix="give the folder of a downloaded or saved model; save other formats with save_pretrained first",
        )
    weight_map = _read_index(folder / INDEX_FILE, error=error)
    found: dict[str, TensorLocation] = {}
    faults: list[Fault] = []
    for file_name in sorted(set(weight_map.values())):
        path = folder / file_name
        try:
            header = read_safetensors_header(path, error=error)
        except error as problem:
            faults.extend(problem.faults)
            continue
        for name, info in header.items():
            if name in found:
                faults.append(_index_fault(path, name, f"is also in {found[name].file.name}"))
            elif name not in weight_map:
                faults.append(_index_fault(path, name, f"is missing from {INDEX_FILE}"))
            found.setdefault(name, TensorLocation(path, info))
        absent = [name for name, file in weight_map.items() if file == file_name and name not in header]
        faults.extend(
            _index_fault(path, name, f"is missing from the file, though {INDEX_FILE} puts it there") for name in absent
        )
    if faults:
        raise error.of(faults)
    return found


def _unreadable(path: Path, problem: OSError, error: type[QloraKitError]) -> QloraKitError:
    return error(f"{path}: cannot be read: {problem.strerror}", expected="a safetensors file", fix=_FIX)


def _checked_tensors(text: bytes, *, data_start: int, file_bytes: int) -> dict[str, TensorInfo]:
    if not text.startswith(b"{"):
        raise ValueError("the header does not start with '{'")
    try:
        header = parse_json_object(text)
    except ValueError as problem:
        raise ValueError(f"the header is not usable JSON: {problem}") from problem
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("__metadata__ is not an object of strings")
    tensors = [(name, _tensor_info(name, entry, data_start)) for name, entry in header.items()]
    tensors.sort(key=lambda item: (item[1].start, item[1].end))
    position = data_start
    for name, info in tensors:
        if info.start != position:
            raise ValueError(f"tensor {shown(name)} starts at byte {info.start}, the one before it ends at {position}")
        position = info.end
    if position != file_bytes:
        raise ValueError(f"the tensors end at byte {position}, the file at {file_bytes}")
    return dict(tensors)


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name or len(name) > MAX_NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"tensor name {shown(name)} is empty, too long, or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {shown(name)} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ValueError(f"tensor {shown(name)} has the unknown dtype {shown(str(dtype))}")
    if not _is_sizes(shape) or len(shape) > MAX_DIMENSIONS or _overflows(shape):
        raise ValueError(f"tensor {shown(name)} has no usable shape")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {shown(name)} has no usable data_offsets")
    if prod(shape) * DTYPE_BYTES[dtype] != offsets[1] - offsets[0]:
        raise ValueError(f"tensor {shown(name)}: dtype and shape do not agree with its {offsets[1] - offsets[0]} bytes")
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _overflows(shape: list[int]) -> bool:
    """Whether a product on the way would not fit the 64 bits that other readers of the format multiply in."""
    count = DTYPE_BYTES["F64"]
    for size in shape:
        count *= size
        if count >= 2**63:
            return True
    return False


def _read_index(path: Path, *, error: type[QloraKitError]) -> dict[str, str]:
    index = read_json_object(path, max_bytes=MAX_INDEX_BYTES, error=error, fix=_FIX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise error(f"{path}: no usable weight_map", expected="an object of tensor name to file name", fix=_FIX)
    for name, file_name in weight_map.items():
        if not _is_plain_file_name(file_name):
            raise error(
                f"{path}: tensor {shown(name)} is said to be in {shown(file_name)}",
                expected="the name of a .safetensors file in the same folder",
                fix="do not use this folder: its index points out of it, or to a file of another kind",
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return (
        name.endswith(".safetensors")
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & set("/\\:")
    )


def _index_fault(path: Path, name: str, what: str) -> Fault:
    return Fault(f"{path}: tensor {shown(name)} {what}", f"each tensor once, where {INDEX_FILE} says", _FIX)
