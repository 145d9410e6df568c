"""PEFT's 4-bit LoRA layers as the fused functions see them: the frozen weight, and the one trained pair of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.four_bit import dequantize

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit


@dataclass(frozen=True)
class FrozenLinear:
    """The frozen part of a layer y = x·Wᵀ + bias + scaling·(dropped x)·Aᵀ·Bᵀ.

    Attributes:
        layer: With the 4-bit weight.
        scaling: Of the pair A, B.
        dropout: Share of the pair's inputs that are set to zero in this pass.
    """

    layer: Linear4bit
    scaling: float
    dropout: float

    @property
    def bias(self) -> torch.Tensor | None:
        """(out_features,)"""
        return self.layer.bias

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in: hidden states may be wider, as behind an embedding or a norm that is trained."""
        dtype: torch.dtype = self.layer.weight.quant_state.dtype
        return dtype

    def weight(self) -> torch.Tensor:
        """The weight in the compute dtype, made anew: (out_features, in_features)."""
        return dequantize(self.layer.weight.data, self.layer.weight.quant_state)


@dataclass(frozen=True)
class LoraLinear:
    """A layer in one forward pass.

    Attributes:
        frozen: What is not trained.
        a: (r, in_features).
        b: (out_features, r).
    """

    frozen: FrozenLinear
    a: torch.Tensor
    b: torch.Tensor


def why_not(module: torch.nn.Module, dtype: torch.dtype) -> str | None:
    """Why a layer cannot be fused; None where it can.

    Args:
        module: A linear layer of the model, as PEFT left it.
        dtype: Of the hidden states.
    """
    from bitsandbytes.nn import Linear4bit
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    if not isinstance(module, LoraLinear4bit):
        return "is not a 4-bit layer with a LoRA pair"
    if not isinstance(module.base_layer, Linear4bit):
        return "has more than one wrapper"
    if len(module.lora_A) != 1 or module.active_adapters != list(module.lora_A):
        return "has more than one adapter"
    name = module.active_adapters[0]
    if name in module.lora_variant or module.use_dora.get(name):
        return "uses DoRA"
    if module.lora_bias.get(name):
        return "has a bias in its LoRA pair"
    bias = module.base_layer.bias
    if bias is not None and (bias.requires_grad or bias.dtype != dtype):
        return "has a trained bias" if bias.requires_grad else f"has a bias in {bias.dtype}"
    if module.base_layer.compute_dtype not in (None, dtype) or module.base_layer.weight.quant_state.dtype != dtype:
        return f"does not compute in {dtype}"
    return None


def lora_linears(modules: Sequence[Any]) -> list[LoraLinear] | None:
    """The layers as they are in this pass; None where one of their adapters is switched off or merged."""
    linears = []
    for module in modules:
        if module.disable_adapters or module.merged or len(module.lora_A) != 1:
            return None
        (name,) = module.lora_A
        if module.active_adapters != [name]:
            return None
        drop = module.lora_dropout[name]
        dropout = drop.p if isinstance(drop, torch.nn.Dropout) and drop.training else 0.0
        frozen = FrozenLinear(module.base_layer, module.scaling[name], dropout)
        linears.append(LoraLinear(frozen, module.lora_A[name].weight, module.lora_B[name].weight))
    return linears


def kept_inputs(x: torch.Tensor, dropout: float) -> torch.Tensor | None:
    """Which numbers of ``x`` dropout keeps, drawn as ``torch.nn.functional.dropout`` draws on a CPU; None for all."""
    if not dropout:
        return None
    return torch.empty_like(x).bernoulli_(1 - dropout).bool()


def dropped(x: torch.Tensor, kept: torch.Tensor | None, dropout: float) -> torch.Tensor:
    """``x`` without what dropout takes out, scaled to the same mean."""
    return x if kept is None else (x * kept).div_(1 - dropout)
