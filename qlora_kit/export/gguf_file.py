"""Writes a GGUF file: header and tensor list first, then each tensor by blocks, in little memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from qlora_kit.atomic import atomic_file, require_free_space
from qlora_kit.errors import OutputError
from qlora_kit.export.gguf_quants import packed_size_bytes
from qlora_kit.export.gguf_results import GgufFile, file_stamp

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

_HEADER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class GgufTensor:
    """A tensor before its values.

    Attributes:
        name: llama.cpp's.
        shape: (rows, columns) or (numbers,), as in torch; GGUF lists the dimensions the other way round.
        kind: Its GGML type.
        source: What its values come from.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    source: str

    @property
    def size_bytes(self) -> int:
        """How many bytes its values take."""
        return packed_size_bytes(self.shape, self.kind)


def require_new_file(path: Path, tensors: Sequence[GgufTensor]) -> None:
    """Refuse an occupied path, and a disk that the file does not fit on.

    Raises:
        OutputError: One of the two.
    """
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path}: is there already", expected="a new file", fix="give another path, or delete it")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: there is no such folder", expected="an existing folder", fix="make it first")
    require_free_space(path, sum(tensor.size_bytes for tensor in tensors) + _HEADER_BYTES)


def write_gguf_file(
    path: Path,
    writer: GGUFWriter,
    tensors: Sequence[GgufTensor],
    blocks: Callable[[GgufTensor], Iterator[np.ndarray]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a whole file, or nothing.

    Args:
        path: The file to make.
        writer: Holds the keys of the header; without a path of its own.
        tensors: What the file holds, in this order.
        blocks: Gives a tensor's packed bytes from first to last.
        progress: Called with the bytes of tensors written and in all.

    Raises:
        OutputError: The folder cannot be written to, or the disk is full.
    """
    total_bytes = sum(tensor.size_bytes for tensor in tensors)
    done_bytes = 0
    with atomic_file(path) as temporary:
        _write_header(temporary, writer, tensors)
        with temporary.open("ab") as file:
            _pad(file, writer.data_alignment)
            for tensor in tensors:
                start = file.tell()
                for block in blocks(tensor):
                    done_bytes += file.write(block.data)
                    if progress is not None:
                        progress(done_bytes, total_bytes)
                if file.tell() - start != tensor.size_bytes:
                    raise ValueError(f"tensor {tensor.name}: {file.tell() - start} bytes, not {tensor.size_bytes}")
                _pad(file, writer.data_alignment)


def finished_file(
    path: Path,
    tensors: Sequence[GgufTensor],
    *,
    kind: str,
    quant: str,
    architecture: str,
    context_length: int | None = None,
    stop_token_ids: tuple[int, ...] = (),
) -> GgufFile:
    """What is to be said of a file that was just written.

    Raises:
        OutputError: It is gone.
    """
    stamp = file_stamp(path)
    if stamp is None:
        raise OutputError(f"{path}: is gone", expected="the file that was written", fix="export again")
    bits = 8 * sum(tensor.size_bytes for tensor in tensors)
    return GgufFile(
        path=path,
        kind=kind,
        quant=quant,
        architecture=architecture,
        bytes=stamp[2],
        tensors=len(tensors),
        types=dict(Counter(tensor.kind for tensor in tensors).most_common()),
        bits_per_weight=bits / sum(prod(tensor.shape) for tensor in tensors),
        context_length=context_length,
        stop_token_ids=stop_token_ids,
        stamp=stamp,
    )


def tensors_in(path: Path) -> list[GgufTensor]:
    """The tensors of a file that was just written, by the gguf package's reader."""
    from gguf import GGUFReader

    return [
        GgufTensor(tensor.name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, "")
        for tensor in GGUFReader(path).tensors
    ]


def _write_header(path: Path, writer: GGUFWriter, tensors: Sequence[GgufTensor]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        raw_dtype = GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size_bytes, raw_dtype=raw_dtype)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
