"""``--onto auto``: both ways of merging, measured on the adapter's own validation rows, and the better one kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qlora_kit.adapters.card import RUN_CONFIG_FILE
from qlora_kit.checkpoint import torch_dtype
from qlora_kit.config import load_config
from qlora_kit.data.chat import control_tokens
from qlora_kit.data.preparing import prepare
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.likelihood import Loss, loss_difference
from qlora_kit.merging.layerwise import Sequences, layerwise_logits
from qlora_kit.merging.onto import Chosen
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.probes import compare_logits
from qlora_kit.merging.results import Candidate, OntoChoice
from qlora_kit.merging.tensors import MergeTensors
from qlora_kit.models import load_tokenizer
from qlora_kit.scoring import encode_answers

if TYPE_CHECKING:
    import torch

    from qlora_kit.data.encoding import Encoded

MAX_ROWS = 64
LOGITS_BYTES = 128 * 2**20
ACTIVATION_BYTES = 192 * 2**20
_ACTIVATIONS = 3  # of the widest layer, in fp32, at a time
_FP32_BYTES = 4


def choose_onto_by_rows(plan: MergePlan) -> tuple[MergePlan, OntoChoice]:
    """Measure both merges and the live adapter on validation rows; take ``original`` where the rows show it is better.

    Every model is computed in fp32, a layer at a time, before anything is written: the 4-bit base + adapter as it was
    trained, and each merge as its files will hold it, rounded. What was trained is what is kept, unless the loss of
    ``original`` is lower and the 95 % interval of the difference (bootstrap over at least 10 rows) leaves out 0.

    Args:
        plan: As the adapter was trained.

    Returns:
        The plan to follow, and what was measured; where nothing can be, the reason.

    Raises:
        BaseModelError: The base cannot be read.
    """
    if plan.onto == "original":
        return plan, OntoChoice.unmeasured("as trained: on 16-bit weights")
    if plan.packed:
        return plan, OntoChoice.unmeasured("as trained: the base's files hold 4-bit weights only")
    rows = _validation_rows(plan)
    if isinstance(rows, str):
        return plan, OntoChoice.unmeasured(f"as trained: {rows}")
    rows = _within_memory(plan, rows)
    if not rows:
        return plan, OntoChoice.unmeasured("as trained: no validation row fits the memory for measuring")
    live = _logits(plan, rows, "dequantized", rounded=False)
    losses: dict[str, Loss] = {}
    candidates = {}
    for onto in ("dequantized", "original"):
        logits = _logits(plan, rows, onto, rounded=True)
        losses[onto] = _loss(rows, logits)
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
        live_loss=_loss(rows, live).mean,
        candidates=candidates,
        difference=difference.value,
        difference_ci95=difference.ci95,
    )
    return plan, choice


def _validation_rows(plan: MergePlan) -> Sequence[Encoded] | str:
    """The encoded validation rows of the adapter's own config, from files; or why there are none."""
    path = plan.adapter.folder / RUN_CONFIG_FILE
    if not path.is_file():
        return f"there is no {RUN_CONFIG_FILE} beside the adapter, so no validation rows"
    try:
        config = load_config(path)
        files = tuple(entry for entry in config.data.validation if isinstance(entry, str))
        if not files:
            return "the adapter's config names no validation file"
        only = config.data.model_copy(update={"train": (), "validation": files, "test": (), "mix": ()})
        tokenizer = load_tokenizer(plan.base)
        prepared = prepare(config.model_copy(update={"data": only}), control_tokens=control_tokens(tokenizer))
        examples = prepared.validation[:MAX_ROWS]
        return encode_answers(examples, [example.messages for example in examples], tokenizer)
    except (ConfigError, DataError) as error:
        return f"the validation rows cannot be used ({error.faults[0].what})"


def _within_memory(plan: MergePlan, rows: Sequence[Encoded]) -> list[Encoded]:
    """As many rows, from the first, as fit the memory for logits and activations."""
    vocabulary = max(spec.shape[0] for spec in plan.specs.values() if spec.shape)
    widest = max((max(shape) for name, shape in plan.layout.linear_shapes.items() if name != "lm_head"), default=1)
    most_logits = LOGITS_BYTES // (_FP32_BYTES * vocabulary)
    most_tokens = ACTIVATION_BYTES // (_FP32_BYTES * _ACTIVATIONS * widest)
    kept: list[Encoded] = []
    longest = logits = 0
    for row in rows:
        longest, logits = max(longest, len(row.input_ids)), logits + row.supervised_tokens
        if logits > most_logits or longest * (len(kept) + 1) > most_tokens:
            break
        kept.append(row)
    return kept


def _logits(plan: MergePlan, rows: Sequence[Encoded], onto: Chosen, *, rounded: bool) -> list[torch.Tensor]:
    """At the positions that predict each row's answer: (supervised tokens, V) for each row."""

    def round_once(name: str, _: Sequence[int], values: torch.Tensor) -> torch.Tensor:
        return values.to(torch_dtype(plan.specs[name].dtype)).float()

    sequences = Sequences([row.input_ids[:-1] for row in rows], [row.supervised_tokens for row in rows])
    with MergeTensors(plan, four_bit=onto == "dequantized") as tensors:
        return layerwise_logits(
            plan.base.path, tensors, sequences, changes=plan.config, adjust=round_once if rounded else None
        )


def _loss(rows: Sequence[Encoded], logits: Sequence[torch.Tensor]) -> Loss:
    import torch

    nlls = []
    for row, found in zip(rows, logits, strict=True):
        targets = torch.tensor(row.input_ids[-row.supervised_tokens :])
        nlls.append(float(torch.nn.functional.cross_entropy(found.double(), targets, reduction="sum")))
    return Loss(tuple(nlls), tuple(row.supervised_tokens for row in rows))
