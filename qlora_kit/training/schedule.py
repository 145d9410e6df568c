"""A run's schedule against its number of steps: refuses one that trains nothing, tells what has no effect."""

from __future__ import annotations

import logging
import math

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from trl import SFTConfig

from qlora_kit.config import TrainSection
from qlora_kit.config.train_section import EVAL_LOSS
from qlora_kit.errors import ConfigError

logger = logging.getLogger(__name__)

STEPS_LOOKED_AT = 100_000
LOW_SHARE = 0.5  # a learning rate that never gets past this share of the configured one is told


def steps_of_run(arguments: SFTConfig, sequences: int, *, processes: int) -> int:
    """Optimizer steps of a run, as transformers' trainer counts them.

    Args:
        arguments: TRL's.
        sequences: Training rows, or packed sequences.
        processes: That train together.
    """
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    rows = arguments.per_device_train_batch_size * processes
    batches = sequences // rows if arguments.dataloader_drop_last else math.ceil(sequences / rows)
    return math.ceil(arguments.num_train_epochs * max(math.ceil(batches / arguments.gradient_accumulation_steps), 1))


def check_schedule(train: TrainSection, arguments: SFTConfig, steps: int) -> None:
    """Look at what ``steps`` optimizer steps make of the schedule; a share of warm-up that is the whole run goes.

    Args:
        train: The run's section.
        arguments: TRL's; ``warmup_steps`` is set to 0 there where a share of a step would leave no step to train in.
        steps: Of the run.

    Raises:
        ConfigError: The learning rate is 0 in every step.
    """
    _check_rates(arguments, steps)
    for line in effectless(train, evaluates=arguments.eval_strategy != "no", steps=steps):
        logger.warning("%s", line)


def _check_rates(arguments: SFTConfig, steps: int) -> None:
    highest = _highest_rate(arguments, steps)
    if highest == 0 and 0 < arguments.warmup_steps < 1:
        logger.warning(
            "train.warmup_steps=%g of %d step%s would be all of them, at learning rate 0: there is no warm-up",
            *(arguments.warmup_steps, steps, "s" if steps > 1 else ""),
        )
        arguments.warmup_steps = 0
        highest = _highest_rate(arguments, steps)
    if highest is None:
        return
    warmup, rate = arguments.get_warmup_steps(steps), arguments.learning_rate
    if highest == 0:
        raise ConfigError(
            f"train: the learning rate is 0 in every step: the run has {steps}, and {warmup} of them are warm-up",
            expected="a step with a learning rate above 0",
            fix=f"set train.warmup_steps below {steps}, or train longer (train.num_train_epochs, train.max_steps)",
        )
    if highest < LOW_SHARE * rate:
        logger.warning(
            "the learning rate reaches %.2g, not %.2g: the run has %d steps and the warm-up takes %d; "
            "lower train.warmup_steps, or train longer",
            *(highest, rate, steps, warmup),
        )


def _highest_rate(arguments: SFTConfig, steps: int) -> float | None:
    """The highest learning rate of the steps; None where it follows from the run, not from the step alone."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    if not isinstance(scheduler, LambdaLR):
        return None
    share = scheduler.lr_lambdas[0]
    return float(arguments.learning_rate * max(share(step) for step in range(min(steps, STEPS_LOOKED_AT))))


def effectless(train: TrainSection, *, evaluates: bool, steps: int) -> list[str]:
    """What is set and has no effect, or another one than it seems, each with what to do.

    Args:
        train: The section.
        evaluates: Whether the run evaluates at all.
        steps: Optimizer steps of the run.
    """
    more = train.model_extra or {}
    lines = []
    for verb, strategy in (("eval", train.eval_strategy if evaluates else "no"), ("save", train.save_strategy)):
        key, done = f"{verb}_steps", "evaluates" if verb == "eval" else "saves"
        every = more.get(key)
        if every is not None and strategy != "steps":
            reason = "there is no validation data" if verb == "eval" and train.eval_strategy != "no" else ""
            is_now = reason if strategy == "no" and reason else f"train.{verb}_strategy is {strategy}"
            lines.append(
                f"train.{key}={every:g} has no effect: {is_now}; "
                + (f"set train.{verb}_strategy=steps, or remove it" if is_now != reason else "remove it")
            )
        elif every is not None and every > steps:
            lines.append(
                f"train.{key}={every:g} is past the last step, {steps}: the run {done} at its end alone; "
                f"set train.{key} to {max(steps // 4, 1)}, say"
            )
    lines.extend(_best_that_is_not_kept(train, evaluates=evaluates))
    if train.metric_for_best_model == EVAL_LOSS and train.metric_rows != _default_of("metric_rows"):
        lines.append(
            f"train.metric_rows={train.metric_rows} has no effect: train.metric_for_best_model is {EVAL_LOSS}, which "
            "is measured on all rows; name a metric of the task there, or remove it"
        )
    patience, evaluations = train.early_stopping_patience, _evaluations(train, steps)
    if evaluates and patience is not None and evaluations is not None and patience >= evaluations:
        lines.append(
            f"train.early_stopping_patience={patience} cannot end the run: it has {evaluations} "
            f"evaluation{'s' if evaluations > 1 else ''}; lower it, or evaluate more often (train.eval_strategy)"
        )
    return lines


def _best_that_is_not_kept(train: TrainSection, *, evaluates: bool) -> list[str]:
    """``load_best_model_at_end`` is on by default: no wish if nothing is evaluated, a surprise without checkpoints."""
    if not train.load_best_model_at_end or (evaluates and train.save_strategy != "no"):
        return []
    if not evaluates:
        if "load_best_model_at_end" not in train.model_fields_set:
            return []
        reason = "train.eval_strategy is no" if train.eval_strategy == "no" else "there is no validation data"
        fix = "set train.eval_strategy=epoch" if train.eval_strategy == "no" else "add data.validation"
        return [f"train.load_best_model_at_end has no effect: {reason}; {fix}, or remove it"]
    return [
        "the last adapter is kept, not the best one: train.save_strategy is no; "
        f"set train.save_strategy={train.eval_strategy}, or train.load_best_model_at_end=false"
    ]


def _default_of(key: str) -> object:
    return TrainSection.model_fields[key].default


def _evaluations(train: TrainSection, steps: int) -> int | None:
    """How often a run evaluates; None where the epochs do not tell."""
    if train.eval_strategy == "epoch":
        more = train.model_extra or {}
        return math.ceil(train.num_train_epochs) if (more.get("max_steps") or -1) < 0 else None
    every = (train.model_extra or {}).get("eval_steps") or train.logging_steps
    return math.ceil(steps / (every if every >= 1 else math.ceil(every * steps)))
