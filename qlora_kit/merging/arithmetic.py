"""The arithmetic of a merge on single weights: the 4-bit round trip, B·A, the sum with its one rounding, its bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_kit.config import QuantizationSection
from qlora_kit.four_bit import dequantize

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState

BLOCK_SIZE = 64  # transformers leaves Params4bit's own default


def quantize_as_loaded(weight: torch.Tensor, quantization: QuantizationSection) -> tuple[torch.Tensor, QuantState]:
    """Packed 4-bit codes and quantization state of ``weight``, as loading in 4 bits makes them.

    Args:
        weight: (out_features, in_features), any float dtype; bitsandbytes quantizes its fp32 values.
        quantization: The 4-bit type, and whether the block scales are quantized too.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        weight.to(torch.float32).contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
    )


def four_bit_round_trip(weight: torch.Tensor, quantization: QuantizationSection) -> torch.Tensor:
    """What a 4-bit layer computes with: ``weight`` quantized and dequantized by bitsandbytes as loading does it.

    Args:
        weight: (out_features, in_features), any float dtype; bitsandbytes quantizes its fp32 values.
        quantization: The 4-bit type, and whether the block scales are quantized too.

    Returns:
        fp32, (out_features, in_features).
    """
    return dequantize(*quantize_as_loaded(weight, quantization))


def lora_delta(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The adapter's change of a weight: scaling · B @ A in fp32 (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Args:
        a: (r, in_features).
        b: (out_features, r).
        scaling: alpha/r, or alpha/√r for rsLoRA.
    """
    return (b.float() @ a.float()) * scaling  # (out_features, in_features)


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours in ``dtype`` at each of ``values`` (fp32): what one rounding may change."""
    import torch

    info = torch.finfo(dtype)
    normal = values.float().abs().clamp(min=info.smallest_normal)  # below it, and at zero, the spacing stays the same
    exponent = torch.frexp(normal).exponent  # |value| = m · 2^exponent with m in [0.5, 1)
    return torch.ldexp(torch.full_like(normal, info.eps / 4), exponent)


def rounding_bound(
    expected: torch.Tensor,
    base_used: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """How far a correctly merged weight may be from ``expected``, another fp32 evaluation of the same sum.

    Half a unit in the last place of ``dtype``, plus what two evaluations of the sum in fp32 may differ by: r + 2
    roundings each, every one at most 2^-24 of the sum of the magnitudes.

    Args:
        expected: base used + Δ in fp32, (out_features, in_features).
        base_used: The weight before the merge, fp32, same shape.
        a: (r, in_features).
        b: (out_features, r).
        scaling: The factor before B·A.
        dtype: What the written weight is rounded to.
    """
    magnitude = base_used.abs() + abs(scaling) * (b.float().abs() @ a.float().abs())
    arithmetic = 2 * (a.shape[0] + 2) * 2.0**-24 * magnitude
    return half_ulp(expected.abs() + arithmetic, dtype) + arithmetic
