"""``--onto auto``: both ways of merging, measured on the adapter's own validation rows, and the better one kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_kit.checkpoint import torch_dtype
from qlora_kit.likelihood import Loss, loss_difference
from qlora_kit.merging.layerwise import Sequences, plan_logits
from qlora_kit.merging.onto import Chosen
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.probes import compare_logits
from qlora_kit.merging.results import Candidate, OntoChoice
from qlora_kit.merging.rows import ValidationRows, rows_loss

if TYPE_CHECKING:
    import torch

    from qlora_kit.data.encoding import Encoded


def choose_onto_by_rows(plan: MergePlan, found: ValidationRows | str) -> tuple[MergePlan, OntoChoice]:
    """Measure both merges and the live adapter on validation rows; take ``original`` where the rows show it is better.

    Every model is computed in fp32, a layer at a time, before anything is written: the 4-bit base + adapter as it was
    trained, and each merge as its files will hold it, rounded. What was trained is what is kept, unless the loss of
    ``original`` is lower and the 95 % interval of the difference (bootstrap over at least 10 rows) leaves out 0.

    Args:
        plan: As the adapter was trained.
        found: The adapter's validation rows, or why there are none.

    Returns:
        The plan to follow, and what was measured; where nothing can be, the reason.

    Raises:
        BaseModelError: The base cannot be read.
    """
    if plan.onto == "original":
        return plan, OntoChoice.unmeasured("as trained: on 16-bit weights")
    if plan.packed:
        return plan, OntoChoice.unmeasured("as trained: the base's files hold 4-bit weights only")
    if isinstance(found, str):
        return plan, OntoChoice.unmeasured(f"as trained: {found}")
    rows = found.encoded
    live = _logits(plan, rows, "dequantized", rounded=False)
    losses: dict[str, Loss] = {}
    candidates = {}
    for onto in ("dequantized", "original"):
        logits = _logits(plan, rows, onto, rounded=True)
        losses[onto] = rows_loss(rows, logits)
        candidates[onto] = Candidate(losses[onto].mean, compare_logits(live, logits))
    difference = loss_difference(losses["original"], losses["dequantized"])
    if difference.is_lower:
        plan, reason = replace(plan, onto="original"), "the loss onto original is lower, beyond chance"
    else:
        reason = "as trained: the loss onto original is not lower beyond chance"
    choice = OntoChoice(
        reason=reason,
        rows=len(rows),
        tokens=sum(row.supervised_tokens for row in rows),
        live_loss=rows_loss(rows, live).mean,
        candidates=candidates,
        difference=difference.value,
        difference_ci95=difference.ci95,
    )
    return plan, choice


def _logits(plan: MergePlan, rows: Sequence[Encoded], onto: Chosen, *, rounded: bool) -> list[torch.Tensor]:
    """At the positions that predict each row's answer: (supervised tokens, V) for each row."""

    def round_once(name: str, _: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        return values.to(torch_dtype(plan.specs[name].dtype)).float()

    adjust = round_once if rounded else None
    return plan_logits(plan, Sequences.of_answers(rows), four_bit=onto == "dequantized", adjust=adjust)
