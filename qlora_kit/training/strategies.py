"""The strategies of one run, put onto its trainer: parameter groups, unfreezing, the task's metric, early stopping."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import TrainerState
from trl import SFTConfig

from qlora_kit.config import RunConfig, TrainSection
from qlora_kit.errors import ConfigError
from qlora_kit.training.early_stopping import EarlyStopping, Patience
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.optimizers import grouped_optimizer, rehearse_optimizer
from qlora_kit.training.position import Position
from qlora_kit.training.task_metric import TaskMetric, task_metric
from qlora_kit.training.unfreezing import GradualUnfreezing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Strategies:
    """What a run does beyond TRL's trainer.

    Attributes:
        section: The ``train`` section.
        metric: What best means; None for the validation loss.
        patience: When to stop early; None for never.
    """

    section: TrainSection
    metric: TaskMetric | None
    patience: Patience | None

    def attach(self, trainer: GuardedTrainer) -> None:
        """Give the strategies to a trainer that has not begun yet."""
        optimizer = grouped_optimizer(trainer, self.section)
        if optimizer is not None:
            trainer.optimizer = optimizer
        if self.section.unfreeze_layers_every is not None:
            trainer.add_callback(GradualUnfreezing(trainer.model, self.section.unfreeze_layers_every))
        trainer.task_metric = self.metric
        trainer.checkpointed_layers = self.section.checkpointed_layers
        if self.patience is not None:
            trainer.add_callback(EarlyStopping(self.patience))

    def had_stopped_at(self, checkpoint: Path) -> bool:
        """Whether the run that saved ``checkpoint`` ended there because its patience was exhausted."""
        if self.patience is None:
            return False
        return self.patience.exhausted(TrainerState.load_from_json(str(checkpoint / STATE_FILE)).log_history)


def checked_strategies(
    config: RunConfig, arguments: SFTConfig, device: torch.device, tokenizer: PreTrainedTokenizerBase
) -> Strategies:
    """The strategies of a run, tried as far as that goes without the base.

    Raises:
        ConfigError: An optimizer or scheduler does not run here, unfreezing is asked for on several processes, or the
            validation rows hold no answers for the metric.
        DataError: Validation rows cannot be used.
    """
    rehearse_optimizer(arguments, device)
    train = config.train
    if train.unfreeze_layers_every is not None and arguments.world_size > 1:
        raise ConfigError(
            f"train.unfreeze_layers_every: is set, and {arguments.world_size} processes train together",
            expected="one process: the others would wait for the gradients of frozen layers",
            fix="remove train.unfreeze_layers_every, or start without accelerate launch",
        )
    metric = task_metric(config, tokenizer)
    patience = None
    if train.early_stopping_patience is not None:
        patience = Patience(
            key=train.metric_for_best_model if metric is None else metric.key,
            higher_is_better=bool(arguments.greater_is_better),
            evaluations=train.early_stopping_patience,
            threshold=train.early_stopping_threshold,
        )
    return Strategies(train, metric, patience)


def take_up_stopped_run(trainer: GuardedTrainer, checkpoint: Path) -> None:
    """Bring a trainer to where a run had stopped early: its state, and the adapter that it kept."""
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    trainer.state = state
    trainer.was_fused = Position.read(checkpoint).fused
    best = checkpoint.parent / f"checkpoint-{state.best_global_step}"
    kept = best if trainer.args.load_best_model_at_end and best.is_dir() else checkpoint
    trainer.model.load_adapter(str(kept), "default", is_trainable=True)
