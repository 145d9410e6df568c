"""The arithmetic of a merge on blocks of a weight: B·A, the sum with its one rounding, its bound."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def lora_delta(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """The adapter's change of a weight: scaling · B @ A in fp32 (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    Args:
        a: (r, in_features).
        b: (out_features, r), or some rows of it.
        scaling: alpha/r, or alpha/√r for rsLoRA.
    """
    return (b.float() @ a.float()).mul_(scaling)  # (out_features, in_features)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    import torch

    if not values.is_floating_point() or values.element_size() == 1:
        return True
    # One such value makes the sum one too, and a sum is the faster pass; of very large values it may overflow.
    return bool(values.sum(dtype=torch.float32).isfinite()) or bool(values.isfinite().all())


def half_ulp(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Half the distance between neighbours in ``dtype`` at each of ``values`` (fp32): what one rounding may change."""
    import torch

    info = torch.finfo(dtype)
    normal = values.float().abs().clamp(min=info.smallest_normal)  # below it, and at zero, the spacing stays the same
    exponent = torch.frexp(normal).exponent  # |value| = m · 2^exponent with m in [0.5, 1)
    return torch.ldexp(torch.full_like(normal, info.eps / 4), exponent)


def sum_error(base_used: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """What two evaluations of base used + scaling · B @ A in fp32 may differ by: (n, in_features).

    r + 2 roundings each, every one at most 2^-24 of the sum of the magnitudes.

    Args:
        base_used: The weight before the merge, fp32, (n, in_features).
        a: (r, in_features).
        b: (n, r).
        scaling: The factor before B·A.
    """
    magnitude = base_used.abs() + abs(scaling) * (b.float().abs() @ a.float().abs())
    return 2 * (a.shape[0] + 2) * 2.0**-24 * magnitude
