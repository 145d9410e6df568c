"""The gated MLP of Llama's kind: activations are computed again rather than kept, and the LoRA branch comes first."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from qlora_kit.fast.linear_group import apply_group
from qlora_kit.fast.lora_layers import FrozenLinear, LoraLinear, dropped, kept_inputs, lora_linears
from qlora_kit.fast.norm import PendingNorm


class FastMLP(torch.nn.Module):
    """In the place of a gated SiLU MLP and with its children; takes a ``PendingNorm`` (..., H) and returns (..., H)."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module
    act_fn: torch.nn.Module

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn
        self.training = mlp.training  # and not that of its children, which may differ

    def forward(self, x: PendingNorm) -> torch.Tensor:
        """The MLP of the normalised hidden states."""
        linears = lora_linears((self.gate_proj, self.up_proj, self.down_proj)) if self.training else None
        if linears is None:
            inner = x.normalised()
            plain: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(inner)) * self.up_proj(inner))
            return plain
        gate, up = apply_group(x, linears[:2])
        return swiglu_and_down(gate, up, linears[2])


def swiglu_and_down(gate: torch.Tensor, up: torch.Tensor, down: LoraLinear) -> torch.Tensor:
    """``down_proj`` of silu(gate)·up, both (..., I): (..., H).

    The LoRA branch is a function of its own that comes first. All that is kept is kept there, so that a checkpoint
    which computes the layer again stops behind it: no gradient needs the product with the frozen weight.
    """
    shape = gate.shape
    with torch.autocast(gate.device.type, enabled=False):  # every dtype is chosen by hand
        inner, branch = _SwigluLora.apply(gate.flatten(0, -2), up.flatten(0, -2), down.frozen, down.a, down.b)
        output: torch.Tensor = _AddFrozen.apply(inner, branch, down.frozen)
    return output.view(*shape[:-1], -1)


class _SwigluLora(torch.autograd.Function):
    """h = silu(gate)·up (M, I), and the branch s·h·Aᵀ·Bᵀ (M, H); keeps gate and up, not h."""

    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, frozen: FrozenLinear, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inner = torch.nn.functional.silu(gate).mul_(up)
        kept = kept_inputs(inner, frozen.dropout)
        low = dropped(inner, kept, frozen.dropout) @ a.to(inner.dtype).t()  # (M, r)
        ctx.save_for_backward(gate, up, low, kept, a, b)
        ctx.frozen = frozen
        return inner, (low @ b.to(inner.dtype).t()).mul_(frozen.scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_inner: torch.Tensor, grad_branch: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, low, kept, a, b = ctx.saved_tensors
        frozen: FrozenLinear = ctx.frozen
        needs_gate, needs_up, _, needs_a, needs_b = ctx.needs_input_grad
        low_grad = (grad_branch @ b.to(gate.dtype)).mul_(frozen.scaling)
        grad_b = (grad_branch.t() @ low).mul_(frozen.scaling).to(b.dtype) if needs_b else None
        active = torch.nn.functional.silu(gate)
        grad_a = None
        if needs_a:
            grad_a = (low_grad.t() @ dropped(active * up, kept, frozen.dropout)).to(a.dtype)
        if not (needs_gate or needs_up):
            return None, None, None, grad_a, grad_b
        # Only ``_AddFrozen`` makes this gradient, and only for here, so that it may be overwritten.
        if kept is None:
            grad_inner.addmm_(low_grad, a.to(gate.dtype))
        else:
            grad_inner.add_(dropped(low_grad @ a.to(gate.dtype), kept, frozen.dropout))
        grad_up = active.mul_(grad_inner)
        grad_gate = torch.ops.aten.silu_backward(grad_inner.mul_(up), gate)
        return grad_gate, grad_up, None, grad_a, grad_b


class _AddFrozen(torch.autograd.Function):
    """``branch`` (M, out) += inner (M, in)·Wᵀ + bias; keeps nothing."""

    @staticmethod
    def forward(ctx: Any, inner: torch.Tensor, branch: torch.Tensor, frozen: FrozenLinear) -> torch.Tensor:
        ctx.mark_dirty(branch)
        ctx.frozen = frozen
        branch.addmm_(inner, frozen.weight().t())
        return branch if frozen.bias is None else branch.add_(frozen.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_inner = grad @ ctx.frozen.weight() if ctx.needs_input_grad[0] else None
        return grad_inner, grad, None
