"""TRL's trainer with guards: smaller pieces where memory ends, a stop at the first thing that is not finite."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.errors import GuardError
from qlora_kit.fast import ScoredModel
from qlora_kit.training.batch_rows import longest_rows, row_pieces, sources_of_batches
from qlora_kit.training.checkpointed_layers import checkpoint_first_layers
from qlora_kit.training.checkpoints import checkpoints
from qlora_kit.training.exact_trainer import ExactTrainer
from qlora_kit.training.fast_switch import FastSwitch, card_of
from qlora_kit.training.fast_trial import try_both
from qlora_kit.training.processes import from_main, gathered, raised_in_all
from qlora_kit.training.run_facts import StopRequested

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers.trainer_utils import EvalLoopOutput

    from qlora_kit.training.task_metric import TaskMetric


FP16_SCALE = 1024.0
"""What a loss is scaled by outside the optimizer's steps, so that gradients in fp16 do not vanish."""


def _supervised(batch: Mapping[str, Any]) -> torch.Tensor:
    """How many labels count."""
    count: torch.Tensor = (batch["labels"] != -100).sum()
    return count


class GuardedTrainer(ExactTrainer):
    """Stopped within the step by the first loss, gradient or trained weight that is not finite.

    The validation loss is the plain one, whatever is trained on: those of two runs can be compared, and DFT's weighted
    loss is as low for an impossible answer as for a certain one.
    """

    task_metric: TaskMetric | None = None
    """What each evaluation measures beside the loss."""
    checkpointed_layers: int | None = None
    """How many layers, from the first on, gradient checkpointing is for; None for all."""
    label_smoother: Callable[..., torch.Tensor] | None
    tokens_seen = 0
    """Tokens that went through the model since the program was started, in all its processes, padding left out."""

    _step_batches: Sequence[dict[str, Any]] = ()  # the micro-batches of the optimizer step under way
    _done_batches = 0  # how many of them
    _piece: Mapping[str, Any]  # what went through the model last

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
        self._done_batches += 1
        # Of all processes: one number for both, so that they meet once.
        both = torch.stack([loss.detach().double(), loss.new_tensor(tokens, dtype=torch.float64)])
        loss_of_all, tokens_of_all = self.accelerator.reduce(both).tolist()
        self.tokens_seen += int(tokens_of_all)
        if not math.isfinite(loss_of_all):
            here = [] if torch.isfinite(loss) else [inputs]
            raise self._not_finite(f"the loss became {loss_of_all}", here)
        return loss

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        head = None if self.fast is None else self.fast.head
        scored = model if head is None else ScoredModel(model, head)
        return super().compute_loss(scored, inputs, *args, **kwargs)

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
        if self.accelerator.num_processes > 1:  # the others take part in each backward pass, and know of no pieces
            raise self._out_of_memory(step, reason, saved=bool(checkpoints(Path(self.args.output_dir))))
        if len(row_pieces(inputs, 2 * self.pieces)) > len(row_pieces(inputs, self.pieces)):
            self.pieces *= 2
            logger.warning("step %d: out of memory; micro-batches are split into %d from now on", step, self.pieces)
        elif not self.recomputes and (not self.args.gradient_checkpointing or self.checkpointed_layers is not None):
            self.recompute_activations()
            logger.warning("step %d: out of memory; activations are computed again from now on", step)
        else:
            raise self._out_of_memory(step, reason, saved=self.save_stopped())

    def _out_of_memory(self, step: int, reason: str, *, saved: bool) -> GuardError:
        rows = "; ".join(sources_of_batches(self.facts.rows, [self._piece]))
        several = self.accelerator.num_processes > 1
        smaller = "train.per_device_train_batch_size, train.max_length" if several else "train.max_length"
        return GuardError(
            f"out of memory in step {step}, on the rows {rows} ({reason})",
            expected="memory for a micro-batch" if several else "memory for one row, its activations computed again",
            fix=f"lower {smaller} or lora.r, or free memory on the device"
            + ("; earlier steps are saved: go on with --resume" if saved else ""),
        )

    def restore_position(self) -> None:
        if self.args.gradient_checkpointing and self.checkpointed_layers is not None:
            checkpoint_first_layers(self.model, self.checkpointed_layers)
        super().restore_position()  # which turns it on for all layers where memory had run out before
        if self.fast is not None and self.fast.undecided:
            self._decide(self.fast)
        if self.facts.probe:
            with self._longest_batch() as batch:
                self._step_batches, self._done_batches = [batch], 0
                self._within_memory(self.model_wrapped, batch, num_items_in_batch=_supervised(batch))

    def _decide(self, fast: FastSwitch) -> None:
        """Use the fused path or leave it: as the run that is resumed did on such a card, or as a trial finds."""
        self.model_wrapped.train()  # before: what is put into a model in eval mode computes as the layers themselves
        earlier = self._earlier
        if earlier is not None and earlier.card == card_of(self.accelerator.device):
            fast.use(earlier.fused)
            if not earlier.fused:
                logger.info("train.fast: nothing is fused, as in the run that is resumed")
        else:
            fast.use(True)
            if fast.fuses:
                self._try(fast)
        fast.tell()

    def _try(self, fast: FastSwitch) -> None:
        """Take the fused path out again where a trial speaks against it.

        Raises:
            GuardError: The GPU failed for good.
        """
        logger.info("train.fast: auto tries the fused path beside the libraries' own, on the longest batch")
        try:
            with self._longest_batch() as batch:
                trial = try_both(fast, self.model, batch, self._one_pass)
        except torch.AcceleratorError as error:  # after which nothing runs on it any more, what is put back neither
            raise GuardError(
                f"the GPU failed while the fused path was tried ({str(error).splitlines()[0]})",
                expected="a GPU that goes on, whatever comes of the trial",
                fix="start again with train.fast=off; if it fails there too, the fused path is not the reason",
            ) from error
        if trial.refusal is None:
            logger.info("train.fast: auto takes the fused path, %s", trial)
        else:
            logger.warning("train.fast: nothing is fused: %s (%s)", trial.refusal, trial)
        fast.use(trial.refusal is None)

    def _one_pass(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """The loss of a batch, after its forward and backward pass."""
        self._stop_if_wanted()
        with self.compute_loss_context_manager():
            loss = self.compute_loss(self.model_wrapped, dict(batch), num_items_in_batch=_supervised(batch))
        # Without the scaler of fp16, which begins so high that gradients overflow at first.
        (loss * FP16_SCALE if self.args.fp16 else loss).backward()
        return loss.detach()

    @contextmanager
    def _longest_batch(self) -> Iterator[dict[str, Any]]:
        """The longest rows that a micro-batch can hold; what is done with them inside the block leaves no trace."""
        rows = self._remove_unused_columns(self.train_dataset)
        rows = rows.select(longest_rows(rows, self.args.per_device_train_batch_size))
        self._mark()
        try:
            yield self._prepare_inputs(self.data_collator(list(rows)))
        finally:
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

    def after_optimizer_step(self) -> None:
        """Look at the weights, before anything is made of them.

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
        rows = "; ".join(gathered(sources_of_batches(self.facts.rows, batches)))
        error = GuardError(
            f"{what} in step {self.state.global_step + 1}, on the rows {rows}",
            expected="a finite loss, gradient and weights",
            fix="lower train.learning_rate, or look at these rows" + self._what_is_kept(),
        )
        return raised_in_all(error)

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
            error = GuardError(
                f"the validation loss became {loss} after step {self.state.global_step}",
                expected="a finite loss",
                fix="lower train.learning_rate, or look at the validation rows" + self._what_is_kept(),
            )
            raise raised_in_all(error)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        if self.task_metric is not None:
            metric = self.task_metric
            value = from_main(lambda: self._measured(metric))
            if value is None:
                raise StopRequested
            output.metrics[metric.key] = value
        return output

    def _measured(self, metric: TaskMetric) -> float | None:
        """The metric; None where a signal came to this process, which alone measures."""

        def interrupt() -> None:
            if self.facts.stop_wanted():
                raise StopRequested

        try:
            return metric.measure(self.model, interrupt=interrupt)
        except StopRequested:
            return None
