"""What watches a training run: progress for people, a clean stop on a signal, a stop at the first non-finite loss."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from qlora_kit.errors import GuardError

if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput

    from qlora_kit.training.task_metric import TaskMetric

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        total_steps: Of all.
        loss: Mean training loss since the last log line; None before the first.
        eval_loss: Latest validation loss; None before the first.
        learning_rate: Of the last step.
    """

    step: int
    total_steps: int
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None


class ProgressCallback(TrainerCallback):
    """Tells a function how far the run is, after each step and each evaluation."""

    def __init__(self, tell: Callable[[TrainingProgress], None]) -> None:
        self._tell = tell
        self._latest: dict[str, float] = {}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._latest |= logs or {}
        self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report(state)

    def _report(self, state: TrainerState) -> None:
        latest = self._latest
        self._tell(
            TrainingProgress(
                step=state.global_step,
                total_steps=state.max_steps,
                loss=latest.get("loss"),
                eval_loss=latest.get("eval_loss"),
                learning_rate=latest.get("learning_rate"),
            )
        )


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and ends the run after the step in which SIGINT or SIGTERM came."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The trainer ends an epoch that it breaks off; an evaluation there would be one that no whole run makes, and
        # the resumed run could keep another adapter than it.
        if self.received is not None and not float(state.epoch or 0).is_integer():
            control.should_evaluate = False
            control.should_save = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside the block; a second one ends the process at once as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for caught in EXIT_CODES:
            signal.signal(caught, signal.SIG_DFL if caught != signal.SIGINT else signal.default_int_handler)


class GuardedTrainer(SFTTrainer):
    """TRL's trainer, stopped by the first training or validation loss that is not a finite number.

    The validation loss is the plain one, whatever is trained on: those of two runs can be compared, and DFT's weighted
    loss is as low for an impossible answer as for a certain one.
    """

    task_metric: TaskMetric | None = None
    """What each evaluation measures beside the loss."""
    label_smoother: Callable[..., torch.Tensor] | None
    tokens_seen = 0
    """Tokens that went through the model in this process's part of the run, padding left out."""

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        mask = inputs.get("attention_mask")  # packed rows have none, and no padding
        self.tokens_seen += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            raise GuardError(
                f"the loss became {loss.item()} in step {self.state.global_step + 1}",
                expected="a finite loss",
                fix="lower train.learning_rate, or look at the rows of this step; the last checkpoint is kept",
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        loss_type, smoother = self.args.loss_type, self.label_smoother
        self.args.loss_type, self.label_smoother = "nll", None
        try:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        finally:
            self.args.loss_type, self.label_smoother = loss_type, smoother
        loss = metrics["eval_loss"]
        if not math.isfinite(loss):
            raise GuardError(
                f"the validation loss became {loss} after step {self.state.global_step}",
                expected="a finite loss",
                fix="lower train.learning_rate, or look at the validation rows; the last checkpoint is kept",
            )
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.task_metric is not None:
            output.metrics[self.task_metric.key] = self.task_metric.measure(self.model)
        return output
