"""Combines the factors of one layer through PEFT's ``add_weighted_adapter``, and says how far that is from the sum.

PEFT gets one layer at a time, so that each keeps a rank of its own, and each part's factor before B·A as its alpha, so
that rsLoRA and alpha patterns count as they were trained: PEFT 0.21 itself gives the combination the settings of its
first adapter, whose rsLoRA then scales all of it once more.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from qlora_kit.errors import GuardError

if TYPE_CHECKING:
    import torch

Method = Literal["linear", "cat", "svd", "ties", "dare_ties"]
METHODS: tuple[Method, ...] = get_args(Method)
PRUNING: tuple[Method, ...] = ("ties", "dare_ties")
DRAWN: Method = "dare_ties"
SAME_RANK: tuple[Method, ...] = ("linear", "ties", "dare_ties")
TOLERANCE = 1e-5
"""Of an exact combination in fp32, relative to the norms of its weighted parts: their sum may nearly cancel out."""
_NEW = "combination"


@dataclass(frozen=True)
class Factors:
    """One adapted layer: a is (r, in_features), b (out_features, r), both fp32; ``scaling`` stands before b·a."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Recipe:
    """How layers are combined.

    Attributes:
        method: PEFT's ``combination_type``.
        rank: Of ``svd``: the most a layer may have; None for the largest of its parts.
        density: Share of the values that ``ties`` and ``dare_ties`` keep.
    """

    method: Method
    rank: int | None = None
    density: float | None = None


@dataclass(frozen=True)
class CombinedLayer:
    """One layer of a combination, and its distance from the weighted sum of its parts.

    Attributes:
        factors: Its factors; ``scaling`` is 1.
        difference: Frobenius norm of combination minus weighted sum, over the norm of the sum; 0 is exact.
    """

    factors: Factors
    difference: float


def combine_layer(parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe, *, name: str) -> CombinedLayer:
    """Combine the parts of one layer.

    ``cat`` stacks the factors: exactly the weighted sum. ``svd`` is the nearest to it of a rank (PEFT's, on the core
    that is left when orthogonal factors are taken off both sides: a matrix of the summed ranks' size instead of the
    layer's). ``linear`` adds up A and B by themselves, so that B_i·A_j of different parts come in. ``ties``
    (https://arxiv.org/abs/2306.01708) and ``dare_ties`` (https://arxiv.org/abs/2311.03099) prune A and B by themselves.

    Args:
        parts: Of the adapters that adapt this layer.
        weights: One for each.
        recipe: How.
        name: The layer, for messages.

    Raises:
        GuardError: PEFT's result is not what the method must give.
    """
    alone = _through_peft(parts[:1], [1.0], Recipe("linear"))
    _require(name, "one adapter at weight 1.0 is not itself", _difference(alone, parts[:1], [1.0]))
    share = _share_left(parts, weights)
    if recipe.method == "svd" and len(parts) > 1:
        combined, lost = _smallest_loss(parts, weights, recipe)
        difference = _difference(combined, parts, weights)
        _require(name, "svd is not the nearest combination of its rank", abs(difference - lost) * share)
    else:
        combined = _through_peft(parts, weights, recipe)
        difference = _difference(combined, parts, weights)
        if recipe.method == "cat" or len(parts) == 1:
            _require(name, "it is not the weighted sum of its parts", difference * share)
    return CombinedLayer(combined, difference)


def _require(name: str, what: str, error: float) -> None:
    if not error <= TOLERANCE:  # written so that NaN is wrong
        raise GuardError(
            f"{name}: {what}: off by {error:.2g} of its size",
            expected=f"at most {TOLERANCE:.0e}",
            fix="use the tested version of PEFT (`qlora-kit doctor` names it); nothing was saved",
        )


