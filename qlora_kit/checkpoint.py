"""Model weights on disk: reads tensors lazily from safetensors, and names what writes them."""

from __future__ import annotations

from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlora_kit.atomic import atomic_directory, atomic_file, require_free_space
from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import DTYPE_BYTES, TensorInfo, TensorLocation, locate_tensors, shown
from qlora_kit.shard_writer import ShardWriter, TensorSpec, spec_of, torch_dtype, torch_dtype_name

if TYPE_CHECKING:
    import torch

__all__ = [
    "ShardWriter",
    "TensorSource",
    "TensorSpec",
    "atomic_directory",
    "atomic_file",
    "read_numbers",
    "require_free_space",
    "spec_of",
    "torch_dtype",
    "torch_dtype_name",
]


def read_numbers(file: FileIO, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Numbers ``start`` to ``stop`` (exclusive) of a tensor's flattened values: (stop - start,), in its own dtype.

    They are read, not mapped: pages of a mapped file count as memory of the process that looks at them.

    Raises:
        OSError: The file cannot be read, or became shorter.
    """
    import torch

    if not 0 <= start <= stop <= prod(info.shape):
        raise IndexError(f"numbers {start}:{stop} of a tensor of shape {info.shape}")
    size_bytes = DTYPE_BYTES[info.dtype]
    raw = torch.empty((stop - start) * size_bytes, dtype=torch.uint8)
    view = raw.numpy().data
    file.seek(info.start + start * size_bytes)
    while view:
        count = file.readinto(view)
        if not count:
            raise OSError(0, "the file became shorter while it was read")
        view = view[count:]
    return raw.view(torch_dtype(info.dtype))


class TensorSource:
    """The tensors of a model folder, read one at a time; what does not fit together is refused before the first read.

    Tensors are private copies of the mapped file: changing one does not change the file. Use it as a context
    manager, or ``close`` it, to let the mapped files go.

    Args:
        folder: ``model.safetensors``, or shards with their index.

    Raises:
        BaseModelError: The weights are missing, cut off, or do not agree with their index; every fault is named.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._locations: dict[str, TensorLocation] = locate_tensors(folder, error=BaseModelError)
        self._open: dict[Path, Any] = {}
        self._files: dict[Path, FileIO] = {}

    def __enter__(self) -> TensorSource:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._locations

    def __len__(self) -> int:
        return len(self._locations)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor, file by file in the order of their bytes: the order in which reading is fastest."""
        return tuple(self._locations)

    @property
    def total_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(location.info.size_bytes for location in self._locations.values())

    def file(self, name: str) -> Path:
        """The file that holds tensor ``name``."""
        return self._location(name).file

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape of tensor ``name``, without reading it."""
        info = self._location(name).info
        return TensorSpec(info.dtype, info.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor ``name``."""
        return self._location(name).info.shape

    def dtype(self, name: str) -> str:
        """Dtype of tensor ``name`` as safetensors calls it (``BF16``)."""
        return self._location(name).info.dtype

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, on the CPU.

        Raises:
            BaseModelError: There is no such tensor, or its file can no longer be read.
        """
        return self._read(name, None)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` (exclusive) of tensor ``name``: (stop - start, ...), reading only these.

        Raises:
            BaseModelError: There is no such tensor, or its file can no longer be read.
            IndexError: The tensor has no such rows.
        """
        shape = self.shape(name)
        if not shape or not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start}:{stop} of tensor {name} with shape {shape}")
        return self._read(name, slice(start, stop))

    def numbers(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Numbers ``start`` to ``stop`` (exclusive) of the flattened tensor ``name``, by ``read_numbers``.

        Raises:
            BaseModelError: There is no such tensor, or its file can no longer be read.
        """
        location = self._location(name)
        try:
            if location.file not in self._files:
                self._files[location.file] = location.file.open("rb", buffering=0)
            return read_numbers(self._files[location.file], location.info, start, stop)
        except OSError as error:
            raise _unreadable(location.file, name, error) from error

    def close(self) -> None:
        """Let every opened file go; the source opens them again when it is used again."""
        self._open.clear()
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _read(self, name: str, rows: slice | None) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._location(name).file
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt", device="cpu")
            opened = self._open[path]
            tensor: torch.Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[rows]
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, name, error) from error
        return tensor

    def _location(self, name: str) -> TensorLocation:
        if name not in self._locations:
            raise BaseModelError(
                f"{self.folder}: there is no tensor {shown(name)}",
                expected="the tensors that the model's configuration calls for",
                fix="give a model of a supported architecture, with all of its files",
            )
        return self._locations[name]


def _unreadable(path: Path, name: str, error: Exception) -> BaseModelError:
    return BaseModelError(
        f"{path}: tensor {shown(name)} cannot be read: {error}",
        expected="the file that was there when the work began",
        fix="make sure that nothing changes the folder, download it again if needed, and start again",
    )
