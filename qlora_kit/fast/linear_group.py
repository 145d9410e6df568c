"""Linear layers of one input as one autograd function: the input is kept once, gradients are added up in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kit.fast.lora_layers import FrozenLinear, LoraLinear, dropped, kept_inputs
from qlora_kit.fast.norm import PendingNorm, inverse_rms, norm_gradient, normalise


def apply_group(x: torch.Tensor | PendingNorm, linears: Sequence[LoraLinear]) -> tuple[torch.Tensor, ...]:
    """The outputs of layers that share the input ``x`` (..., in_features): each (..., out_features).

    Of a ``PendingNorm`` the hidden states are kept, which the residual connection keeps anyway, and not its output.
    """
    hidden, weight, eps = (x.hidden_states, x.weight, x.eps) if isinstance(x, PendingNorm) else (x, None, 0.0)
    pairs = [tensor for linear in linears for tensor in (linear.a, linear.b)]
    frozen = [linear.frozen for linear in linears]
    with torch.autocast(hidden.device.type, enabled=False):  # every dtype is chosen by hand
        outputs = _LinearGroup.apply(hidden.reshape(-1, hidden.shape[-1]), weight, eps, frozen, *pairs)
    return tuple(output.view(*hidden.shape[:-1], -1) for output in outputs)


class _LinearGroup(torch.autograd.Function):
    """y_i = n·W_iᵀ + bias_i + s_i·n·A_iᵀ·B_iᵀ for i = 1 … k, where n is x (M, in), or its RMSNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        eps: float,
        frozen: Sequence[FrozenLinear],
        *pairs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        factor = None if norm_weight is None else inverse_rms(x, eps)
        inner = _inner(x, norm_weight, factor, dtype=frozen[0].dtype)
        a, b = ([tensor.to(inner.dtype) for tensor in part] for part in (pairs[::2], pairs[1::2]))
        kept = [kept_inputs(inner, linear.dropout) for linear in frozen]
        if any(mask is not None for mask in kept):
            parts = zip(a, kept, frozen, strict=True)
            low = torch.cat([dropped(inner, mask, linear.dropout) @ one.t() for one, mask, linear in parts], dim=1)
        else:
            low = inner @ torch.cat(a).t()  # (M, sum of ranks)
        outputs = []
        for linear, one, part in zip(frozen, b, low.split([one.shape[0] for one in a], dim=1), strict=True):
            weight = linear.weight()
            output = inner @ weight.t() if linear.bias is None else torch.addmm(linear.bias, inner, weight.t())
            del weight  # before the next one is made
            outputs.append(output.addmm_(part, one.t(), alpha=linear.scaling))
        ctx.save_for_backward(x, norm_weight, factor, low, *kept, *pairs)
        ctx.frozen = frozen
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        frozen: Sequence[FrozenLinear] = ctx.frozen
        x, norm_weight, factor, low, *rest = ctx.saved_tensors
        kept, pairs = rest[: len(frozen)], rest[len(frozen) :]
        a, b = ([tensor.to(low.dtype) for tensor in part] for part in (pairs[::2], pairs[1::2]))
        needs_x, needs_a, needs_b = ctx.needs_input_grad[0], ctx.needs_input_grad[4::2], ctx.needs_input_grad[5::2]
        low_grads = [grad @ one * linear.scaling for grad, one, linear in zip(grads, b, frozen, strict=True)]
        parts = low.split([one.shape[0] for one in a], dim=1)
        grad_b = [
            (grad.t() @ part).mul_(linear.scaling).to(pair.dtype) if needed else None
            for grad, part, linear, pair, needed in zip(grads, parts, frozen, pairs[1::2], needs_b, strict=True)
        ]
        inner = _inner(x, norm_weight, factor, dtype=low.dtype) if any(needs_a) else None
        grad_a: list[torch.Tensor | None] = [None] * len(frozen)
        if inner is not None:
            all_a = zip(_grad_a(inner, low_grads, kept, frozen), pairs[::2], needs_a, strict=True)
            grad_a = [one.to(pair.dtype) if needed else None for one, pair, needed in all_a]
        del inner
        grad_x = None
        if needs_x:
            grad_x = _grad_inner(grads, low_grads, a, kept, frozen)
            if norm_weight is not None:
                grad_x = norm_gradient(grad_x, x, norm_weight, factor)
            grad_x = grad_x.to(x.dtype)
        pair_grads = [grad for pair in zip(grad_a, grad_b, strict=True) for grad in pair]
        return (grad_x, None, None, None, *pair_grads)


def _inner(
    x: torch.Tensor, norm_weight: torch.Tensor | None, factor: torch.Tensor | None, *, dtype: torch.dtype
) -> torch.Tensor:
    return (x if norm_weight is None or factor is None else normalise(x, norm_weight, factor)).to(dtype)


def _grad_a(
    inner: torch.Tensor,
    low_grads: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor | None],
    frozen: Sequence[FrozenLinear],
) -> list[torch.Tensor]:
    """Gradients of the A matrices: one product for all of them, unless dropout gave each its own input."""
    if all(mask is None for mask in kept):
        stacked = torch.cat(list(low_grads), dim=1).t() @ inner
        return list(stacked.split([grad.shape[1] for grad in low_grads]))
    return [
        grad.t() @ dropped(inner, mask, linear.dropout)
        for grad, mask, linear in zip(low_grads, kept, frozen, strict=True)
    ]


def _grad_inner(
    grads: Sequence[torch.Tensor],
    low_grads: Sequence[torch.Tensor],
    a: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor | None],
    frozen: Sequence[FrozenLinear],
) -> torch.Tensor:
    """Gradient of the shared input, each product added onto the first one's result."""
    total = grads[0] @ frozen[0].weight()
    for grad, linear in zip(grads[1:], frozen[1:], strict=True):
        total.addmm_(grad, linear.weight())
    if all(mask is None for mask in kept):
        return total.addmm_(torch.cat(list(low_grads), dim=1), torch.cat(list(a)))
    for low_grad, one, mask, linear in zip(low_grads, a, kept, frozen, strict=True):
        total.add_(dropped(low_grad @ one, mask, linear.dropout))
    return total