def _through_peft(parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> Factors:
    """PEFT's combination of one layer, held by a model of that layer alone; its base weight is never looked at."""
    import torch
    from peft import LoraConfig, get_peft_model

    out_features, in_features = parts[0].b.shape[0], parts[0].a.shape[1]
    holder = torch.nn.Module()
    holder.layer = torch.nn.utils.skip_init(torch.nn.Linear, in_features, out_features, bias=False)
    names = [f"part-{index}" for index in range(len(parts))]
    configs = [
        LoraConfig(
            r=part.a.shape[0],
            lora_alpha=part.scaling * part.a.shape[0],
            target_modules=["layer"],
            init_lora_weights=False,
            inference_mode=True,
        )
        for part in parts
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of a model that is not transformers'
        model = get_peft_model(holder, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        layer = model.base_model.model.layer
        for name, part in zip(names, parts, strict=True):
            layer.lora_A[name].weight.data = part.a.clone()
            layer.lora_B[name].weight.data = part.b.clone()
        model.add_weighted_adapter(
            names,
            list(weights),
            _NEW,
            combination_type=recipe.method,
            svd_rank=recipe.rank,
            density=recipe.density,
        )
    a, b = layer.lora_A[_NEW].weight.data, layer.lora_B[_NEW].weight.data
    return Factors(a.contiguous(), b.contiguous(), layer.scaling[_NEW])


def _smallest_loss(parts: Sequence[Factors], weights: Sequence[float], recipe: Recipe) -> tuple[Factors, float]:
    """PEFT's ``svd`` on the core between orthogonal factors, and what a rank must lose of the sum's norm."""
    import torch

    left = torch.linalg.qr(torch.cat([part.b for part in parts], dim=1).double())[0]  # (out, k)
    right = torch.linalg.qr(torch.cat([part.a for part in parts], dim=0).double().T)[0]  # (in, m)
    cores = [
        Factors((part.a.double() @ right).float(), (left.T @ part.b.double()).float(), part.scaling) for part in parts
    ]
    wanted = max(part.a.shape[0] for part in parts) if recipe.rank is None else recipe.rank
    rank = min(wanted, left.shape[1], right.shape[1])
    found = _through_peft(cores, weights, Recipe("svd", rank=rank))
    core = sum(
        weight * part.scaling * (part.b.double() @ part.a.double()) for part, weight in zip(cores, weights, strict=True)
    )
    values = torch.linalg.svdvals(core)
    lost = float(values[rank:].norm() / values.norm()) if float(values.norm()) else 0.0
    a, b = (found.a.double() @ right.T).float(), (left @ found.b.double()).float()
    return Factors(a.contiguous(), b.contiguous(), found.scaling), lost


def _difference(combined: Factors, parts: Sequence[Factors], weights: Sequence[float]) -> float:
    """Frobenius norm of combination minus weighted sum over that of the sum, from the factors alone, in fp64."""
    import torch

    scaled = [weight * part.scaling * part.b.double() for part, weight in zip(parts, weights, strict=True)]
    rows = [part.a.double() for part in parts]
    total = _norm(torch.cat(scaled, dim=1), torch.cat(rows, dim=0))
    left = torch.cat([combined.scaling * combined.b.double(), *(-part for part in scaled)], dim=1)
    off = _norm(left, torch.cat([combined.a.double(), *rows], dim=0))
    if total == 0:
        return 0.0 if off == 0 else float("inf")
    return off / total


def _share_left(parts: Sequence[Factors], weights: Sequence[float]) -> float:
    """Norm of the weighted sum over the norms of its weighted parts, at most 1: what they do not cancel out."""
    import torch

    scaled = [weight * part.scaling * part.b.double() for part, weight in zip(parts, weights, strict=True)]
    norms = [_norm(b, part.a.double()) for b, part in zip(scaled, parts, strict=True)]
    total = _norm(torch.cat(scaled, dim=1), torch.cat([part.a.double() for part in parts], dim=0))
    return total / sum(norms) if any(norms) else 1.0


def _norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """Of b·a, without forming it: orthogonal factors do not change it. b (out, R), a (R, in)."""
    import torch

    left, right = torch.linalg.qr(b, mode="r")[1], torch.linalg.qr(a.T, mode="r")[1]
    return float((left @ right.T).norm())
