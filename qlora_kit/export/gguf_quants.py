"""What GGUF files can hold weights as: a name of ``--quant`` in, the type of each tensor and its packed bytes out."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from qlora_kit.errors import BaseModelError, ConfigError
from qlora_kit.safetensors_header import shown
from qlora_kit.suggest import nearest

if TYPE_CHECKING:
    import numpy as np
    import torch

F16_MAX = 65504.0
BLOCK_NUMBERS = 32
"""Q8_0, Q4_0, … give each 32 numbers of a row one scale: rows of another length stay in F16."""


@dataclass(frozen=True)
class GgufQuant:
    """A choice of ``--quant``.

    Attributes:
        name: As given on the command line.
        matrices: The GGML type of the layers' weights.
        tables: That of embedding and head, where an error costs more than in a layer.
        file_type: llama.cpp's name for files of this kind (``LlamaFileType``).
        quantizer: What llama.cpp's own quantizer calls it, where that has to write it; None where Python does.
    """

    name: str
    matrices: str
    tables: str
    file_type: str
    quantizer: str | None = None

    def type_of(self, shape: tuple[int, ...], *, is_table: bool) -> str:
        """The GGML type of a tensor of this (rows, columns) shape; vectors, norms and biases, stay in fp32."""
        if len(shape) != 2:
            return "F32"
        chosen = self.tables if is_table else self.matrices
        return "F16" if chosen.startswith("Q") and shape[1] % BLOCK_NUMBERS else chosen


QUANTS: dict[str, GgufQuant] = {
    quant.name: quant
    for quant in (
        GgufQuant("f32", "F32", "F32", "ALL_F32"),
        GgufQuant("f16", "F16", "F16", "MOSTLY_F16"),
        GgufQuant("bf16", "BF16", "BF16", "MOSTLY_BF16"),
        GgufQuant("q8_0", "Q8_0", "Q8_0", "MOSTLY_Q8_0"),
        GgufQuant("q5_1", "Q5_1", "Q8_0", "MOSTLY_Q5_1"),
        GgufQuant("q5_0", "Q5_0", "Q8_0", "MOSTLY_Q5_0"),
        GgufQuant("q4_1", "Q4_1", "Q8_0", "MOSTLY_Q4_1"),
        GgufQuant("q4_0", "Q4_0", "Q8_0", "MOSTLY_Q4_0"),
        GgufQuant("q6_k", "Q6_K", "Q6_K", "MOSTLY_Q6_K", quantizer="Q6_K"),
        GgufQuant("q5_k_m", "Q5_K", "Q6_K", "MOSTLY_Q5_K_M", quantizer="Q5_K_M"),
        GgufQuant("q4_k_m", "Q4_K", "Q6_K", "MOSTLY_Q4_K_M", quantizer="Q4_K_M"),
    )
}
_LOSSLESS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def find_quant(name: str) -> GgufQuant:
    """The choice of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in QUANTS:
        match = nearest(name, QUANTS)
        raise ConfigError(
            f"--quant {shown(name)}: no such kind of GGUF weights",
            expected="one of " + ", ".join(QUANTS),
            fix="choose one of them" if match is None else f"did you mean {match}?",
        )
    return QUANTS[name]


def lossless_quant(dtype: str) -> GgufQuant:
    """The choice that keeps weights of this safetensors dtype as they are."""
    return QUANTS[_LOSSLESS[dtype]]


def packed_size_bytes(shape: tuple[int, ...], kind: str) -> int:
    """How many bytes a tensor of GGML type ``kind`` takes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block_numbers, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return prod(shape) // block_numbers * block_bytes


def pack_rows(rows: torch.Tensor, kind: str, *, name: str) -> np.ndarray:
    """Rows of a tensor as the bytes that the file holds: (n, columns) or (n,) of any float dtype in.

    Args:
        rows: Finite numbers.
        kind: The GGML type.
        name: The tensor, for messages.

    Raises:
        BaseModelError: Numbers are NaN or infinite, or too large for fp16, where the type is F16.
    """
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    _require_finite(rows, name)
    if kind == "BF16":
        packed: np.ndarray = rows.to(torch.bfloat16).contiguous().view(torch.int16).numpy()
        return packed
    if kind == "F16":
        _require_fp16_range(rows, name)
        return rows.to(torch.float16).contiguous().numpy()
    values: np.ndarray = rows.to(torch.float32).contiguous().numpy()
    return values if kind == "F32" else np.asarray(quants.quantize(values, GGMLQuantizationType[kind]))


def _require_finite(rows: torch.Tensor, name: str) -> None:
    import torch

    # A sum is finite unless a number is not, or the sum overflows: only then each number is looked at.
    if torch.isfinite(rows.float().sum()):
        return
    wrong = int((~torch.isfinite(rows)).sum())
    if wrong:
        raise BaseModelError(
            f"tensor {shown(name)} holds {wrong} values that are NaN or infinite",
            expected="finite weights",
            fix="download the base again, or train and merge again with a smaller learning rate",
        )


def _require_fp16_range(rows: torch.Tensor, name: str) -> None:
    import torch

    if rows.dtype == torch.float16:
        return
    too_large = int((rows.abs() > F16_MAX).sum())
    if too_large:
        raise BaseModelError(
            f"tensor {shown(name)} holds {too_large} values beyond the range of fp16 ({F16_MAX:.0f})",
            expected="weights that fp16 can hold",
            fix="give --quant bf16, q8_0 or f32",
        )
