"""Builds the trainer of a run, trains, and turns an interruption into the error that tells how to go on."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PrinterCallback
from trl import SFTConfig

from qlora_kit.errors import GuardError, Interrupted
from qlora_kit.launched import is_main_process
from qlora_kit.training.checkpoints import Resumption
from qlora_kit.training.fast_switch import MEASURED_ON, FastSwitch
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.processes import raised_in_all
from qlora_kit.training.progress import ProgressCallback, TrainingProgress
from qlora_kit.training.reporters import reporting
from qlora_kit.training.run_facts import RunFacts, StopRequested
from qlora_kit.training.schedule import check_schedule, steps_of_run
from qlora_kit.training.settings import Start
from qlora_kit.training.sharding import shard_base
from qlora_kit.training.stopping import StopOnSignal
from qlora_kit.training.strategies import Strategies, take_up_stopped_run

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def fit(
    model: PeftModel,
    arguments: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[Dataset | None, Dataset | None],
    *,
    strategies: Strategies,
    start: Start,
    stop: StopOnSignal,
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
        stop: Notes a signal.
        resumption: The checkpoint to go on from, or None.
        progress: Told after every step.

    Raises:
        GuardError: A loss, a gradient or a trained weight became non-finite.
        Interrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    import datasets

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
    if arguments.packing:  # only now it is known how many sequences there are
        steps = steps_of_run(arguments, len(trainer.train_dataset), processes=trainer.accelerator.num_processes)
        check_schedule(strategies.section, arguments, steps)
    strategies.attach(trainer)
    if strategies.section.shard_base:
        shard_base(model, model.device)
    began = time.monotonic()
    if checkpoint is not None and strategies.had_stopped_at(checkpoint):
        take_up_stopped_run(trainer, checkpoint)
        return trainer, time.monotonic() - began
    folder = Path(arguments.output_dir)
    reporters = arguments.report_to if is_main_process() else ()
    with (
        stop.listening(),
        reporting(reporters, folder, name=arguments.run_name or folder.name),
        _fast_training(trainer, model, arguments, mode=strategies.section.fast),
    ):
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except StopRequested:
            trainer.save_stopped()
            raise _stopped(stop, trainer) from None
        except torch.OutOfMemoryError as error:  # in an evaluation: training steps make room by themselves
            raise _no_room_to_evaluate(trainer, str(error).splitlines()[0]) from error
    if trainer.stop_wanted() and trainer.on_disk:  # otherwise what was trained would be lost
        raise _stopped(stop, trainer)
    seconds = time.monotonic() - began
    _require_finite_weights(model)
    return trainer, seconds


def _stopped(stop: StopOnSignal, trainer: GuardedTrainer) -> Interrupted:
    state = trainer.state
    return raised_in_all(stop.in_training(step=state.global_step, steps=state.max_steps, saved=trainer.on_disk))


@contextmanager
def _fast_training(trainer: GuardedTrainer, model: PeftModel, arguments: SFTConfig, *, mode: str) -> Iterator[None]:
    """Inside the block the trainer has the fused path as ``train.fast`` (``mode``) and other settings allow it."""
    refused = {
        "several processes train together": arguments.world_size > 1,
        "train.torch_compile is set": arguments.torch_compile,
        "train.use_liger_kernel is set": arguments.use_liger_kernel,
        "train.activation_offloading is set": arguments.activation_offloading,
    }
    reasons = [reason for reason, holds in refused.items() if holds]
    if mode != "off" and reasons:
        logger.warning("train.fast: nothing is fused: %s", ", ".join(reasons))
    if mode == "off" or reasons:
        yield
        return
    undecided = mode == "auto" and model.device.type not in MEASURED_ON
    trainer.fast = FastSwitch(model, undecided=undecided)
    try:
        if not undecided:
            trainer.fast.use(True)
            trainer.fast.tell()
        yield
    finally:
        trainer.was_fused = trainer.fast.fuses
        trainer.fast.use(False)
        trainer.fast = None


def _no_room_to_evaluate(trainer: GuardedTrainer, reason: str) -> GuardError:
    alone = trainer.accelerator.num_processes == 1  # the others take part in saving, and know of nothing
    saved = trainer.save_stopped() if alone else trainer.on_disk
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
