"""Builds the trainer of a run, trains, and turns an interruption into the error that tells how to go on."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback
from trl import SFTConfig

from qlora_kit.errors import GuardError, Interrupted, QloraKitError
from qlora_kit.training.callbacks import (
    EXIT_CODES,
    GuardedTrainer,
    ProgressCallback,
    StopOnSignal,
    TrainingProgress,
)
from qlora_kit.training.checkpoints import Resumption
from qlora_kit.training.reporters import reporting
from qlora_kit.training.run_facts import RunFacts, StopRequested
from qlora_kit.training.settings import Start
from qlora_kit.training.strategies import Strategies, take_up_stopped_run

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def fit(
    model: PeftModel,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Dataset | None, Dataset | None],
    *,
    strategies: Strategies,
    start: Start,
    resumption: Resumption | None,
    progress: Callable[[TrainingProgress], None] | None,
) -> tuple[GuardedTrainer, float]:
    """Train; the trainer and the seconds it took.

    Args:
        model: With the first adapter on it.
        arguments: TRL's.
        tokenizer: The base's.
        rows: To train on, and for the validation loss.
        strategies: What the run does beyond TRL's trainer.
        start: What the run begins with.
        resumption: The checkpoint to go on from, or None.
        progress: Told after every step.

    Raises:
        GuardError: A loss, a gradient or a trained weight became non-finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    import datasets

    stop = StopOnSignal()
    datasets.disable_progress_bars()
    checkpoint = None if resumption is None else resumption.checkpoint
    masters = {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}
    with warnings.catch_warnings():  # TRL means to drop it in its next major version, which the kit does not take
        warnings.filterwarnings("ignore", "`label_smoothing_factor` is deprecated", FutureWarning)
        trainer = GuardedTrainer(
            model=model,
            args=arguments,
            train_dataset=rows[0],
            eval_dataset=rows[1],
            processing_class=tokenizer,
        )
    trainer.facts = RunFacts(
        stop.wanted,
        start.began_sha256,
        rows[0],
        refused=() if resumption is None else resumption.refused,
        changed=bool(start.changes),
        probe=not arguments.use_cpu,
    )
    if progress is not None:
        trainer.add_callback(ProgressCallback(progress, tokens_seen=lambda: trainer.tokens_seen))
    trainer.remove_callback(PrinterCallback)  # it writes to stdout, which holds results only
    _put_back_master_weights(model, masters)
    strategies.attach(trainer)
    began = time.monotonic()
    if checkpoint is not None and strategies.had_stopped_at(checkpoint):
        take_up_stopped_run(trainer, checkpoint)
        return trainer, time.monotonic() - began
    folder = Path(arguments.output_dir)
    with stop.listening(), reporting(arguments.report_to, folder, name=arguments.run_name or folder.name):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except StopRequested:
            trainer.save_stopped()
            raise _interrupted(stop, trainer) from None
        except torch.OutOfMemoryError as error:  # in an evaluation: training steps make room by themselves
            raise _no_room_to_evaluate(trainer, str(error).splitlines()[0]) from error
    if stop.received is not None and trainer.on_disk:  # otherwise what was trained would be lost
        raise _interrupted(stop, trainer)
    seconds = time.monotonic() - began
    _require_finite_weights(model)
    return trainer, seconds


def _no_room_to_evaluate(trainer: GuardedTrainer, reason: str) -> GuardError:
    saved = trainer.save_stopped()
    return GuardError(
        f"out of memory in the evaluation after step {trainer.state.global_step} ({reason})",
        expected="memory for a batch of validation rows, or of answers to them",
        fix="lower train.per_device_eval_batch_size (or eval.batch_size, where answers are measured)"
        + ("; the steps are saved: go on with --resume --allow-changed and that key" if saved else ""),
    )


def _put_back_master_weights(model: PeftModel, masters: Mapping[str, torch.Tensor]) -> None:
    """Undo TRL's cast of the adapter to bf16, which loses small updates and rounds the weights that it begins with."""
    for name, parameter in model.named_parameters():
        if name in masters:
            parameter.data = masters[name].to(parameter.device)


def _require_finite_weights(model: PeftModel) -> None:
    """What is published is looked at once more.

    Raises:
        GuardError: A trained weight is NaN or infinite.
    """
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise GuardError(
            f"{len(broken)} trained tensors hold values that are not finite, the first is {broken[0]}",
            expected="finite weights",
            fix="lower train.learning_rate",
        )


def _interrupted(stop: StopOnSignal, trainer: GuardedTrainer) -> QloraKitError:
    signal_name = "a signal to another process" if stop.received is None else stop.received.name
    saved = trainer.on_disk
    error = Interrupted(
        f"stopped by {signal_name} after step {trainer.state.global_step} of {trainer.state.max_steps}",
        expected="the run to end by itself",
        fix="go on from the checkpoint of this step with --resume" if saved else "start again: no step was done yet",
    )
    if stop.received is not None:
        error.exit_code = EXIT_CODES[stop.received]
    return error
