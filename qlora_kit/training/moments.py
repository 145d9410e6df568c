"""Moments of a run that only a callback sees, passed on to functions of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Act = Callable[[], None]


class Moments(TrainerCallback):
    """Calls a function when the trainer's sums have been set to zero, after an optimizer step, or after an epoch."""

    def __init__(self, train_begin: Act, optimizer_step: Act, epoch_end: Act) -> None:
        self._train_begin, self._optimizer_step, self._epoch_end = train_begin, optimizer_step, epoch_end

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._train_begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._optimizer_step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch_end()
