"""The data check on its own: everything that training does to the rows before a model is loaded, as one report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.base_files import resolve_description
from qlora_kit.config import RunConfig
from qlora_kit.data.ledger import SPLITS
from qlora_kit.data.lengths import Lengths, summarise
from qlora_kit.data.preview import Span, spans
from qlora_kit.data.stop_proof import StopProof, prove_stops
from qlora_kit.data.tokenised_data import TokenisedData, tokenised_data
from qlora_kit.measured_speed import last_speed
from qlora_kit.models import default_device, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        steps: Optimizer steps; with packing, at least so many.
        tokens: Tokens that go through the model, evaluations left out.
        tokens_per_second: As the last run on this base and device measured it; None before the first.
    """

    steps: int
    tokens: int
    tokens_per_second: float | None

    @property
    def seconds(self) -> float | None:
        """How long the training takes at that speed; None where it was not measured."""
        return None if self.tokens_per_second is None else self.tokens / self.tokens_per_second


@dataclass(frozen=True)
class DataCheck:
    """What a config's data are.

    Attributes:
        data: The tokenised rows and their ledger.
        stops: Where answers end.
        estimate: What training on them takes; None where no training row is left.
        lengths: Of each split that has rows, in tokens.
        previews: The first training rows.
    """

    data: TokenisedData
    stops: StopProof
    estimate: Estimate | None
    lengths: dict[str, Lengths]
    previews: tuple[tuple[Span, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        report = self.data.report.to_json()
        return {
            **report,
            "notes": [*report["notes"], *self.stops.notes],
            "splits": {
                split: {
                    name: value
                    for name, value in self.data.ledger.report(split).to_json().items()
                    if name not in ("problems", "notes")
                }
                for split in SPLITS
                if self.data.ledger.rows[split]
            },
            "parts": [asdict(part) for part in self.data.parts],
            "lengths": {split: asdict(found) for split, found in self.lengths.items()},
            "stops": {name: value for name, value in asdict(self.stops).items() if name != "notes"},
            "estimate": None if self.estimate is None else {**asdict(self.estimate), "seconds": self.estimate.seconds},
            "from_cache": self.data.from_cache,
            "previews": [[asdict(span) for span in row] for row in self.previews],
        }


def check(config: RunConfig, *, preview: int = 0) -> DataCheck:
    """Read, check and tokenise all splits of ``config`` with its base's tokenizer, exactly as training does.

    Args:
        config: Names the base and the data.
        preview: Show so many training rows.
    """
    ref = resolve_description(config.model.base, config.model.revision)
    tokenizer = load_tokenizer(ref)
    data = tokenised_data(config, tokenizer)
    lengths = {split: summarise(data.ledger.lengths[split]) for split in SPLITS}
    return DataCheck(
        data=data,
        stops=prove_stops(ref, tokenizer, data.ledger),
        estimate=estimate(config, data),
        lengths={split: found for split, found in lengths.items() if found is not None},
        previews=_previews(data, tokenizer, preview),
    )


def estimate(config: RunConfig, data: TokenisedData) -> Estimate | None:
    """Steps, tokens and time of a run on one device; None where no training row is left."""
    if data.train is None:
        return None
    train = config.train.model_dump()
    rows = len(data.train)
    tokens = data.ledger.total_tokens("train") * rows / sum(part.rows for part in data.parts)
    sequences = math.ceil(tokens / config.train.max_length) if config.train.packing else rows
    batches = math.ceil(sequences / config.train.per_device_train_batch_size)
    steps_per_epoch = math.ceil(batches / config.train.gradient_accumulation_steps)
    limit = train.get("max_steps", -1)
    steps = limit if limit > 0 else math.ceil(config.train.num_train_epochs * steps_per_epoch)
    speed = last_speed(config.model.base, default_device())
    return Estimate(steps, round(tokens * steps / steps_per_epoch), speed)


def _previews(data: TokenisedData, tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[tuple[Span, ...], ...]:
    if data.train is None:
        return ()
    rows = (data.train[index] for index in range(min(number, len(data.train))))
    return tuple(spans(row["input_ids"], row["labels"], tokenizer) for row in rows)
