"""RMSNorm that is put off: it hands its input on, and the layers behind it normalise it and keep the input only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PendingNorm:
    """What a ``DeferredNorm`` hands on: hidden states that are still to be normalised.

    Attributes:
        hidden_states: (..., H).
        weight: Of the norm: (H,).
        eps: Added to the mean square.
    """

    hidden_states: torch.Tensor
    weight: torch.Tensor
    eps: float

    def normalised(self) -> torch.Tensor:
        """As transformers' RMSNorm computes it."""
        return normalise(self.hidden_states, self.weight, inverse_rms(self.hidden_states, self.eps))


class DeferredNorm(torch.nn.Module):
    """In the place of an RMSNorm, with its weight; the layer behind it must take a ``PendingNorm``."""

    weight: torch.Tensor
    variance_epsilon: float

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> PendingNorm:
        """Hand on (..., H) as it is."""
        return PendingNorm(hidden_states, self.weight, self.variance_epsilon)


def inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root of the mean square of each row of ``x`` (..., H), in fp32 at least: (..., 1)."""
    norm = torch.linalg.vector_norm(_wide(x), dim=-1, keepdim=True)
    return norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()  # the norm itself may be kept for its gradient


def normalise(x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``x`` (..., H) times ``factor`` (..., 1), rounded to its dtype, times ``weight`` (H,)."""
    return weight * (_wide(x) * factor).to(x.dtype)


def norm_gradient(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Gradient of ``x`` (..., H) from that of the norm's output, which is overwritten where it is wide enough.

    With y = w·x·f and f = (mean(x²) + eps)^-1/2: dx = f·(g − x·f·mean(g·x·f)), where g = w·dy.
    """
    wide = _wide(x)
    g = _wide(grad).mul_(weight) if grad.dtype == wide.dtype else _wide(grad) * weight
    share = (g * wide).sum(dim=-1, keepdim=True).div_(x.shape[-1]).mul_(factor).mul_(factor)
    return g.addcmul_(wide, share, value=-1).mul_(factor).to(x.dtype)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """In fp32, where it is narrower."""
    return x.float() if x.element_size() < torch.float32.itemsize else x
