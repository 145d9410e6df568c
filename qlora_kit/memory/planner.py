"""Whether a run fits a card, and what to change: a ``Workload`` and a ``Card`` in, a ``Plan`` out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from qlora_kit.architecture import read_architecture
from qlora_kit.base_files import read_model_config, resolve_description
from qlora_kit.config import RunConfig
from qlora_kit.lora_modules import require_planned_modules
from qlora_kit.memory.cards import CARDS, Card
from qlora_kit.memory.estimate import Estimate, estimate
from qlora_kit.memory.files import file_bytes, merge_memory_bytes
from qlora_kit.memory.optimizers import state_of
from qlora_kit.memory.speed import tokens_per_second
from qlora_kit.memory.workload import Device, Workload, require_no_more_layers, workload_of

SMALL_OPTIMIZER = "paged_adamw_8bit"
ROUND_TOKENS = 64  # a longest max_length is rounded down to a multiple of it
WORTHWHILE = 1.05  # a suggestion has to be this much faster, or take rows this much longer
SAME_SPEED = 0.98  # candidates this near to the fastest count as equally fast; the one with fewer changes wins
_RANKED_BY = CARDS["RTX 4090"]  # where a card's speed is not known; only the order matters
_KEYS = {  # field of Workload -> key of the train section
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "eval_batch_size": "per_device_eval_batch_size",
    "checkpointing": "gradient_checkpointing",
    "checkpointed_layers": "checkpointed_layers",
    "optim": "optim",
    "length": "max_length",
    "embedding_on_host": "embedding_on_host",
}


@dataclass(frozen=True)
class Suggestion:
    """Settings that fit.

    Attributes:
        why: What they are good for.
        changes: Keys of the ``train`` section with their values, only those that differ from the config.
        workload: The run with them.
        peak_bytes: Its predicted peak.
        tokens_per_second: Its ceiling on the card; None where the card's speed is not known.
    """

    why: str
    changes: Mapping[str, Any]
    workload: Workload
    peak_bytes: int
    tokens_per_second: float | None

    @property
    def yaml_lines(self) -> tuple[str, ...]:
        """The changes as lines to paste into a config."""
        return ("train:", *(f"  {key}: {_as_yaml(value)}" for key, value in self.changes.items()))

    def to_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        return {
            "why": self.why,
            "train": dict(self.changes),
            "yaml": "\n".join(self.yaml_lines),
            "peak_bytes": self.peak_bytes,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Plan:
    """A run on a card.

    Attributes:
        workload: The run.
        card: The card.
        estimate: The predicted peak by part.
        longest_max_length: The most tokens a row may have with the other settings as they are; 0 where none fits.
        tokens_per_second: The card's ceiling for it; None where its speed is not known.
        uncheckpointed_layers: Of how many layers the activations may be kept, with the other settings as they are;
            None where not even checkpointing all of them fits.
        suggestions: What to change, the fastest first; empty where the config is as good as any.
        smallest: Where nothing fits: the run with rows as long as they are and all else as small as it goes.
    """

    workload: Workload
    card: Card
    estimate: Estimate
    longest_max_length: int
    tokens_per_second: float | None
    uncheckpointed_layers: int | None
    suggestions: tuple[Suggestion, ...]
    smallest: Suggestion | None

    @property
    def fits(self) -> bool:
        """Whether the predicted peak and its margin are within what the card has free."""
        return self.estimate.needed_bytes <= self.card.free_bytes

    @property
    def least_bytes(self) -> int:
        """What rows of one token need with all else as small as it goes, margin counted: base and adapter, mostly."""
        leanest = _leanest(self.workload, *_smaller_optimizers(self.workload))
        return estimate(leanest.with_(length=1, eval_length=1)).needed_bytes

    @property
    def smallest_card(self) -> Card | None:
        """The card with the least memory that ``smallest`` fits; None where that is none, or not asked for."""
        if self.smallest is None:
            return None
        needed = estimate(self.smallest.workload).needed_bytes
        large = [card for card in CARDS.values() if card.memory_bytes >= needed]
        return min(large, key=lambda card: card.memory_bytes, default=None)

    def to_json(self) -> dict[str, Any]:
        """As ``plan --json`` prints it."""
        return {
            "peak_bytes": self.estimate.peak_bytes,
            "margin_bytes": self.estimate.margin_bytes,
            "fits": self.fits,
            "breakdown": dict(self.estimate.breakdown),
            "longest_max_length": self.longest_max_length,
            "uncheckpointed_layers": self.uncheckpointed_layers,
            "suggestions": [suggestion.to_json() for suggestion in self.suggestions],
            "smallest": None if self.smallest is None else self.smallest.to_json(),
            "smallest_card": None if self.smallest_card is None else self.smallest_card.name,
            "allocated_bytes": self.estimate.allocated_bytes,
            "host_bytes": self.estimate.host_bytes,
            "on_host": dict(self.estimate.on_host),
            "card": self.card.name,
            "card_bytes": self.card.memory_bytes,
            "free_bytes": self.card.free_bytes,
            "tokens_per_second": self.tokens_per_second,
            "trainable_parameters": self.workload.trainable,
            "file_bytes": dict(file_bytes(self.workload)),
            "merge_memory_bytes": dict(merge_memory_bytes(self.workload)),
            "notes": list(self.estimate.notes),
        }


def estimate_memory(config: RunConfig, card: Card, *, device: Device = "cuda") -> Plan:
    """The plan of a config's run on ``card``, from the base's ``config.json`` alone; nothing is loaded.

    Args:
        config: From ``load_config``.
        card: From ``cards.find_card`` or ``cards.card_at_hand``.
        device: ``cpu`` plans for host memory of the card's size.

    Raises:
        BaseModelError: The base is not found, or is of a family whose tensors are not known.
        ConfigError: ``train.checkpointed_layers`` is more than it has, or ``lora`` names modules that it lacks.
    """
    ref = resolve_description(config.model.base, config.model.revision)
    base_config = read_model_config(ref)
    architecture = read_architecture(base_config, where=str(ref.path / "config.json"))
    require_no_more_layers(config.train.checkpointed_layers, architecture.layers, base=ref.id)
    all_in_4bit = config.quantization.load_in_4bit and "quantization_config" not in base_config
    require_planned_modules(ref.id, architecture, config.lora, load_in_4bit=all_in_4bit)
    return make_plan(workload_of(config, architecture, base_config=base_config, device=device, bf16=card.bf16), card)


def make_plan(workload: Workload, card: Card) -> Plan:
    """Estimate ``workload`` and look for what fits ``card`` and is faster, or takes longer rows."""
    fits = _fits(workload, card.free_bytes)
    suggestions = tuple(_suggestions(workload, card, fits=fits))
    leanest = _leanest(_within_context(workload), *_smaller_optimizers(workload))
    least_why = "the least that rows of this length take"
    recomputed = _fewest_recomputed(workload, card.free_bytes)
    return Plan(
        workload=workload,
        card=card,
        estimate=estimate(workload),
        longest_max_length=longest_length(workload, card.free_bytes),
        tokens_per_second=tokens_per_second(workload, card),
        uncheckpointed_layers=None if recomputed is None else len(workload.layers) - recomputed.recomputed,
        suggestions=suggestions,
        smallest=None if fits or suggestions else _suggestion(least_why, workload, leanest, card),
    )


def fastest_that_fits(workload: Workload, card: Card, *, optimizers: Sequence[str] = ()) -> Workload | None:
    """The fastest settings with the same rows in each optimizer step and the same longest row; None where none fits.

    Tried are the divisors of the effective batch as micro-batches, with checkpointing of no layer, of as few as fit and
    of all, with the configured optimizer and ``optimizers``, with the embedding on the device and on the host. The
    validation batch is halved until it fits.
    """
    fitting = [
        candidate
        for candidate in _candidates(workload, tuple(dict.fromkeys((workload.optim, *optimizers))), card.free_bytes)
        if _fits(candidate, card.free_bytes)
    ]
    if not fitting:
        return None
    speeds = [_speed(candidate, card) for candidate in fitting]
    fast = [candidate for candidate, speed in zip(fitting, speeds, strict=True) if speed >= SAME_SPEED * max(speeds)]
    return min(fast, key=lambda candidate: (len(changes(workload, candidate)), estimate(candidate).peak_bytes))


def longest_length(workload: Workload, free_bytes: int) -> int:
    """The longest ``max_length`` that fits into ``free_bytes``, rounded down; at most the base's context."""

    def fits(length: int) -> bool:
        return _fits(workload.with_(length=length), free_bytes)

    most = workload.architecture.context_length
    if fits(most):
        return most
    low, high = 0, most  # `low` fits, or is 0; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if low < ROUND_TOKENS else low - low % ROUND_TOKENS


