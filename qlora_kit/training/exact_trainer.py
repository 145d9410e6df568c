"""TRL's trainer, stoppable after any micro-batch and resumable from there to the same bits: checkpoints are whole."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerControl
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from trl import SFTTrainer

from qlora_kit.errors import GuardError
from qlora_kit.training.checkpoints import refusal, retire, saving, size_bytes, write_manifest
from qlora_kit.training.configured_rates import ConfiguredRates
from qlora_kit.training.fast_switch import FastSwitch, card_of
from qlora_kit.training.moments import Moments
from qlora_kit.training.position import EPOCH_RANDOM_FILE, Position, RandomState, Sums
from qlora_kit.training.processes import in_any_process
from qlora_kit.training.run_facts import RunFacts, StopRequested

if TYPE_CHECKING:
    from collections.abc import Iterator


class _NothingLeft(Exception):
    """The resumed step was the last one."""


class ExactTrainer(SFTTrainer):
    """TRL's trainer whose checkpoints appear whole, with a manifest, and resume to the bit.

    A stop is acted upon before the next micro-batch, in training and in an evaluation: the micro-batches of an
    unfinished step are forgotten, and ``save_stopped`` saves the state after the last optimizer step.
    """

    facts: RunFacts
    control: TrainerControl
    pieces = 1
    """Into how many pieces each micro-batch is split, since the whole did not fit into memory."""
    recomputes = False
    """Whether activations are computed again in the backward pass for that reason."""
    fast: FastSwitch | None = None
    """The fused path; None where it cannot be used."""
    was_fused = False
    """Whether the run that is over took it."""
    _saving_into: Path | None = None
    _resumed_from: Path | None = None
    _earlier: Position | None = None  # where the resumed run stood
    _due: Position | None = None  # the same, as long as that run still owes an evaluation or the end of an epoch
    _epoch_over = False  # whether the callbacks know that the epoch has ended
    _last_step: tuple[float | None, float | None] = (None, None)  # gradient norm and learning rate
    _saved_step = 0
    _saved_bytes = 0
    _epoch_random: RandomState | None = None
    _before_step: Sums | None = None
    _marked = False  # whether ``_before_step`` holds for the step that comes next already
    _began = 0.0

    # --- stopping ---

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            self._resumed_from = Path(resume_from_checkpoint)
            self.args.eval_on_start = False  # the run that was stopped has made it
        self.add_callback(Moments(self.restore_position, self.after_optimizer_step, self.note_epoch_end))
        self._began = time.time()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._stop_if_wanted()
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self._stop_if_wanted()
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's; whatever goes wrong in it, the steps before it are saved."""
        self._mark()
        done = False
        try:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            done = True
        finally:
            if not done and self.accelerator.num_processes == 1:  # of several, the others may not know of it
                self.save_stopped()
        return metrics

    def _stop_if_wanted(self) -> None:
        """Leave the loop, in all processes at once."""
        if self.stop_wanted():
            raise StopRequested

    def stop_wanted(self) -> bool:
        """Whether a signal came, to any process; each must ask."""
        return in_any_process(self.facts.stop_wanted(), self.accelerator.device)

    def save_stopped(self) -> bool:
        """After ``StopRequested``: save the state after the last optimizer step, if that is not on disk already.

        Returns:
            Whether there is a checkpoint to resume from; none before the first optimizer step.
        """
        if self.state.global_step > self._saved_step:
            if self._before_step is not None:
                self._put_back(self._before_step)
            self._save_checkpoint(self.model, None)
        return self.on_disk

    @property
    def on_disk(self) -> bool:
        """Whether the last optimizer step has its checkpoint."""
        return 0 < self._saved_step == self.state.global_step

    def _mark(self) -> None:
        """Remember the state between two optimizer steps."""
        self._before_step = Sums(
            RandomState.current(),
            self._tr_loss.clone(),
            {name: list(values) for name, values in self._metrics["train"].items()},
            self._total_train_tokens,
            (self.state.total_flos, self.current_flos),
            self.state.num_input_tokens_seen,
        )

    def _put_back(self, sums: Sums) -> None:
        self._tr_loss = sums.running_loss.clone()
        self._rewind(sums)
        self.state.total_flos, self.current_flos = sums.flos
        self.state.num_input_tokens_seen = sums.input_tokens

    def _rewind(self, sums: Sums) -> None:
        """Put back what the micro-batches of a step change, but for the sum of their losses."""
        sums.random.restore()
        self._metrics["train"] = defaultdict(list, {name: [*values] for name, values in sums.metrics.items()})
        self._total_train_tokens = sums.tokens

    def recompute_activations(self) -> None:
        """Turn gradient checkpointing on."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.recomputes = True

    # --- the loop's own seams, in the order in which a run meets them ---

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._resumed_from is not None and not float(self.state.epoch or 0).is_integer():
            # The order of the epoch's rows may be drawn from the state at its beginning.
            self._epoch_random = RandomState.load(self._resumed_from / EPOCH_RANDOM_FILE)
            self._epoch_random.restore()
            self._resumed_from = None
        else:
            self._epoch_random = RandomState.current()
        self._mark()
        self._marked = True
        try:
            super()._run_epoch(*args, **kwargs)
        except _NothingLeft:
            self.control.should_training_stop = True

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        if not self._marked:
            self._mark()
        self._marked = False
        self._epoch_over = False
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        self._catch_up()
        if self._resumed_from is not None:  # at the beginning of an epoch
            self._epoch_random = RandomState.current()
            self._resumed_from = None
            self._marked = True
        self._mark()
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            raise _NothingLeft

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any
    ) -> None:
        self._last_step = (None if grad_norm is None else float(grad_norm), learning_rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _catch_up(self) -> None:
        """Do what the resumed run still owes after its last step: an evaluation, the end of the epoch."""
        due, self._due = self._due, None
        if due is None:
            return
        if due.evaluate:
            self.control.should_evaluate, self.control.should_save = True, due.save
            self._finish_step(due)
        if due.epoch_end or self.control.should_training_stop:
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            self._finish_step(due)

    def _finish_step(self, due: Position) -> None:
        self._maybe_log_save_evaluate(
            self._tr_loss,
            due.grad_norm,
            self.model,
            None,
            self.state.epoch,
            None,
            self._began - due.seconds,
            learning_rate=due.learning_rate,
        )

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        if self._due is not None and self._resumed_from is not None:  # no epoch was left in which to do it
            super()._load_rng_state(str(self._resumed_from))
            self._catch_up()
        self._mark()
        self._stop_if_wanted()
        earlier_seconds = 0.0 if self._earlier is None else self._earlier.seconds
        return super()._finalize_training(trial, num_train_samples, start_time - earlier_seconds)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.facts.changed:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        configured = ConfiguredRates.of(self.optimizer, self.lr_scheduler, name=str(self.args.lr_scheduler_type))
        super()._load_optimizer_and_scheduler(checkpoint)
        configured.apply(self.optimizer, self.lr_scheduler)

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        found = refusal(best, settings_sha256=self.facts.settings_sha256, with_best=False)
        if found is not None:
            raise GuardError(
                f"the checkpoint of the best adapter was damaged while the run went on: {found}",
                expected="the files that were saved",
                fix="put the damaged files back from a copy and go on with --resume",
            )
        super()._load_best_model()

    # --- saving and restoring ---

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: a finished run writes its own card."""

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_into is None else str(self._saving_into)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save into a temporary sibling, hash every file, sync, rename into place, then retire old checkpoints."""
        folder, step = Path(self.args.output_dir), self.state.global_step
        target = folder / f"checkpoint-{step}"
        position = self._position()
        main = self.accelerator.is_main_process
        with ExitStack() as stack:
            temporary = None
            if main:
                temporary = stack.enter_context(saving(target, last_bytes=self._saved_bytes))
            self._saving_into = broadcast_object_list([temporary])[0]
            try:
                super()._save_checkpoint(model, trial)
            finally:
                written, self._saving_into = self._saving_into, None
            self.accelerator.wait_for_everyone()
            if main:
                self._complete_checkpoint(written / target.name, written, position)
        self.accelerator.wait_for_everyone()
        self._name_best()
        self._saved_step = step
        if main:
            self._saved_bytes = size_bytes(target)
            retire(folder, limit=self.args.save_total_limit, newest=target, refused=self.facts.refused)

    def _complete_checkpoint(self, written: Path, checkpoint: Path, position: Position) -> None:
        """Move the trainer's files up, add the kit's own, and the manifest last."""
        for path in sorted(written.iterdir()):
            path.rename(checkpoint / path.name)
        written.rmdir()
        (checkpoint / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads
        best = self._name_best()
        self.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
        position.write(checkpoint)
        if self._epoch_random is not None:
            self._epoch_random.save(checkpoint / EPOCH_RANDOM_FILE)
        write_manifest(
            checkpoint, step=self.state.global_step, best_step=best, settings_sha256=self.facts.settings_sha256
        )

    def _position(self) -> Position:
        earlier_seconds = 0.0 if self._earlier is None else self._earlier.seconds
        last_of_epoch = float(self.state.epoch or 0).is_integer() or self.control.should_training_stop
        return Position(
            evaluate=self.control.should_evaluate,
            save=self.control.should_evaluate and self.control.should_save,
            epoch_end=last_of_epoch and not self._epoch_over,
            grad_norm=self._last_step[0],
            learning_rate=self._last_step[1],
            running_loss=self.accelerator.reduce(self._tr_loss, reduction="mean").item(),
            total_loss=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
            metrics={name: list(values) for name, values in self._metrics["train"].items()},
            tokens=self._total_train_tokens,
            seconds=earlier_seconds + time.time() - self._began,
            pieces=self.pieces,
            recomputes=self.recomputes,
            fused=self.fast is not None and self.fast.fuses,
            card=card_of(self.accelerator.device),
        )

    def after_optimizer_step(self) -> None:
        """Nothing; for what must be looked at before anything is made of the new weights."""

    def note_epoch_end(self) -> None:
        """What is saved from now on owes no end of the epoch."""
        self._epoch_over = True

    def restore_position(self) -> None:
        """Put back what the trainer itself does not keep in a checkpoint."""
        if self._resumed_from is None:
            return
        position = self._earlier = Position.read(self._resumed_from)
        self._due = position if position.evaluate or position.epoch_end else None
        self._last_step = (position.grad_norm, position.learning_rate)
        self.pieces = position.pieces
        if position.recomputes:
            self.recompute_activations()
        self._saved_step = self.state.global_step
        self._saved_bytes = size_bytes(self._resumed_from)
        self._tr_loss += position.running_loss
        self._total_loss_scalar = position.total_loss
        self._globalstep_last_logged = position.last_logged_step
        self._initial_global_step = 0  # the mean loss is that of the whole run
        self._metrics["train"] = defaultdict(list, position.metrics)
        self._total_train_tokens = position.tokens
        self._name_best()  # the run folder may have been moved

    def _name_best(self) -> int | None:
        """The step of the best adapter so far, if it has a checkpoint, whose name the state then knows."""
        best, folder = self.state.best_global_step, self.args.output_dir
        if best != self.state.global_step and not Path(folder, f"checkpoint-{best}").is_dir():
            best = None
        self.state.best_model_checkpoint = None if best is None else f"{folder}/checkpoint-{best}"
        return best
