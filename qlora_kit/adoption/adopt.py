"""Adopts one adapter: plan, measure, decide how it was trained, write the contract, publish into the store."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from qlora_kit.adapters import AdapterCard, AdapterContract, AdapterStore, BaseIdentity, library_versions
from qlora_kit.adapters.contract_file import ADOPTED
from qlora_kit.adapters.gate import CONFIG_FILE, WEIGHTS_FILE
from qlora_kit.adoption.measuring import Measured, measure
from qlora_kit.adoption.planning import AdoptionPlan, Claims, plan_adoption
from qlora_kit.errors import AdapterError
from qlora_kit.likelihood import MIN_ROWS, Loss, LossDifference, loss_difference
from qlora_kit.merging.probes import PROBES
from qlora_kit.tasks import TASKS

TRAINED_WITH_PEFT = "peft_of_training"


@dataclass(frozen=True)
class Adoption:
    """An adopted adapter.

    Attributes:
        card: As it lies in the store now.
        contract: Its contract; ``metrics`` is what was measured, ``not_measured`` names what was not.
        pairs: How many layers it adapts.
        notes: What the adopter should know, a sentence each.
    """

    card: AdapterCard
    contract: AdapterContract
    pairs: int
    notes: tuple[str, ...]


def adopt_adapter(
    adapter: str,
    store: AdapterStore,
    claims: Claims,
    *,
    name: str | None = None,
    replace: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Adoption:
    """Measure an adapter that was trained elsewhere and publish it with a contract.

    A folder outside the store stays as it is: the store gets a copy. An adapter of the store is replaced by itself with
    a contract, in one step.

    Args:
        adapter: A name in ``store``, or a folder.
        store: Where it is published.
        claims: What is known of it.
        name: Its name in the store; the folder's name by default.
        replace: Replace another adapter of that name, or an earlier adoption of this one.
        progress: Told what is being done.

    Raises:
        AdapterError: It is unsound, has a contract, does not fit the base or changes nothing; its name is taken; or
            whether it was trained in 4 or 16 bits is neither claimed nor shown by the validation rows.
        BaseModelError: The base cannot be found or loaded.
        ConfigError: A claim is impossible.
        DataError: The validation rows cannot be used.
        GuardError: Logits are not finite.
        OutputError: The store cannot be written to.
    """
    tell = progress if progress is not None else _tell_nobody
    tell("checking the adapter, the base's files and the data")
    plan = plan_adoption(adapter, store, claims, name=name, replace=replace)
    digest = _digest(plan)
    measured = []
    for candidate in plan.candidates:
        bits = "4" if candidate.load_in_4bit else "16"
        tell(f"measuring the base in {bits} bits, without and with the adapter")
        measured.append(measure(plan, candidate))
        _free_memory()
    chosen, metrics = _choose(plan, measured)
    metrics = {**_metrics(chosen), **metrics}
    contract = _contract(plan, chosen, metrics)
    if _digest(plan) != digest:
        what = f"{plan.files.folder}: the adapter was changed while it was measured"
        raise AdapterError(what, expected="files at rest", fix="adopt it again once it is complete")
    card = store.add(plan.files.folder, plan.name, replace=replace, contract=contract, omit=plan.omit)
    return Adoption(card, contract, len(plan.files.pairs), (*plan.notes, *_measured_notes(plan, chosen)))


def _tell_nobody(text: str) -> None:
    pass


def _digest(plan: AdoptionPlan) -> str:
    digest = hashlib.sha256()
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        with (plan.files.folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _free_memory() -> None:
    """A model and its PEFT layers refer to each other: without a collection two bases would lie in memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _choose(plan: AdoptionPlan, measured: list[Measured]) -> tuple[Measured, dict[str, Any]]:
    """The base on which the adapter's loss is lower, where there are two, with both losses.

    Raises:
        AdapterError: The rows do not show a difference.
    """
    if len(measured) == 1:
        return measured[0], {}
    in_4bit, in_16bit = (_required(one.loss) for one in measured)
    difference = loss_difference(in_4bit, in_16bit)
    if not difference.is_decided:
        raise AdapterError(
            f"{plan.files.folder}: the validation rows do not show whether it was trained on 4-bit or 16-bit weights: "
            f"its loss is {in_4bit.mean:.4f} nats/token on the 4-bit base and {in_16bit.mean:.4f} on the 16-bit one; "
            f"the difference is {_in_words(difference)}",
            expected=f"a difference whose interval leaves out 0, on at least {MIN_ROWS} rows",
            fix="give --trained-in as its author says, or more rows with --validation",
        )
    metrics = {
        "eval_loss_4bit": in_4bit.mean,
        "eval_loss_16bit": in_16bit.mean,
        "eval_loss_4bit_minus_16bit": difference.value,
        "eval_loss_4bit_minus_16bit_ci95": list(difference.ci95),
    }
    return measured[0] if difference.is_lower else measured[1], metrics