def changes(before: Workload, after: Workload) -> dict[str, Any]:
    """The keys of the ``train`` section that turn one run into the other."""
    return {key: vars(after)[field] for field, key in _KEYS.items() if vars(after)[field] != vars(before)[field]}


def _suggestions(workload: Workload, card: Card, *, fits: bool) -> Iterator[Suggestion]:
    small = _smaller_optimizers(workload)
    within = _within_context(workload)
    fastest = fastest_that_fits(within, card, optimizers=small)
    if fastest is not None and fastest != workload:
        faster = _speed(fastest, card) >= WORTHWHILE * _speed(workload, card)
        if faster or not fits or within != workload:
            why = "the fastest that fits, with as many rows in each optimizer step"
            yield _suggestion(why, workload, fastest, card)
    leanest = _leanest(within, *small)
    longest = longest_length(leanest, card.free_bytes)
    reached = longest_length(workload, card.free_bytes)  # told anyway
    if (longest > within.length and longest >= WORTHWHILE * reached) or (fastest is None and longest):
        why = "the longest rows that fit"
        yield _suggestion(why, workload, leanest.with_(length=longest), card)


def _within_context(workload: Workload) -> Workload:
    """With rows no longer than the base takes: it never learned what to make of later positions."""
    most = workload.architecture.context_length
    if workload.length <= most:
        return workload
    return workload.with_(length=most, eval_length=min(workload.eval_length, most))


