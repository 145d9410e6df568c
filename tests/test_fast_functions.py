"""The fused functions' gradients against finite differences and torch's own formulas, in fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from qlora_kit.fast.head import FastHead
from qlora_kit.fast.linear_group import apply_group
from qlora_kit.fast.lora_layers import LoraLinear
from qlora_kit.fast.mlp import swiglu_and_down
from qlora_kit.fast.norm import DeferredNorm, PendingNorm
from qlora_kit.fast.unpadding import Rows


@dataclass(frozen=True)
class Dense:
    """A frozen layer with a dense weight: finite differences need more digits than bitsandbytes computes with."""

    matrix: torch.Tensor
    bias: torch.Tensor | None
    scaling: float
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64

    def weight(self) -> torch.Tensor:
        return self.matrix


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def numbers(*shape: int, trained: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=trained)


def linear(out_features: int, in_features: int, r: int, *, bias: bool = True, scaling: float = 0.7) -> LoraLinear:
    frozen: Any = Dense(numbers(out_features, in_features), numbers(out_features) if bias else None, scaling)
    return LoraLinear(frozen, numbers(r, in_features, trained=True), numbers(out_features, r, trained=True))


def reference(x: torch.Tensor, layer: LoraLinear) -> torch.Tensor:
    """By the definition."""
    whole = layer.frozen.weight() + layer.frozen.scaling * layer.b @ layer.a
    return torch.nn.functional.linear(x, whole, layer.frozen.bias)


@pytest.mark.parametrize("normed", [True, False])
def test_a_group_of_layers(normed: bool) -> None:
    layers = [linear(5, 6, 2), linear(3, 6, 1, bias=False), linear(4, 6, 3, scaling=1.5)]
    x, weight = numbers(2, 3, 6, trained=True), numbers(6)
    pairs = [tensor for layer in layers for tensor in (layer.a, layer.b)]

    def group(hidden: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return apply_group(PendingNorm(hidden, weight, 1e-5) if normed else hidden, layers)

    inner = torch.nn.functional.rms_norm(x, (6,), weight, eps=1e-5) if normed else x
    for found, layer in zip(group(x), layers, strict=True):
        torch.testing.assert_close(found, reference(inner, layer))
    assert torch.autograd.gradcheck(group, (x, *pairs))


def test_swiglu_and_down_proj() -> None:
    down = linear(4, 6, 2)
    gate, up = numbers(2, 3, 6, trained=True), numbers(2, 3, 6, trained=True)

    def mlp(gate: torch.Tensor, up: torch.Tensor, *unused: torch.Tensor) -> torch.Tensor:
        return swiglu_and_down(gate, up, down)

    torch.testing.assert_close(mlp(gate, up), reference(torch.nn.functional.silu(gate) * up, down))
    assert torch.autograd.gradcheck(mlp, (gate, up, down.a, down.b))


def test_norm_that_is_put_off() -> None:
    norm: Any = torch.nn.Module()
    norm.weight, norm.variance_epsilon = torch.nn.Parameter(numbers(6), requires_grad=False), 1e-3
    x = numbers(3, 6)
    expected = torch.nn.functional.rms_norm(x, (6,), norm.weight, eps=1e-3)
    torch.testing.assert_close(DeferredNorm(norm)(x).normalised(), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tile", [8, 3 * 11])
def test_head_and_loss(monkeypatch: pytest.MonkeyPatch, bias: bool, tile: int) -> None:
    """Of hidden states (2, 4, 5) and 11 tokens; rows of logits one at a time, and three."""
    monkeypatch.setattr("qlora_kit.fast.head.TILE_LOGITS", tile)
    head = FastHead(torch.nn.Linear(5, 11, bias=bias, dtype=torch.float64).requires_grad_(False))
    hidden = numbers(2, 4, 5, trained=True)
    labels = torch.tensor([[3, -100, 10], [0, 7, -100]])
    rows = Rows(labels, torch.tensor([0, 4]))

    def log_probs(hidden: torch.Tensor) -> torch.Tensor:
        with head.scoring(rows):
            return head(hidden)

    logits = head(hidden)[:, :-1]
    distribution = torch.distributions.Categorical(logits=logits)
    kept = labels != -100
    expected = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(log_probs(hidden), expected)
    entropy, is_top1 = head.scores()
    torch.testing.assert_close(entropy, distribution.entropy() * kept)
    assert torch.equal(is_top1, (logits.argmax(-1) == labels) & kept)
    assert torch.autograd.gradcheck(log_probs, (hidden,))
    weights = numbers(2, 3)  # as DFT weighs tokens, or a scaled loss
    (mine,) = torch.autograd.grad((log_probs(hidden) * weights).sum(), hidden)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), hidden)
    torch.testing.assert_close(mine, theirs)
