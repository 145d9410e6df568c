"""``combine_adapters``: adapters and weights in, one adapter of the store out, with its own contract and scores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter_loading import adapter_tensors
from qlora_kit.adapters import (
    AdapterCard,
    AdapterContract,
    AdapterFiles,
    AdapterStore,
    CombinedFrom,
    CombinedPart,
    check_adapter_folder,
    library_versions,
)
from qlora_kit.adapters.contract_file import COMBINED
from qlora_kit.adapters.gate import CONFIG_FILE, WEIGHTS_FILE
from qlora_kit.adapters.trained_base import read_trained_base
from qlora_kit.base_files import resolve_base
from qlora_kit.combining.layers import CombinedLayer, Factors, Recipe, combine_layer
from qlora_kit.combining.planning import CheckedPart, CombinationPlan, Part, Wishes, plan_combination
from qlora_kit.combining.scoring import TaskScore, as_metrics, score_combination
from qlora_kit.errors import AdapterError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Combination:
    """A combination that is in the store.

    Attributes:
        card: As it lies there.
        contract: Its contract.
        layers: How many layers it adapts.
        ranks: The smallest and the largest rank of a layer.
        difference: Frobenius norm of combination minus weighted sum of the parts, over the norm of the sum, per layer:
            the mean over all layers; 0 is exact.
        largest_difference: The largest of them.
        scores: Parts and combination on each part's task.
        notes: What the user should know, a sentence each.
    """

    card: AdapterCard
    contract: AdapterContract
    layers: int
    ranks: tuple[int, int]
    difference: float
    largest_difference: float
    scores: tuple[TaskScore, ...]
    notes: tuple[str, ...]


def combine_adapters(
    parts: Sequence[Part],
    store: AdapterStore,
    wishes: Wishes,
    *,
    name: str,
    base: str | None = None,
    replace_old: bool = False,
    score: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Combination:
    """Combine adapters of one base into one through PEFT's ``add_weighted_adapter``, measure it, and publish it.

    Args:
        parts: The adapters, by name in ``store`` or folder, and their weights.
        store: Where the combination is published.
        wishes: The method and its settings.
        name: What it will be called.
        base: To score on, where the contracts' own lies elsewhere now.
        replace_old: Replace another adapter of that name.
        score: Score parts and combination on the validation rows of each part's task, for which the base is loaded.
        progress: Told what is being done.

    Raises:
        ConfigError: A setting is impossible.
        AdapterError: An adapter is unsound or cannot be combined with the others, or the name is taken.
        BaseModelError: The base cannot be loaded to score on.
        GuardError: PEFT's result is not what the method must give; nothing is published.
        OutputError: The store cannot be written to.
    """
    tell = progress if progress is not None else _tell_nobody
    plan = plan_combination(parts, store, wishes, name=name, replace_old=replace_old)
    if score and base is not None:
        _require_base(plan, base)
    tell(f"combining {len(plan.modules)} layers")
    layers = _combine_layers(plan)
    with tempfile.TemporaryDirectory(prefix="qlora-kit-combine-") as place:
        folder = Path(place) / name
        _write_adapter(plan, layers, folder)
        contract = _contract(plan)
        contract.save(folder)
        check_adapter_folder(folder)
        scores: tuple[TaskScore, ...] = ()
        notes: tuple[str, ...] = ("not scored, as was asked for",)
        if score:
            scores, notes = score_combination(plan, folder, base=base, progress=tell)
        differences = [layer.difference for layer in layers.values()]
        mean = sum(differences) / len(differences)
        metrics = {**as_metrics(scores, name), "difference_from_weighted_sum": mean}
        contract = replace(contract, metrics=metrics)
        card = store.add(folder, name, replace=replace_old, contract=contract)
    ranks = [layer.factors.a.shape[0] for layer in layers.values()]
    return Combination(
        card=card,
        contract=contract,
        layers=len(layers),
        ranks=(min(ranks), max(ranks)),
        difference=mean,
        largest_difference=max(differences),
        scores=scores,
        notes=(*plan.notes, *notes),
    )


def _tell_nobody(text: str) -> None:
    pass


def _require_base(plan: CombinationPlan, base: str) -> None:
    """The engine compares the rest; a trained base would be quantized a second time there.

    Raises:
        AdapterError: It is one.
    """
    ref = resolve_base(base)
    if read_trained_base(ref.path) is not None:
        what = f"{ref.path}: is the trained base, which would be quantized again to be scored on"
        fix = f"give {plan.parts[0].contract.base.id}, or leave --base out"
        raise AdapterError(what, expected="the base that the adapters were trained on", fix=fix)


def _combine_layers(plan: CombinationPlan) -> dict[str, CombinedLayer]:
    import torch

    recipe = Recipe(plan.wishes.method, plan.wishes.rank, plan.wishes.density)
    tensors = {part.name: adapter_tensors(part.snapshot) for part in plan.parts}
    layers = {}
    with torch.random.fork_rng(devices=[]):
        if plan.wishes.seed is not None:
            torch.manual_seed(plan.wishes.seed)
        for module in plan.modules:
            parts = plan.parts_of(module)
            factors = [_factors(part, module, tensors[part.name]) for part in parts]
            layers[module] = combine_layer(factors, [part.weight for part in parts], recipe, name=module)
    return layers


def _factors(part: CheckedPart, module: str, tensors: Mapping[str, torch.Tensor]) -> Factors:
    a, b = (tensors[name].float() for name in part.files.pair_tensors(module))
    return Factors(a, b, part.files.config.scaling_of(module))


def _write_adapter(plan: CombinationPlan, layers: Mapping[str, CombinedLayer], folder: Path) -> None:
    """A PEFT folder: every layer by its full name, its factors scaled by 1."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder.mkdir()
    ranks = {module: layer.factors.a.shape[0] for module, layer in layers.items()}
    values = list(ranks.values())
    r = max(set(values), key=values.count)
    others = {module: rank for module, rank in ranks.items() if rank != r}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=plan.parts[0].contract.base.id,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        target_modules=sorted(ranks),
        rank_pattern=others,
        alpha_pattern=others,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for module, layer in layers.items():
        a, b = AdapterFiles.pair_tensors(module)
        tensors[a], tensors[b] = layer.factors.a, layer.factors.b * layer.factors.scaling
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"PEFT wrote no {CONFIG_FILE}")


