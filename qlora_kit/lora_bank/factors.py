"""The factors of one adapter in host memory: an adapter that passed the gate in, scaled pairs and sums of them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from qlora_kit.adapter_loading import adapter_tensors
from qlora_kit.adapters import AdapterFiles, AdapterSnapshot

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraFactors:
    """The pairs of an adapter, or of a weighted sum of adapters.

    Attributes:
        pairs: The base's module name to A, (r, in_features), and to B times its scale, transposed: (r, out_features).
            Both fp32. A layer's change is ``x @ A.T @ B``.
    """

    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @cached_property
    def bytes(self) -> int:
        """What they take in host memory."""
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)


def can_be_banked(files: AdapterFiles) -> bool:
    """Whether an adapter is LoRA pairs and nothing else; DoRA, biases, saved modules and trained tokens need PEFT."""
    return not files.config.use_dora and not files.extra_tensors and not files.base_tensors


def read_factors(adapter: AdapterSnapshot) -> LoraFactors:
    """The pairs of ``adapter`` (one that ``can_be_banked``), with alpha/r or rsLoRA's alpha/√r in B."""
    tensors = adapter_tensors(adapter)
    pairs = {}
    for module in adapter.files.pairs:
        a = tensors[f"{_PREFIX}{module}.lora_A.weight"].float()  # (r, in)
        b = tensors[f"{_PREFIX}{module}.lora_B.weight"].float()  # (out, r)
        scaled = b.t() * adapter.files.config.scaling_of(module)  # (r, out)
        pairs[module] = (a.clone(), scaled.contiguous())  # the snapshot's bytes need not stay
    return LoraFactors(pairs)


def weighted_sum(parts: Sequence[tuple[LoraFactors, float]]) -> LoraFactors:
    """Factors whose change is exactly the weighted sum of the parts' changes: ranks stand beside each other."""
    import torch

    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    pairs: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for factors, weight in parts:
        for module, (a, b) in factors.pairs.items():
            many_a, many_b = pairs.setdefault(module, ([], []))
            many_a.append(a)
            many_b.append(b * weight)
    return LoraFactors({module: (torch.cat(many_a), torch.cat(many_b)) for module, (many_a, many_b) in pairs.items()})
