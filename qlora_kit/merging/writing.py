"""Writes the merged checkpoint into a folder: the base's tensors one by one, merged where adapted, its small files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint import ShardWriter, TensorSource, torch_dtype
from qlora_kit.data.template_file import read_stop_facts
from qlora_kit.errors import AdapterError, BaseModelError, GuardError
from qlora_kit.merging.arithmetic import four_bit_round_trip, lora_delta
from qlora_kit.merging.base_tensors import read_tensor
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.token_rows import read_trained_rows, with_rows
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    import torch

_GENERATION_FILE = "generation_config.json"
_COPIED_FILES = (
    _GENERATION_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)


@dataclass(frozen=True)
class LoraFactors:
    """One adapted layer: a (r, in_features), b (out_features, r), and the factor before B·A."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class WrittenWeights:
    """What was written: the tensors' size, how many numbers the adapter targets, how many of them it changed."""

    weight_bytes: int
    adapted_weights: int
    changed_weights: int


def read_factors(plan: MergePlan) -> dict[str, LoraFactors]:
    """The adapter's pairs by module.

    Raises:
        AdapterError: Each pair's product is zero and no row is trained: the adapter changes nothing.
    """
    from safetensors import safe_open

    factors = {}
    with safe_open(plan.adapter.weights, framework="pt", device="cpu") as file:
        for module in plan.adapter.pairs:
            a, b = (file.get_tensor(f"base_model.model.{module}.lora_{letter}.weight").float() for letter in "AB")
            factors[module] = LoraFactors(a, b, plan.adapter.config.scaling_of(module))
    if not plan.token_rows and not any(bool((pair.b @ pair.a).any()) for pair in factors.values()):
        raise changes_nothing(plan, "every B·A is zero")
    return factors


def write_weights(
    plan: MergePlan,
    folder: Path,
    *,
    factors: Mapping[str, LoraFactors],
    max_shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> WrittenWeights:
    """Write the base's tensors to ``folder`` as ``plan.specs`` has them, with one tensor at a time in memory.

    Args:
        plan: What to merge.
        folder: An existing folder.
        factors: The adapter's pairs by module.
        max_shard_bytes: Shards hold at most so many bytes of tensors.
        progress: Called with the bytes done and the bytes in all after each tensor.

    Raises:
        AdapterError: No weight is changed after the rounding.
        BaseModelError: A tensor of the base cannot be read or is not finite.
        GuardError: A merged weight is not finite.
    """
    adapted = changed = done_bytes = 0
    total_bytes = sum(spec.size_bytes for spec in plan.specs.values())
    rows = read_trained_rows(plan.adapter, plan.token_rows)
    with (
        TensorSource(plan.base.path) as source,
        ShardWriter(folder, plan.specs, max_shard_bytes=max_shard_bytes) as writer,
    ):
        for name, spec in plan.specs.items():
            tensor = read_tensor(source, name, plan.packed)
            _require_finite(source, name, tensor)
            base_used = _base_used(plan, name, tensor)
            dtype = tensor.dtype if name not in plan.packed else torch_dtype(spec.dtype)
            target = plan.target(name)
            written = base_used.to(dtype)
            if name in rows:
                base_used, written = written, with_rows(written, plan.token_rows[name].ids, rows[name], name)
                adapted += rows[name].numel()
                changed += int((written != base_used).sum())
            if target is not None:
                merged = _merged(base_used, factors[target], dtype, name)
                adapted += merged.numel()
                changed += int((merged != written).sum())
                written = merged
            writer.write(name, written)
            done_bytes += spec.size_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    if not changed:
        raise changes_nothing(plan, "every change is smaller than the rounding of the base's dtype")
    return WrittenWeights(total_bytes, adapted, changed)


def copy_small_files(plan: MergePlan, folder: Path) -> None:
    """Copy configuration, tokenizer, chat template and licence from the base into ``folder``.

    Where the base's generation does not stop at the token that ends a turn by the chat template, the copy's does.
    """
    config = json.loads((plan.base.path / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    for name in _COPIED_FILES:
        path = plan.base.path / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
    stops = read_stop_facts(plan.base.path, config)
    if stops.agree is False:  # of a base that was never taught to end a turn; the adapter is what teaches it
        path = folder / _GENERATION_FILE
        defaults = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, {**defaults, "eos_token_id": [stops.token_id, *stops.generation_ids]})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, in the order of its keys."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _base_used(plan: MergePlan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The weight that the adapter was (or is) added to: fp32 where it is 4-bit in training, else as in the file."""
    is_dequantized = name in plan.packed or not plan.round_trips(name)
    return tensor if is_dequantized else four_bit_round_trip(tensor, plan.quantization)


def _merged(base_used: torch.Tensor, factors: LoraFactors, dtype: torch.dtype, name: str) -> torch.Tensor:
    merged = (base_used.float() + lora_delta(factors.a, factors.b, factors.scaling)).to(dtype)
    if not bool(merged.isfinite().all()):
        raise GuardError(
            f"tensor {shown(name)}: the merged weight is not finite in {dtype}",
            expected="weights within the range of the base's dtype",
            fix="train with a smaller learning rate or lora_alpha, or merge onto a bf16 copy of the base",
        )
    return merged


def _require_finite(source: TensorSource, name: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.isfinite().all()):
        raise BaseModelError(
            f"{source.file(name)}: tensor {shown(name)} holds values that are NaN or infinite",
            expected="finite weights",
            fix="download the base again, or choose another one",
        )


def changes_nothing(plan: MergePlan, reason: str) -> AdapterError:
    """The error for an adapter that is there without any effect."""
    return AdapterError(
        f"{plan.adapter.weights}: the adapter changes nothing: {reason}",
        expected="a trained adapter",
        fix="check that the training ran (loss fell, learning rate above zero), and merge its best checkpoint",
    )
