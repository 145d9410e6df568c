"""The weights of a GGUF file as transformers' model needs them: dequantized, by its names, rows in its order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.architecture import Architecture
from qlora_kit.checkpoint import TensorSpec
from qlora_kit.export.gguf_names import gguf_name, head_rows_as_halves, rotated_heads
from qlora_kit.merging.tensors import Rows, row_blocks

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import ReaderTensor


class GgufWeights:
    """What a file of this process really holds, by the gguf package's reader: ``layerwise.Weights``.

    Args:
        path: The file.
        architecture: The model's, to find its tensors.
    """

    def __init__(self, path: Path, architecture: Architecture) -> None:
        from gguf import GGUFReader

        self._architecture = architecture
        stored = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
        self._tensors: dict[str, ReaderTensor] = {
            name: stored[gguf_name(name)] for name in architecture.tensors() if gguf_name(name) in stored
        }

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def spec(self, name: str) -> TensorSpec:
        """fp32, in the shape of torch."""
        return TensorSpec("F32", tuple(int(size) for size in reversed(self._tensors[name].shape)))

    def blocks(self, name: str) -> Iterator[Rows]:
        """The tensor from its first row to its last; query and key weights of ``llama`` whole."""
        shape = self._architecture
        heads = rotated_heads(name, shape.family, heads=shape.heads, kv_heads=shape.kv_heads)
        if heads is not None:
            yield Rows(0, head_rows_as_halves(self._rows(name, slice(None)), heads), None)
            return
        for start, stop in row_blocks(self.spec(name)):
            yield Rows(start, self._rows(name, slice(start, stop)), None)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Some rows of the embedding or head."""
        import torch

        return torch.cat([self._rows(name, slice(row, row + 1)) for row in ids])

    def _rows(self, name: str, part: slice) -> torch.Tensor:
        import numpy as np
        import torch
        from gguf import quants

        tensor = self._tensors[name]
        stored: np.ndarray = np.ascontiguousarray(tensor.data[part])  # a copy: the file stays mapped
        return torch.from_numpy(np.array(quants.dequantize(stored, tensor.tensor_type), dtype=np.float32))
