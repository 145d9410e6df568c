"""What serving an adapter on the original base costs: both bases + the adapter, unmerged, in; how far apart, out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_kit.merging.layerwise import Sequences, plan_logits
from qlora_kit.merging.onto import Onto
from qlora_kit.merging.planning import MergePlan, plan_merge
from qlora_kit.merging.probes import compare_logits, probe_prompts
from qlora_kit.merging.results import LogitDifference
from qlora_kit.merging.rows import rows_loss, validation_rows
from qlora_kit.models import default_device, load_tokenizer

LOGITS_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Drift:
    """The original base + the adapter against the base as trained + the adapter.

    Attributes:
        measured_on: ``validation_rows``, or ``probes`` (fixed conversations); empty where nothing was measured.
        reason: Why nothing was measured; None where it was.
        rows: How many validation rows.
        logits: How far apart their logits are.
        trained_loss: On the trained base, in nats a supervised token.
        original_loss: On the original base.
    """

    measured_on: str
    reason: str | None
    rows: int
    logits: LogitDifference | None
    trained_loss: float | None
    original_loss: float | None

    def to_json(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    def __str__(self) -> str:
        if self.logits is None:
            return f"not measured: {self.reason}"
        text = f"KL {self.logits.kl:.2g}, the likeliest token the same at {self.logits.top1_agreement:.1%}"
        if self.trained_loss is None or self.original_loss is None:
            return f"{text}, on fixed conversations"
        return (
            f"{text}, loss {self.original_loss:.4f} instead of {self.trained_loss:.4f} on {self.rows} validation rows"
        )


def plan_adapter(adapter: Path, out: Path, *, base: str | None, onto: Onto) -> MergePlan:
    """The adapter on its base, checked as for a merge.

    Raises:
        AdapterError, BaseModelError: As ``plan_merge``.
    """
    device = default_device().type
    return plan_merge(adapter, out, base=base, revision=None, onto=onto, verify=True, device=device)


def measure_drift(plan: MergePlan) -> Drift:
    """Compute the adapter on both bases in fp32, a layer at a time, on its validation rows, else on fixed prompts.

    Args:
        plan: From ``plan_adapter``.
    """
    if plan.contract is None:
        return _unmeasured("the adapter has no contract that says how it was trained")
    if not plan.quantization.load_in_4bit:
        return _unmeasured("it was trained on 16-bit weights: there is none")
    if plan.packed:
        return _unmeasured("the base's files hold 4-bit weights only")
    found = validation_rows(plan)
    rows = () if isinstance(found, str) else found.encoded
    if rows:
        sequences = Sequences.of_answers(rows)
    else:
        prompts = probe_prompts(load_tokenizer(plan.base), plan.contract.system_prompt)
        sequences = Sequences.within_memory(prompts, vocabulary=plan.vocabulary, max_bytes=LOGITS_BYTES)
    trained, original = (plan_logits(plan, sequences, four_bit=four_bit) for four_bit in (True, False))
    return Drift(
        measured_on="validation_rows" if rows else "probes",
        reason=None,
        rows=len(rows),
        logits=compare_logits(trained, original),
        trained_loss=rows_loss(rows, trained).mean if rows else None,
        original_loss=rows_loss(rows, original).mean if rows else None,
    )


def _unmeasured(reason: str) -> Drift:
    return Drift("", reason, 0, None, None, None)
