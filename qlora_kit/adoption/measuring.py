"""What can be measured of an adapter on its base: effect, share of answers that end, loss; the base is loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.adapter_loading import base_modules, require_fit
from qlora_kit.adapters import read_adapter
from qlora_kit.adoption.planning import AdoptionPlan
from qlora_kit.config import QuantizationSection
from qlora_kit.engine.peft_path import PeftPath
from qlora_kit.errors import AdapterError, GuardError
from qlora_kit.generation import Sampling, generate
from qlora_kit.likelihood import Loss, answer_nlls
from qlora_kit.merging.probes import compare_logits, probe_logits, probe_prompts
from qlora_kit.merging.results import LogitDifference
from qlora_kit.models import load_base_model, quantization_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from qlora_kit.data.encoding import Encoded

BATCH_SIZE = 16


@dataclass(frozen=True)
class Measured:
    """What was measured on the base, loaded in one way.

    Attributes:
        quantization: The contract's ``quantization`` of this base.
        effect: The base's logits on the probe conversations against those with the adapter.
        stop_rate: Share of the answers to them that the adapter ends within the limit.
        base_stop_rate: The same of the base alone.
        loss: The adapter's on the validation rows; None without rows.
        base_loss: The base's.
        bare_loss: The adapter's on the rows without the claimed system prompt; None where none is claimed.
    """

    quantization: dict[str, Any]
    effect: LogitDifference
    stop_rate: float
    base_stop_rate: float
    loss: Loss | None
    base_loss: Loss | None
    bare_loss: Loss | None


def measure(plan: AdoptionPlan, quantization: QuantizationSection) -> Measured:
    """Load the base as ``quantization`` says and measure it, then the adapter on it.

    Raises:
        BaseModelError: The base cannot be loaded.
        GuardError: Logits are not finite.
        AdapterError: The adapter changes no logit.
    """
    model = load_base_model(plan.ref, quantization)
    facts = quantization_facts(quantization, model)
    prompts = probe_prompts(plan.tokenizer, plan.claims.system_prompt)
    base_logits = _finite_logits(model, prompts, whose=f"the base {plan.ref.id}")
    base_stop_rate = _stop_rate(plan, model, prompts)
    base_loss = _loss(plan, model, plan.rows)
    base = base_modules(model)
    adapter = read_adapter(lambda: plan.files.folder, lambda files, _: require_fit(files, base))
    path = PeftPath(model)  # which takes trained biases, too
    path.activate(path.attach(adapter))
    effect = compare_logits(base_logits, _finite_logits(model, prompts, whose=f"the adapter {plan.files.folder}"))
    if effect.max_abs == 0:
        raise AdapterError(
            f"{plan.files.weights}: the adapter changes nothing: every logit of {len(prompts)} probes is the base's",
            expected="an adapter that was trained",
            fix="check that it is the folder of a finished training: lora_B starts at zero",
        )
    return Measured(
        quantization=facts,
        effect=effect,
        stop_rate=_stop_rate(plan, model, prompts),
        base_stop_rate=base_stop_rate,
        loss=_loss(plan, model, plan.rows),
        base_loss=base_loss,
        bare_loss=_loss(plan, model, plan.bare_rows),
    )


def _finite_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, whose: str) -> list[torch.Tensor]:
    logits = probe_logits(model, prompts)
    if not all(bool(part.isfinite().all()) for part in logits):
        raise GuardError(
            f"{whose}: logits are not finite numbers",
            expected="finite logits on every probe conversation",
            fix="check that the adapter belongs to this base; weights that overflow must be trained again",
        )
    return logits


def _stop_rate(plan: AdoptionPlan, model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> float:
    completions = generate(
        model,
        prompts,
        sampling=Sampling(max_new_tokens=plan.task.max_new_tokens),
        stop_token_ids=_stop_ids(plan),
        pad_token_id=_pad_token_id(plan),
        batch_size=BATCH_SIZE,
    )
    return sum(one.finish_reason == "stop" for one in completions) / len(completions)


def _loss(plan: AdoptionPlan, model: PreTrainedModel, rows: Sequence[Encoded]) -> Loss | None:
    if not rows:
        return None
    nlls = answer_nlls(model, rows, batch_size=BATCH_SIZE, pad_token_id=_pad_token_id(plan))
    return Loss(tuple(nlls), tuple(row.supervised_tokens for row in rows))


def _stop_ids(plan: AdoptionPlan) -> tuple[int, ...]:
    return plan.facts.stop_token_ids or ()


def _pad_token_id(plan: AdoptionPlan) -> int:
    """Padding is masked, so that any token serves where the tokenizer has none of its own."""
    pad = plan.tokenizer.pad_token_id
    return _stop_ids(plan)[0] if pad is None else int(pad)
