"""Training strategies that do not go together, or have no effect as they are set: sections in, problems out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.config.sections import LoraSection, QuantizationSection
from qlora_kit.config.train_section import EVAL_LOSS, Problem, TrainSection

# They project or fuse the gradients of whole matrices; an adapter's own are of low rank already.
_WHOLE_MATRIX_OPTIMIZERS = ("galore_", "apollo_", "lomo", "adalomo")
_WITHOUT_ARGUMENTS = ("constant", "constant_with_warmup")


def strategy_problems(
    train: TrainSection, lora: LoraSection, quantization: QuantizationSection, *, validates: bool
) -> list[Problem]:
    """What of these sections cannot work together.

    Args:
        train: The section, valid by itself.
        lora: As ``train``.
        quantization: As ``train``.
        validates: Whether the config's own task has validation rows.
    """
    values = train.model_dump()
    return [
        *_loss_problems(values),
        *_optimizer_problems(values),
        *_checkpointing_problems(train),
        *_evaluation_problems(train, validates=validates),
        *_initialisation_problems(lora, quantization),
    ]


def _loss_problems(values: dict[str, Any]) -> Iterator[Problem]:
    if values.get("label_smoothing_factor") and values.get("loss_type") == "dft":
        what = "is set together with loss_type 'dft', and TRL would leave it out in silence"
        fix = "remove it, or set train.loss_type=nll"
        yield Problem(("train", "label_smoothing_factor"), what, "one of the two", fix)


def _optimizer_problems(values: dict[str, Any]) -> Iterator[Problem]:
    if values["optim"].startswith(_WHOLE_MATRIX_OPTIMIZERS):
        what = f"is {values['optim']!r}, which is made for training whole weight matrices"
        yield Problem(("train", "optim"), what, "an optimizer for adapters", "set adamw_torch or paged_adamw_8bit")
    if values["lr_scheduler_type"] in _WITHOUT_ARGUMENTS and values.get("lr_scheduler_kwargs"):
        what = f"is set, and the scheduler {values['lr_scheduler_type']} takes no arguments"
        fix = "remove it, or choose another lr_scheduler_type"
        yield Problem(("train", "lr_scheduler_kwargs"), what, "nothing", fix)


def _checkpointing_problems(train: TrainSection) -> Iterator[Problem]:
    if train.checkpointed_layers is not None and not train.gradient_checkpointing:
        what = f"is {train.checkpointed_layers}, and gradient_checkpointing is false"
        fix = "set train.gradient_checkpointing=true, or remove it"
        yield Problem(("train", "checkpointed_layers"), what, "both or neither", fix)


def _evaluation_problems(train: TrainSection, *, validates: bool) -> Iterator[Problem]:
    needing = []
    if train.metric_for_best_model != EVAL_LOSS:
        needing.append("metric_for_best_model")
    if train.early_stopping_patience is not None:
        needing.append("early_stopping_patience")
    elif train.early_stopping_threshold:
        what, fix = "has no effect without early_stopping_patience", "set train.early_stopping_patience, or remove it"
        yield Problem(("train", "early_stopping_threshold"), what, "both or neither", fix)
    for key in needing:
        if not validates:
            what = f"is {getattr(train, key)!r}, and there are no validation rows of the config's own task"
            yield Problem(("train", key), what, "data.validation with at least one file", "add data.validation")
        elif train.eval_strategy == "no":
            what = f"is {getattr(train, key)!r}, and eval_strategy is 'no'"
            yield Problem(("train", key), what, "evaluations", "set train.eval_strategy=epoch or steps")


def _initialisation_problems(lora: LoraSection, quantization: QuantizationSection) -> Iterator[Problem]:
    if lora.init_lora_weights != "loftq":
        return
    path = ("lora", "init_lora_weights")
    if not quantization.load_in_4bit:
        what = "is 'loftq', which makes up for the error of a quantization, and load_in_4bit is false"
        yield Problem(path, what, "a base in 4 bits", "set quantization.load_in_4bit=true, or another initialisation")
    if lora.use_dora:
        what = "is 'loftq' together with use_dora, whose magnitudes are those of the quantized weights alone"
        yield Problem(path, what, "one of the two", "set lora.use_dora=false, or another initialisation")
