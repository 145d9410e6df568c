"""Gradient checkpointing of a model's first decoder layers alone: the others keep their activations, and are faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import TrainSection
from qlora_kit.memory.workload import require_no_more_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_layers(train: TrainSection, ref: BaseRef) -> None:
    """Compare ``train.checkpointed_layers`` with the base's ``config.json``.

    Raises:
        ConfigError: It names more layers than the base has.
    """
    layers = read_model_config(ref).get("num_hidden_layers")
    if isinstance(layers, int):
        require_no_more_layers(train.checkpointed_layers, layers, base=ref.id)


def checkpoint_first_layers(model: PreTrainedModel, count: int) -> None:
    """Where gradient checkpointing is on: turn it off for all decoder layers but the first ``count``.

    The first ones, since what the others keep is free again when the backward pass comes to them.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[count:]:
        layer.gradient_checkpointing = False
