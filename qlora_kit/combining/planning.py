"""Refuses what cannot be combined before a weight is touched: names, weights and a method in, checked parts out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.adapters import (
    AdapterContract,
    AdapterFiles,
    AdapterSnapshot,
    AdapterStore,
    BaseFacts,
    check_name,
    read_adapter,
    weights_sha256,
)
from qlora_kit.adapters.lora_setting_kinds import MAX_RANK
from qlora_kit.adapters.mixing import split_weight
from qlora_kit.combining.layers import DRAWN, METHODS, PRUNING, SAME_RANK, Method
from qlora_kit.errors import AdapterError, ConfigError, Fault
from qlora_kit.safetensors_header import shown
from qlora_kit.suggest import advice

DEFAULT_DENSITY = 0.5
DEFAULT_SEED = 0
MAX_SEED = 2**32 - 1
MAX_PARTS = 16


@dataclass(frozen=True)
class Part:
    """An adapter to combine: a store name or a folder, and its weight."""

    adapter: str
    weight: float = 1.0


@dataclass(frozen=True)
class Wishes:
    """How adapters are to be combined.

    Attributes:
        method: One of ``METHODS``.
        rank: The most that ``svd`` gives a layer; None for the largest of its parts.
        density: Share of the values that ``ties`` and ``dare_ties`` keep; None for a half.
        seed: Of the values that ``dare_ties`` drops; None for 0.
    """

    method: Method = "cat"
    rank: int | None = None
    density: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class CheckedPart:
    """A part that passed every check.

    Attributes:
        name: Of its folder.
        folder: Where it lies.
        weight: Its weight.
        snapshot: Its files in memory.
        contract: Its contract.
        sha256: Of its weights' file.
    """

    name: str
    folder: Path
    weight: float
    snapshot: AdapterSnapshot
    contract: AdapterContract
    sha256: str

    @property
    def files(self) -> AdapterFiles:
        """What the gate found."""
        return self.snapshot.files


@dataclass(frozen=True)
class CombinationPlan:
    """A combination that passed every check.

    Attributes:
        name: Of the adapter that it becomes.
        wishes: How; density and seed filled in where the method has them.
        parts: In the order given.
        modules: The layers that any of them adapts, sorted.
        notes: What the user should know, a sentence each.
    """

    name: str
    wishes: Wishes
    parts: tuple[CheckedPart, ...]
    modules: tuple[str, ...]
    notes: tuple[str, ...]

    def parts_of(self, module: str) -> tuple[CheckedPart, ...]:
        """Those that adapt ``module``."""
        return tuple(part for part in self.parts if module in part.files.pairs)


def parse_part(text: str) -> Part:
    """``NAME:WEIGHT``, or ``NAME`` with the weight 1.

    Raises:
        ConfigError: The weight is no number other than 0.
    """
    name, weight = split_weight(text)
    if not name or not _is_weight(weight):
        raise ConfigError(
            f"{text!r} names no adapter with a weight",
            expected="NAME:WEIGHT, the weight a number other than 0, such as sentiment:0.7",
            fix="correct it; without :WEIGHT the weight is 1",
        )
    return Part(name, weight)


def plan_combination(
    parts: Sequence[Part], store: AdapterStore, wishes: Wishes, *, name: str, replace_old: bool
) -> CombinationPlan:
    """Check the method's settings, the name, and the adapters against each other; read them.

    Raises:
        ConfigError: A setting is impossible, or of another method.
        AdapterError: The name is not allowed or taken; an adapter is unsound, of a kind that cannot be combined, or
            belongs to another base than the first.
        OutputError: The store cannot be written to.
    """
    wishes = _checked_wishes(wishes, parts)
    check_name(name)
    folders = [store.get(part.adapter) for part in parts]
    _refuse_repetition(parts, folders, name)
    store.require_place(folders[0], name, replace=replace_old)
    checked = tuple(_read(part, folder) for part, folder in zip(parts, folders, strict=True))
    faults = [fault for part in checked[1:] for fault in _differences(checked[0], part)]
    faults += _twin_faults(checked)
    faults += _rank_faults(checked, wishes)
    if faults:
        raise AdapterError.of(faults)
    modules = tuple(sorted({module for part in checked for module in part.files.pairs}))
    return CombinationPlan(name, wishes, checked, modules, _notes(checked, wishes))


def _is_weight(weight: float) -> bool:
    return math.isfinite(weight) and weight != 0


def _checked_wishes(wishes: Wishes, parts: Sequence[Part]) -> Wishes:
    method = wishes.method
    if method not in METHODS:
        raise ConfigError(
            f"--method is {method!r}", expected=f"one of {', '.join(METHODS)}", fix=advice(str(method), METHODS)
        )
    faults = [
        Fault(f"{part.adapter!r} has the weight {part.weight}", "a number other than 0", "give another weight")
        for part in parts
        if not _is_weight(part.weight)
    ]
    if not 1 <= len(parts) <= MAX_PARTS:
        faults.append(Fault(f"{len(parts)} adapters are given", f"1 to {MAX_PARTS}", "name them: A:0.7 B:0.3"))
    if len(parts) == 1 and method not in ("linear", "cat"):
        fix = "name a second adapter, or take --method cat"
        faults.append(Fault(f"--method {method} of one adapter", "at least two: PEFT only scales a single one", fix))
    if wishes.rank is not None and (method != "svd" or not 1 <= wishes.rank <= MAX_RANK):
        fix = "take --method svd, or leave --rank out"
        faults.append(Fault(f"--rank {wishes.rank} with --method {method}", f"1 to {MAX_RANK}, with svd alone", fix))
    if wishes.density is not None and (method not in PRUNING or not 0 < wishes.density <= 1):
        fix = f"take --method {PRUNING[0]}, or leave --density out"
        expected = f"above 0 and at most 1, with {' or '.join(PRUNING)} alone"
        faults.append(Fault(f"--density {wishes.density} with --method {method}", expected, fix))
    if wishes.seed is not None and (method != DRAWN or not 0 <= wishes.seed <= MAX_SEED):
        fix = f"take --method {DRAWN}, or leave --seed out"
        faults.append(
            Fault(f"--seed {wishes.seed} with --method {method}", f"0 to {MAX_SEED}, with {DRAWN} alone", fix)
        )
    if method in PRUNING:
        negative = [part.adapter for part in parts if part.weight < 0]
        if negative:
            what = f"--method {method} with a weight below 0 for {', '.join(negative)}"
            fix = "take cat or svd to subtract an adapter"
            faults.append(Fault(what, "weights above 0: signs are elected before they are weighted", fix))
    if faults:
        raise ConfigError.of(faults)
    if method in PRUNING and wishes.density is None:
        wishes = replace(wishes, density=DEFAULT_DENSITY)
    if method == DRAWN and wishes.seed is None:
        wishes = replace(wishes, seed=DEFAULT_SEED)
    return wishes


def _refuse_repetition(parts: Sequence[Part], folders: Sequence[Path], name: str) -> None:
    if len({folder.resolve() for folder in folders}) < len(folders):
        named = ", ".join(part.adapter for part in parts)
        raise AdapterError(f"{named}: one is named twice", expected="each adapter once", fix="add its weights up")
    names = [folder.name for folder in folders]
    twins = sorted({one for one in names if names.count(one) > 1})
    if twins:
        what = f"two of the adapters are called {twins[0]!r}"
        raise AdapterError(what, expected="a name for each", fix="rename one of the two folders")
    if name in names:
        what = f"{name!r} is the name of one of the parts"
        raise AdapterError(what, expected="a name of its own", fix="give another one with --name")


def _read(part: Part, folder: Path) -> CheckedPart:
    snapshot = read_adapter(lambda: folder, _require_combinable)
    if snapshot.contract is None:  # told above
        raise ValueError(folder)
    return CheckedPart(folder.name, folder, part.weight, snapshot, snapshot.contract, weights_sha256(folder))


def _require_combinable(files: AdapterFiles, contract: AdapterContract | None) -> None:
    """Refuse what a weighted sum of B·A does not describe.

    Raises:
        AdapterError: With every reason.
    """
    reasons = []
    if contract is None:
        fix = "write one: `qlora-kit adapters adopt`"
        reasons.append(Fault(f"{files.folder}: has no contract, so its base is not known", "a contract", fix))
    config = files.config
    kinds = {
        "use_dora": (config.use_dora, "DoRA scales each row of base + B·A, which is no sum of adapters"),
        "modules_to_save": (bool(config.modules_to_save), "it brings whole modules, of which there can be one each"),
        "trainable_token_indices": (bool(config.trainable_token_indices), "it brings trained rows of the embedding"),
        "bias": (bool(files.base_tensors), "it brings biases of the base"),
    }
    fix = "train it without, or serve the adapters side by side"
    for key, (found, reason) in kinds.items():
        if found:
            reasons.append(Fault(f"{files.folder}: {key}: {reason}", "an adapter of B·A alone", fix))
    if reasons:
        raise AdapterError.of(reasons)


def _differences(first: CheckedPart, other: CheckedPart) -> list[Fault]:
    """What of the other's base, quantization, chat template or stop tokens is not the first one's."""
    contract = other.contract
    facts = BaseFacts(
        id=contract.base.id,
        revision=contract.base.revision,
        fingerprint=contract.base.fingerprint,
        chat_template_sha256=contract.chat_template_sha256,
        stop_token_ids=contract.stop_token_ids,
        quantization=contract.quantization,
    )
    return [
        Fault(
            f"{first.name} and {other.name} do not belong together: {fault.what}",
            "adapters that were trained on one base in one way",
            "combine adapters of one base",
        )
        for fault in first.contract.mismatches(facts)
    ]


def _twin_faults(parts: Sequence[CheckedPart]) -> list[Fault]:
    """Parts of the same weights, which count as one adapter, or cancel each other out."""
    faults: list[Fault] = []
    seen: dict[str, str] = {}
    for part in parts:
        if part.sha256 in seen:
            what = f"{seen[part.sha256]} and {part.name} hold the same weights"
            faults.append(Fault(what, "each adapter once", "name one of them, with the weights added up"))
        seen.setdefault(part.sha256, part.name)
    return faults


def _rank_faults(parts: Sequence[CheckedPart], wishes: Wishes) -> list[Fault]:
    faults = []
    different: dict[str, dict[str, int]] = {}
    largest = 0
    for module in sorted({module for part in parts for module in part.files.pairs}):
        pairs = {part.name: part.files.pairs[module] for part in parts if module in part.files.pairs}
        largest = max(largest, sum(pair.r for pair in pairs.values()))
        if len({(pair.out_features, pair.in_features) for pair in pairs.values()}) > 1:
            what = f"{shown(module)} has other sizes in one adapter than in another"
            return [Fault(what, "layers of one base", "combine adapters of one base")]
        if len({pair.r for pair in pairs.values()}) > 1:
            different[module] = {name: pair.r for name, pair in pairs.items()}
    if wishes.method in SAME_RANK and different:
        first = next(iter(different))
        told = ", ".join(f"{name} has {r}" for name, r in different[first].items())
        what = f"--method {wishes.method}: ranks differ in {len(different)} layers; in {shown(first)} {told}"
        faults.append(Fault(what, "one rank, since A and B are added up by themselves", "take cat or svd"))
    if wishes.method == "cat" and largest > MAX_RANK:
        what = f"--method cat: the ranks add up to {largest}"
        faults.append(Fault(what, f"at most {MAX_RANK}", "take svd with --rank"))
    if wishes.rank is not None and wishes.rank > largest:
        what = f"--rank {wishes.rank}: the ranks of the parts add up to {largest}, and the sum has no more"
        faults.append(Fault(what, f"at most {largest}", "take --method cat, which is exact, or a smaller rank"))
    return faults


def _notes(parts: Sequence[CheckedPart], wishes: Wishes) -> tuple[str, ...]:
    notes = []
    prompts = {part.contract.system_prompt or "" for part in parts}
    if len(prompts) > 1:
        notes.append(
            "the parts were trained with different system prompts, so the combination has none: give each request the "
            "one of its task"
        )
    if wishes.method == "linear" and len(parts) > 1:
        notes.append("linear adds up A and B by themselves: products of one part's B and another's A come in")
    alone = {module for part in parts for module in part.files.pairs}
    for part in parts:
        missing = len(alone - part.files.pairs.keys())
        if missing:
            notes.append(f"{part.name} does not adapt {missing} of {len(alone)} layers; there the others count alone")
    return tuple(notes)