def _fits(workload: Workload, free_bytes: int) -> bool:
    return estimate(workload).needed_bytes <= free_bytes


def _fewest_recomputed(workload: Workload, free_bytes: int) -> Workload | None:
    """The run with as few checkpointed layers as fit, the first ones; None where not even all of them do."""
    none = workload.with_(checkpointing=False, checkpointed_layers=None)
    every = workload.with_(checkpointing=True, checkpointed_layers=None)
    if _fits(none, free_bytes):
        return none
    if not _fits(every, free_bytes):
        return None
    low, high = 0, len(workload.layers)  # `low` does not fit, `high` does
    while high - low > 1:
        middle = (low + high) // 2
        fits = _fits(every.with_(checkpointed_layers=middle), free_bytes)
        low, high = (low, middle) if fits else (middle, high)
    return every if high == len(workload.layers) else every.with_(checkpointed_layers=high)


def _smaller_optimizers(workload: Workload) -> tuple[str, ...]:
    return () if workload.device == "cpu" or _is_small(workload.optim) else (SMALL_OPTIMIZER,)


def _leanest(workload: Workload, *optimizers: str) -> Workload:
    """One row at a time, checkpointing, and if there is one to take the smaller optimizer and the host's memory."""
    return workload.with_(
        batch_size=1,
        accumulation=workload.effective_batch,
        checkpointing=True,
        checkpointed_layers=None,
        eval_batch_size=min(workload.eval_batch_size, 1),
        optim=optimizers[0] if optimizers else workload.optim,
        embedding_on_host=workload.embedding_on_host or _embedding_saves(workload),
    )


def _suggestion(why: str, before: Workload, after: Workload, card: Card) -> Suggestion:
    peak_bytes = estimate(after).peak_bytes
    return Suggestion(why, changes(before, after), after, peak_bytes, tokens_per_second(after, card))


def _candidates(workload: Workload, optimizers: Sequence[str], free_bytes: int) -> Iterator[Workload]:
    rows = workload.effective_batch
    places = (False, True) if _embedding_saves(workload) else (workload.embedding_on_host,)
    for batch_size in (size for size in range(1, rows + 1) if rows % size == 0):
        for optim, on_host in product(optimizers, places):
            candidate = workload.with_(
                batch_size=batch_size, accumulation=rows // batch_size, optim=optim, embedding_on_host=on_host
            )
            fewest = _fewest_recomputed(candidate.with_(eval_batch_size=0), free_bytes)
            if fewest is None:
                continue
            for recomputed in {fewest.checkpointed_layers, None} if fewest.checkpointing else {None}:
                again = candidate.with_(checkpointing=fewest.checkpointing, checkpointed_layers=recomputed)
                yield _with_validation_that_fits(again, free_bytes)


def _with_validation_that_fits(workload: Workload, free_bytes: int) -> Workload:
    """With the validation batch halved until it fits; the training of ``workload`` does."""
    while workload.eval_batch_size > 1 and not _fits(workload, free_bytes):
        workload = workload.with_(eval_batch_size=workload.eval_batch_size // 2)
    return workload


def _speed(workload: Workload, card: Card) -> float:
    known = card.tflops is not None and card.gigabytes_per_second is not None
    return tokens_per_second(workload, card if known else _RANKED_BY) or 0.0


def _embedding_saves(workload: Workload) -> bool:
    """Whether memory of the device is saved with the embedding on the host."""
    return workload.device == "cuda" and workload.embedding_is_movable


def _is_small(optim: str) -> bool:
    state = state_of(optim)
    return state.in_8_bits or state.factored or state.paged or state.moments == 0


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
