"""The model card of a merge or of a trained base: its result and plan in, the text of ``README.md`` out."""

from __future__ import annotations

from pathlib import Path

from qlora_kit.base_files import HUB_ID
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.results import MergeResult, MetricCheck, RowsCheck, Verification

_ONTO = {
    "dequantized": "the base's weights as the 4-bit layers computed with them in training",
    "original": "the base's own unquantized weights",
}
_CODES = (
    "The adapter was trained on a 4-bit checkpoint; this base quantizes to the 4-bit codes that its contract samples. "
)


def model_card(result: MergeResult, plan: MergePlan) -> str:
    """A short card: what was merged onto what, how to load it, and what the verification measured."""
    on_hub = HUB_ID.match(result.base) is not None and not Path(result.base).is_dir()
    base_line = f"base_model: {result.base}\n" if on_hub else ""
    base = result.base if on_hub else Path(result.base).name
    revision = "" if result.revision is None else f" (revision {result.revision})"
    head = f"---\n{base_line}library_name: transformers\npipeline_tag: text-generation\n---\n"
    measured = _measured(result)
    if plan.adapter is None:
        return (
            f"{head}# {base} as adapters were trained on it\n\n{_trained_base(plan, base + revision)}\n\n{measured}\n"
        )
    return (
        f"{head}# {result.adapter} merged into {base}\n\n"
        f"The adapter `{result.adapter}`{_task(plan)} merged by qlora-kit into {base}{revision}, onto "
        f"{_ONTO[result.onto]}: W + scaling · B·A in fp32, rounded once. "
        f"{_CODES if result.base_match == 'nf4_codes' else ''}"
        "Load it with `AutoModelForCausalLM.from_pretrained`; do not quantize it "
        f"to 4 bits again without measuring what that costs.{_prompt(plan)}\n\n{measured}\n"
    )


def _trained_base(plan: MergePlan, base: str) -> str:
    kind = plan.quantization.bnb_4bit_quant_type.upper()
    double = " with double quantization" if plan.quantization.bnb_4bit_use_double_quant else ""
    return (
        f"The base {base}, written by qlora-kit: each linear weight is what a 4-bit layer ({kind}{double}) computes "
        "with, rounded once to 16 bits; everything else is the base's own. Servers that load 16-bit weights serve "
        "adapters on it that were trained on that base in 4 bits. It is no base to train on or to merge onto."
    )


def _task(plan: MergePlan) -> str:
    return "" if plan.contract is None else f" (task {plan.contract.task})"


def _prompt(plan: MergePlan) -> str:
    if plan.contract is None or not plan.contract.system_prompt:
        return ""
    return f" It was trained with the system prompt {plan.contract.system_prompt!r}."


def _chosen(result: MergeResult) -> str:
    choice = result.choice
    if choice is None or not choice.candidates:
        return ""
    costs = "; ".join(
        f"onto {name} {cost.loss:.4f} (KL {cost.against_live.kl:.2g}, same likeliest token at "
        f"{cost.against_live.top1_agreement:.1%})"
        for name, cost in choice.candidates.items()
    )
    return (
        f"Loss on {choice.rows} validation rows, in nats a token: unmerged {choice.live_loss:.4f}; {costs}. "
        f"Taken {result.onto}: {choice.reason}. "
    )


def _measured(result: MergeResult) -> str:
    found = result.verification
    if found is None:
        return "The written files were not verified."
    text = f"{_chosen(result)}{_logits(result, found)}{_drift(found)}"
    if result.adapter is not None:
        text += f"{_rows(found.on_rows)}{_answers(found.answers)}"
    return f"{text} `merge_report.json` holds every number."


def _logits(result: MergeResult, found: Verification) -> str:
    reference, effect = "base + adapter, unmerged,", "the adapter does"
    if result.adapter is None:
        reference, effect = "the base in 4 bits", "4 bits do to the base"
    does = (
        "" if found.effect is None else f"; what {effect}: {found.effect.max_abs:.2g} and {found.effect.mean_abs:.2g}"
    )
    return (
        f"Verified from the written files against {reference} in fp32, over {found.logits.positions} "
        f"positions: logits differ by {found.logits.max_abs:.2g} at most and {found.logits.mean_abs:.2g} in the mean "
        f"(one rounding alone: {found.noise.max_abs:.2g} and {found.noise.mean_abs:.2g}{does}), the likeliest token is "
        f"the same at {found.logits.top1_agreement:.1%}."
    )


def _drift(found: Verification) -> str:
    if found.drift is None or found.drift == found.logits:
        return ""
    return (
        f" Against the 4-bit base it was trained on, logits differ by {found.drift.max_abs:.2g} at most and "
        f"{found.drift.mean_abs:.2g} in the mean, the likeliest token is the same at {found.drift.top1_agreement:.1%}."
    )


def _rows(found: RowsCheck | str) -> str:
    if isinstance(found, str):
        return f" On validation rows nothing was measured: {found}."
    text = f" On {found.rows} validation rows the loss is {found.loss:.4f} nats a token"
    return f"{text}." if found.trained_loss is None else f"{text}, unmerged and as trained {found.trained_loss:.4f}."


def _answers(found: MetricCheck) -> str:
    if found.reason:
        return f" Generated answers were not checked: {found.reason}."
    same = "" if found.same_answers is None else f"; {found.same_answers:.1%} of the answers are the same text"
    return f" {found.metric} of {found.rows} generated answers: {found.merged:.4g}, unmerged {found.live:.4g}{same}."
