"""What watches a training run: progress for people, a clean stop on a signal, a stop at the first non-finite value."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.errors import GuardError
from qlora_kit.training.batch_rows import longest_rows, row_pieces, sources_of_batches
from qlora_kit.training.checkpoints import checkpoints
from qlora_kit.training.exact_trainer import ExactTrainer
from qlora_kit.training.peak_memory import peak_memory_bytes

logger = logging.getLogger(__name__)

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
        tokens: Tokens that went through the model in this process's part of the run, padding left out.
        seconds: Since that part began.
        peak_bytes: Peak memory so far: allocated on the GPU, else resident in the process.
    """

    step: int
    total_steps: int
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    tokens: int
    seconds: float
    peak_bytes: int


class ProgressCallback(TrainerCallback):
    """Tells a function how far the run is: at its begin, after each step and each evaluation."""

    def __init__(self, tell: Callable[[TrainingProgress], None], *, tokens_seen: Callable[[], int]) -> None:
        self._tell = tell
        self._tokens_seen = tokens_seen
        self._began = time.monotonic()
        self._latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()
        self._report(state)

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
                tokens=self._tokens_seen(),
                seconds=time.monotonic() - self._began,
                peak_bytes=peak_memory_bytes(),
            )
        )


class StopOnSignal:
    """Notes SIGINT or SIGTERM; the trainer stops before its next micro-batch."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def wanted(self) -> bool:
        """Whether one of them came."""
        return self.received is not None

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


class GuardedTrainer(ExactTrainer):
    """Stopped within the step by the first loss, gradient or trained weight that is not finite.

    The validation loss is the plain one, whatever is trained on: those of two runs can be compared, and DFT's weighted
    loss is as low for an impossible answer as for a certain one.
    """

    task_metric: TaskMetric | None = None
    """What each evaluation measures beside the loss."""
    label_smoother: Callable[..., torch.Tensor] | None
    tokens_seen = 0
    """Tokens that went through the model in this process's part of the run, padding left out."""

    _step_batches: Sequence[dict[str, Any]] = ()  # the micro-batches of the optimizer step under way
    _done_batches = 0  # how many of them
    _piece: Mapping[str, Any]  # what went through the model last

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(_AfterOptimizerStep(self))
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._step_batches, self._done_batches = batches, 0
        return batches, items

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        mask = inputs.get("attention_mask")  # packed rows have none, and no padding
        tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss = self._within_memory(model, inputs, *args, **kwargs)
        self.tokens_seen += tokens
        self._done_batches += 1
        if not torch.isfinite(loss):
            raise self._not_finite(f"the loss became {loss.item()}", [inputs])
        return loss

    def _within_memory(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The loss of a micro-batch, in as many pieces as memory asks for.

        The pieces' losses and gradients add up to those of the whole: each is divided by the tokens of the whole step.
        Where memory runs out, the step's earlier micro-batches are done again, since gradients are half added up.
        """
        again: Sequence[dict[str, Any]] = ()
        while True:
            try:
                for earlier in again:
                    self._in_pieces(model, earlier, *args, **kwargs)
                return self._in_pieces(model, inputs, *args, **kwargs)
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            self._make_room(inputs, reason)  # out here, where no traceback holds the tensors of the attempt
            model.zero_grad()
            if self._before_step is not None:
                self._rewind(self._before_step)
            again = self._step_batches[: self._done_batches]

    def _in_pieces(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        losses = []
        for piece in row_pieces(inputs, self.pieces):
            self._piece = piece
            losses.append(super().training_step(model, piece, *args, **kwargs))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def _make_room(self, inputs: Mapping[str, torch.Tensor], reason: str) -> None:
        """Smaller pieces, then no kept activations.

        Raises:
            GuardError: Both were tried.
        """
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step = self.state.global_step + 1
        if len(row_pieces(inputs, 2 * self.pieces)) > len(row_pieces(inputs, self.pieces)):
            self.pieces *= 2
            logger.warning("step %d: out of memory; micro-batches are split into %d from now on", step, self.pieces)
        elif not (self.recomputes or self.args.gradient_checkpointing):
            self.recompute_activations()
            logger.warning("step %d: out of memory; activations are computed again from now on", step)
        else:
            saved = self.save_stopped()
            rows = "; ".join(sources_of_batches(self.facts.rows, [self._piece]))
            raise GuardError(
                f"out of memory in step {step}, on the rows {rows} ({reason})",
                expected="memory for one row, its activations computed again",
                fix="lower train.max_length or lora.r, or free memory on the device"
                + ("; the steps before are saved: go on with --resume" if saved else ""),
            )

    def restore_position(self) -> None:
        super().restore_position()
        if self.facts.probe:
            self._probe_longest_batch()

    def _probe_longest_batch(self) -> None:
        """Try the longest rows that a micro-batch can hold; no trace is left but smaller pieces, if they do not fit."""
        rows = self._remove_unused_columns(self.train_dataset)
        rows = rows.select(longest_rows(rows, self.args.per_device_train_batch_size))
        batch = self._prepare_inputs(self.data_collator(list(rows)))
        self._mark()
        self._step_batches, self._done_batches = [batch], 0
        self._within_memory(self.model_wrapped, batch, num_items_in_batch=(batch["labels"] != -100).sum())
        self.model_wrapped.zero_grad()
        if self._before_step is not None:
            self._put_back(self._before_step)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaler = self.accelerator.scaler
        # With fp16, gradients overflow now and then: the scaler skips that step and scales less. Below 1 it gave up.
        overflow_is_normal = scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1
        if not overflow_is_normal and not math.isfinite(norm):
            raise self._not_finite(f"the gradient's norm became {float(norm)}", self._step_batches)
        return norm

    def require_finite_weights(self) -> None:
        """After an optimizer step.

        Raises:
            GuardError: A trained weight is NaN or infinite.
        """
        trained = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if torch.nn.utils.get_total_norm(list(trained.values()), norm_type=math.inf).isfinite():
            return
        broken = [name for name, weight in trained.items() if not weight.isfinite().all()]
        what = f"{len(broken)} trained tensors hold values that are not finite, the first is {broken[0]},"
        raise self._not_finite(what, self._step_batches)

    def _not_finite(self, what: str, batches: Sequence[Mapping[str, Any]]) -> GuardError:
        rows = "; ".join(sources_of_batches(self.facts.rows, batches))
        return GuardError(
            f"{what} in step {self.state.global_step + 1}, on the rows {rows}",
            expected="a finite loss, gradient and weights",
            fix="lower train.learning_rate, or look at these rows" + self._what_is_kept(),
        )

    def _what_is_kept(self) -> str:
        return "; the last checkpoint is kept" if checkpoints(Path(self.args.output_dir)) else ""

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
                fix="lower train.learning_rate, or look at the validation rows" + self._what_is_kept(),
            )
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.task_metric is not None:
            output.metrics[self.task_metric.key] = self.task_metric.measure(self.model)
        return output


class _AfterOptimizerStep(TrainerCallback):
    """Has the trainer look at its weights before anything is made of them."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.require_finite_weights()