def _contract(plan: CombinationPlan) -> AdapterContract:
    """The parts' own in what they agree on; what they do not is left open."""
    contracts = [part.contract for part in plan.parts]
    first = contracts[0]
    limits = [contract.generation.get("max_new_tokens") for contract in contracts]
    known = [limit for limit in limits if limit is not None]
    tasks = list(dict.fromkeys(contract.task for contract in contracts))
    prompts = {contract.system_prompt or "" for contract in contracts}
    wishes = plan.wishes
    return replace(
        first,
        system_prompt=first.system_prompt if len(prompts) == 1 else None,
        generation={"do_sample": False, **({"max_new_tokens": max(known)} if known else {})},
        task="+".join(tasks),
        metric_names=first.metric_names if len(tasks) == 1 else (),
        data=tuple(dict.fromkeys(file for contract in contracts for file in contract.data)),
        config_sha256=None,
        versions=library_versions(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kit_version=version("qlora-kit"),
        metrics={},
        name=plan.name,
        origin=COMBINED,
        not_measured=tuple(dict.fromkeys(key for contract in contracts for key in contract.not_measured)),
        continued_from=None,
        combined_from=CombinedFrom(
            method=wishes.method,
            parts=tuple(CombinedPart(part.name, part.sha256, part.weight) for part in plan.parts),
            density=wishes.density,
            seed=wishes.seed,
        ),
    )


def to_json(found: Combination) -> dict[str, Any]:
    """The keys beside those of the card: method, parts, ranks, distance, scores, notes."""
    combined = found.contract.combined_from
    if combined is None:
        raise ValueError("a combination says what it was made of")
    return {
        "method": combined.method,
        "parts": [{"name": part.name, "weight": part.weight} for part in combined.parts],
        "layers": found.layers,
        "ranks": list(found.ranks),
        "difference_from_weighted_sum": found.difference,
        "largest_difference_from_weighted_sum": found.largest_difference,
        "scores": [vars(score) for score in found.scores],
        "notes": list(found.notes),
    }
