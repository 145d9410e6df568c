"""Gradual unfreezing of the adapters from the top (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146).

Which layers are trained is a function of the number of steps alone, so that a resumed run is the same run. A frozen
adapter takes no gradient: the optimizer passes it over, with neither weight decay nor moments, and the backward pass
ends at the lowest layer that is trained.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.training.optimizers import depth_of

if TYPE_CHECKING:
    from peft import PeftModel

logger = logging.getLogger(__name__)


class GradualUnfreezing(TrainerCallback):
    """Trains the top layer first, and one layer more after every ``every`` optimizer steps.

    Args:
        model: With its adapter; what is trainable now is what becomes trainable.
        every: Optimizer steps.
    """

    def __init__(self, model: PeftModel, every: int) -> None:
        self._every = every
        layers = model.config.num_hidden_layers
        self._depths = [
            (parameter, depth_of(name, layers))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]

    @property
    def last_start(self) -> int:
        """The step after which everything is trained."""
        return max(depth for _, depth in self._depths) * self._every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.last_start >= state.max_steps:
            never = sorted({depth for _, depth in self._depths if depth * self._every >= state.max_steps})
            logger.warning(
                "train.unfreeze_layers_every: the %d steps of the run end before the %d lowest layers are trained",
                state.max_steps,
                len(never),
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter, depth in self._depths:
            parameter.requires_grad_(depth * self._every <= state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for parameter, _ in self._depths:
            parameter.requires_grad_(True)
