"""What rounding a merged model to 4 bits again costs: 16-bit and 4-bit files in, figures and advice out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base_files import BaseRef
from qlora_kit.checkpoint import TensorSource
from qlora_kit.errors import GuardError
from qlora_kit.export.bnb_4bit_files import FourBitTensors
from qlora_kit.likelihood import LossDifference, loss_difference
from qlora_kit.merging.layerwise import Sequences, layerwise_logits, plan_logits
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.probes import compare_logits, probe_prompts
from qlora_kit.merging.results import LogitDifference
from qlora_kit.merging.rows import rows_loss, validation_rows
from qlora_kit.merging.tensor_check import WrittenTensors
from qlora_kit.models import load_tokenizer

if TYPE_CHECKING:
    import torch

    from qlora_kit.data.encoding import Encoded

LOGITS_BYTES = 128 * 2**20
_LITTLE_OF_GAIN, _LITTLE_OF_LOSS = 0.02, 0.05
_BESIDE = "serve the adapter beside the 4-bit base (`qlora-kit serve`), which is what was trained and as small"
_SIXTEEN = "ship the 16-bit merge (`qlora-kit merge`, `export --to gguf --quant q8_0`)"


@dataclass(frozen=True)
class RowLosses:
    """Losses on the adapter's validation rows, in nats a supervised token.

    Attributes:
        rows: How many rows.
        tokens: How many supervised tokens they have.
        base: Of the base as trained on, without the adapter; None where their vocabularies differ.
        live: Of the base as trained on + the adapter, unmerged.
        merged: Of the 16-bit merge.
        rounded: Of the 4-bit files.
        difference: ``rounded`` minus ``merged``.
        difference_ci95: Its 95 % interval, by resampling rows.
    """

    rows: int
    tokens: int
    base: float | None
    live: float
    merged: float
    rounded: float
    difference: float
    difference_ci95: tuple[float, float]


@dataclass(frozen=True)
class RoundingCost:
    """What the second rounding costs.

    Attributes:
        measured_on: ``validation_rows``, or ``probes`` (fixed conversations).
        reason: Why there are no validation rows; None where there are.
        logits: The 4-bit files against the 16-bit merge.
        losses: None without validation rows.
        advice: What follows.
    """

    measured_on: str
    reason: str | None
    logits: LogitDifference
    losses: RowLosses | None
    advice: str

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def measure_second_rounding(
    model: Path, four_bit: Path, *, plan: MergePlan | None, system_prompt: str | None
) -> RoundingCost:
    """Compare the 4-bit files with the checkpoint they were made from, in fp32, a layer at a time.

    Args:
        model: The 16-bit checkpoint.
        four_bit: What was written of it.
        plan: Of the merge that made it; None where it was there already.
        system_prompt: What the probe conversations begin with, where there are no validation rows.

    Raises:
        GuardError: The 4-bit model computes what is not finite.
    """
    found = "give the adapter itself to measure on its validation rows" if plan is None else validation_rows(plan)
    if plan is not None and not isinstance(found, str):
        return _on_rows(model, four_bit, plan, found.encoded)
    prompts = probe_prompts(load_tokenizer(BaseRef(model.name, model)), system_prompt)
    with TensorSource(model) as source:
        vocabulary = max(source.shape(name)[0] for name in source.names if source.shape(name))
    sequences = Sequences.within_memory(prompts, vocabulary=vocabulary, max_bytes=LOGITS_BYTES)
    logits = compare_logits(_written(model, sequences), _rounded(model, four_bit, sequences))
    _require_finite(logits)
    advice = (
        f"the likeliest token stays the same at {logits.top1_agreement:.1%} of the positions; what that costs in the "
        f"task was not measured: compare with `qlora-kit eval`, or {_BESIDE}"
    )
    return RoundingCost("probes", str(found), logits, None, advice)


def _on_rows(model: Path, four_bit: Path, plan: MergePlan, rows: Sequence[Encoded]) -> RoundingCost:
    sequences = Sequences.of_answers(rows)
    merged, rounded = _written(model, sequences), _rounded(model, four_bit, sequences)
    logits = compare_logits(merged, rounded)
    _require_finite(logits)
    before, after = rows_loss(rows, merged), rows_loss(rows, rounded)
    del merged, rounded
    as_trained = plan.quantization.load_in_4bit
    base = None
    if "vocab_size" not in plan.config:
        base = rows_loss(rows, plan_logits(plan, sequences, four_bit=as_trained, with_adapter=False)).mean
    difference = loss_difference(after, before)
    losses = RowLosses(
        rows=len(rows),
        tokens=sum(row.supervised_tokens for row in rows),
        base=base,
        live=rows_loss(rows, plan_logits(plan, sequences, four_bit=as_trained)).mean,
        merged=before.mean,
        rounded=after.mean,
        difference=difference.value,
        difference_ci95=difference.ci95,
    )
    return RoundingCost("validation_rows", None, logits, losses, _advice(losses, difference))


def _advice(losses: RowLosses, difference: LossDifference) -> str:
    """What the figures call for."""
    if not difference.is_decided:
        return (
            f"on {losses.rows} validation rows no cost can be told from chance; {_BESIDE}, unless one model of its "
            "own is what you need"
        )
    if difference.value < 0:
        return f"on {losses.rows} validation rows the 4-bit files are no worse than the merge: they can be shipped"
    cost = f"the second rounding raises the loss from {losses.merged:.4f} to {losses.rounded:.4f} nats a token"
    if losses.base is None:
        return f"{cost}: {_BESIDE}, or {_SIXTEEN}"
    gain = losses.base - losses.live
    part = f"{cost}; the adapter had gained {gain:.4f} over the base"
    if difference.value >= gain:
        return f"{part}: these files are worse than the base; do not ship them, {_BESIDE}, or {_SIXTEEN}"
    if difference.value <= min(_LITTLE_OF_GAIN * gain, _LITTLE_OF_LOSS * losses.merged):
        return f"{part}: little; ship these files where one model of its own is needed, else {_BESIDE}"
    return f"{part}: {_BESIDE}, or {_SIXTEEN}"


def _written(model: Path, sequences: Sequences) -> list[torch.Tensor]:
    with WrittenTensors(model) as weights:
        return layerwise_logits(model, weights, sequences)


def _rounded(model: Path, four_bit: Path, sequences: Sequences) -> list[torch.Tensor]:
    with FourBitTensors(four_bit) as weights:
        return layerwise_logits(model, weights, sequences)


def _require_finite(logits: LogitDifference) -> None:
    if not isfinite(logits.max_abs):
        raise GuardError(
            "the 4-bit model computes logits that are not finite",
            expected="finite logits",
            fix="merge in bf16 or fp32: some of its activations leave the range",
        )
