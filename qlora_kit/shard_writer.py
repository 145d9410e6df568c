"""Writes model weights as safetensors, sharded where they are large, tensor by tensor or by blocks of rows."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from qlora_kit.atomic import atomic_file
from qlora_kit.safetensors_header import DTYPE_BYTES, INDEX_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    import torch

DEFAULT_SHARD_BYTES = 5_000_000_000
_WRITEBACK_BYTES = 32 * 2**20
_TORCH_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "complex64": "C64",
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before its values: the safetensors name of its dtype (``BF16``) and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """How many bytes its values take."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def torch_dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype (``torch.bfloat16`` -> ``BF16``).

    Raises:
        ValueError: safetensors has no such dtype.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise ValueError(f"safetensors has no dtype for {dtype}")
    return _TORCH_DTYPES[name]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name (``BF16`` -> ``torch.bfloat16``).

    Raises:
        ValueError: torch has no such dtype.
    """
    import torch

    for dtype, known in _TORCH_DTYPES.items():
        if known == name:
            found: torch.dtype = vars(torch)[dtype]
            return found
    raise ValueError(f"torch has no dtype for {name}")


def spec_of(tensor: torch.Tensor) -> TensorSpec:
    """The spec that ``tensor`` is written under."""
    return TensorSpec(torch_dtype_name(tensor.dtype), tuple(tensor.shape))


@dataclass
class _Shard:
    """One file being written: which tensors it holds, where each starts, and up to where Linux was told to write."""

    starts: dict[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    advised: int = 0
    file: BinaryIO | None = None


class ShardWriter:
    """Writes tensors to ``model.safetensors``, or to shards with an index, with only the tensor at hand in memory.

    All specs are declared first, so that the headers are written first; then tensors come in any order, whole
    (``write``) or in blocks of rows (``write_rows``). Until ``close`` (or the end of the ``with`` block) the files have
    temporary names; after an exception they are deleted. The folder must exist: use it inside ``atomic_directory``.

    Args:
        folder: Where the files go.
        specs: Every tensor that will be written; shards are filled in this order.
        max_shard_bytes: Shards hold at most so many bytes of tensors; a larger tensor gets a shard of its own.
        metadata: Texts for the headers; ``{"format": "pt"}``, which transformers asks for, is always there.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        *,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if not specs or max_shard_bytes <= 0:
            raise ValueError("at least one tensor, and shards of at least one byte")
        self.folder = folder
        self._specs = dict(specs)
        self._written = dict.fromkeys(specs, 0)
        self._metadata = {"format": "pt", **(metadata or {})}
        self._named: list[Path] = []
        self._shards = _plan_shards(self._specs, max_shard_bytes)
        self._shard_of = {name: index for index, shard in enumerate(self._shards) for name in shard.starts}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    @property
    def file_names(self) -> tuple[str, ...]:
        """The names that the weight files will have."""
        count = len(self._shards)
        if count == 1:
            return (WEIGHTS_FILE,)
        return tuple(f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the whole tensor ``name``.

        Raises:
            ValueError: It was not declared so, or is written already.
            OSError: The disk is full, or fails.
        """
        if spec_of(tensor) != self._specs.get(name) or self._written[name]:
            raise ValueError(f"tensor {name}: got {spec_of(tensor)}, declared {self._specs.get(name)}")
        self._append(name, tensor)

    def write_rows(self, name: str, rows: torch.Tensor) -> None:
        """Write the next rows of tensor ``name``: (n, ...), following the rows written before.

        Raises:
            ValueError: They do not fit the declared dtype and shape.
            OSError: The disk is full, or fails.
        """
        spec, given = self._specs.get(name), spec_of(rows)
        fits = spec is not None and spec.shape and given.dtype == spec.dtype and given.shape[1:] == spec.shape[1:]
        if spec is None or not fits or self._written[name] + given.size_bytes > spec.size_bytes:
            raise ValueError(f"tensor {name}: got rows {given}, declared {spec}")
        self._append(name, rows)

    def close(self) -> None:
        """Flush the files to disk and give them, and the index, their names.

        Raises:
            ValueError: A declared tensor is not written, or not wholly; nothing is kept.
            OSError: The disk is full, or fails; nothing is kept.
        """
        try:
            missing = [name for name, spec in self._specs.items() if self._written[name] != spec.size_bytes]
            if missing:
                raise ValueError(f"{len(missing)} declared tensors are not wholly written, the first is {missing[0]}")
            for shard, file_name in zip(self._shards, self.file_names, strict=True):
                file = self._opened(shard, file_name)
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for file_name in self.file_names:
                os.replace(self._partial(file_name), self.folder / file_name)
                self._named.append(self.folder / file_name)
            if len(self._shards) > 1:
                self._write_index()
        except BaseException:
            self._discard()
            raise

    def _append(self, name: str, tensor: torch.Tensor) -> None:
        import torch

        index = self._shard_of[name]
        shard = self._shards[index]
        file = self._opened(shard, self.file_names[index])
        start = shard.starts[name] + self._written[name]
        file.seek(start)
        if tensor.numel():
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)
        self._written[name] += spec_of(tensor).size_bytes
        self._start_writeback(shard, file, start + spec_of(tensor).size_bytes)

    @staticmethod
    def _start_writeback(shard: _Shard, file: BinaryIO, end: int) -> None:
        """Let Linux bring to disk what is written already, while more is computed: the sync at the end finds it done.

        Its advice that pages are no longer needed starts writing the dirty ones, and drops none of these.
        """
        if end - shard.advised < _WRITEBACK_BYTES or not hasattr(os, "posix_fadvise"):
            return
        file.flush()
        os.posix_fadvise(file.fileno(), shard.advised, end - shard.advised, os.POSIX_FADV_DONTNEED)
        shard.advised = end

    def _opened(self, shard: _Shard, file_name: str) -> BinaryIO:
        if shard.file is None:
            shard.file = self._partial(file_name).open("wb")
            shard.file.write(_header(shard, self._specs, self._metadata))
        return shard.file

    def _partial(self, file_name: str) -> Path:
        return self.folder / f".{file_name}.partial"

    def _write_index(self) -> None:
        names = self.file_names
        weight_map = {name: names[index] for name, index in self._shard_of.items()}
        total_bytes = sum(spec.size_bytes for spec in self._specs.values())
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        with atomic_file(self.folder / INDEX_FILE) as temporary:
            temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def _discard(self) -> None:
        for shard, file_name in zip(self._shards, self.file_names, strict=True):
            if shard.file is not None:
                with suppress(OSError):  # a full disk fails again when the buffer is flushed
                    shard.file.close()
            self._partial(file_name).unlink(missing_ok=True)
        for path in self._named:
            path.unlink(missing_ok=True)


def _plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[_Shard]:
    groups: list[list[str]] = [[]]
    filled_bytes = 0
    for name, spec in specs.items():
        if groups[-1] and filled_bytes + spec.size_bytes > max_shard_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(name)
        filled_bytes += spec.size_bytes
    return [_placed(names, specs) for names in groups]


def _placed(names: list[str], specs: Mapping[str, TensorSpec]) -> _Shard:
    """Starts count from the first byte after the header here; ``_header`` moves them behind it.

    Wide dtypes come first, because readers view the mapped bytes in place and need them aligned.
    """
    shard = _Shard()
    for name in sorted(names, key=lambda name: -DTYPE_BYTES[specs[name].dtype]):
        shard.starts[name] = shard.size_bytes
        shard.size_bytes += specs[name].size_bytes
    return shard


def _header(shard: _Shard, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The shard's header, padded to 8 bytes; moves the shard's starts behind it."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)}
    for name, start in shard.starts.items():
        spec = specs[name]
        offsets = [start, start + spec.size_bytes]
        content[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    shard.starts = {name: start + 8 + len(text) for name, start in shard.starts.items()}
    return struct.pack("<Q", len(text)) + text