def _required(loss: Loss | None) -> Loss:
    if loss is None:
        raise ValueError("two candidates are measured only where there are validation rows")
    return loss


def _in_words(difference: LossDifference) -> str:
    low, high = difference.ci95
    return f"{difference.value:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, {difference.rows} rows)"


def _metrics(measured: Measured) -> dict[str, Any]:
    """What the contract keeps of the measurements; losses in nats a token."""
    effect = asdict(measured.effect)
    metrics: dict[str, Any] = {
        "max_abs_logit_diff": effect["max_abs"],
        "mean_abs_logit_diff": effect["mean_abs"],
        "top1_agreement": effect["top1_agreement"],
        "kl": effect["kl"],
        "probe_answers": len(PROBES),
        "stop_rate": measured.stop_rate,
        "base_stop_rate": measured.base_stop_rate,
    }
    if measured.loss is not None and measured.base_loss is not None:
        metrics |= {
            "eval_loss": measured.loss.mean,
            "base_eval_loss": measured.base_loss.mean,
            "eval_rows": len(measured.loss.tokens),
            "eval_tokens": sum(measured.loss.tokens),
        }
    if measured.bare_loss is not None:
        metrics["eval_loss_without_system_prompt"] = measured.bare_loss.mean
    return metrics


def _contract(plan: AdoptionPlan, measured: Measured, metrics: dict[str, Any]) -> AdapterContract:
    facts = plan.facts
    if facts.fingerprint is None or facts.stop_token_ids is None:
        raise ValueError("the plan's facts are those of a base with files and tokenizer")
    versions = library_versions()
    if plan.files.config.peft_version is not None:
        versions[TRAINED_WITH_PEFT] = plan.files.config.peft_version
    return AdapterContract(
        base=BaseIdentity(facts.id, facts.revision, facts.fingerprint),
        quantization=measured.quantization,
        chat_template_sha256=facts.chat_template_sha256,
        system_prompt=plan.claims.system_prompt,
        stop_token_ids=facts.stop_token_ids,
        generation={"max_new_tokens": plan.task.max_new_tokens, "do_sample": False},
        task=plan.task.name,
        metric_names=plan.task.metrics if plan.task.name in TASKS else (),
        data=plan.data,
        config_sha256=None,
        versions=versions,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kit_version=version("qlora-kit"),
        metrics=metrics,
        name=plan.name,
        origin=ADOPTED,
        not_measured=_not_measured(plan, measured),
    )


def _not_measured(plan: AdoptionPlan, measured: Measured) -> tuple[str, ...]:
    """Keys of the contract that no measurement supports: claimed, taken by default, or unknown."""
    names = []
    # A loss below the base's shows that the adapter was made for these weights, this template, this stop token.
    if not _lower(measured.loss, measured.base_loss):
        names += ["base", "chat_template_sha256", "stop_token_ids"]
    if plan.claims.trained_in is not None:
        names.append("quantization")
    elif len(plan.candidates) > 1 and measured.quantization["load_in_4bit"]:
        names += ["quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant"]
    # A prompt may lower the loss without being the trained one, so that it stays the adopter's word.
    return (*names, "system_prompt", "generation", "task", "data", "config_sha256", "versions")


def _lower(loss: Loss | None, other: Loss | None) -> bool:
    return loss is not None and other is not None and loss_difference(loss, other).is_lower


def _measured_notes(plan: AdoptionPlan, measured: Measured) -> list[str]:
    notes = []
    if measured.stop_rate == 0:
        limit = plan.task.max_new_tokens
        notes.append(
            f"the adapter ended none of {len(PROBES)} answers within {limit} tokens: either it answers at length, or "
            "it was trained with another chat template or stop token"
        )
    loss, base, bare = measured.loss, measured.base_loss, measured.bare_loss
    if loss is not None and base is not None and not _lower(loss, base):
        notes.append(
            f"on the validation rows the adapter is not shown to be better than the base "
            f"({_in_words(loss_difference(loss, base))} nats/token): is it of this base, template, prompt and task?"
        )
    if loss is not None and bare is not None and not _lower(loss, bare):
        notes.append(
            f"the rows do not show that the system prompt is of any use to the adapter "
            f"(with it {_in_words(loss_difference(loss, bare))} nats/token): was it trained with it?"
        )
    return notes
