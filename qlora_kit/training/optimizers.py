"""The optimizer of a run: parameter groups for LoRA+ and layer-wise decay; a rehearsal before the base is loaded."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import Trainer
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from qlora_kit.config import TrainSection
from qlora_kit.errors import ConfigError

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.([0-9]+)\.")
_EMBEDDING = re.compile(r"\.(?:embed_tokens|wte)\.")
_REHEARSAL_SHAPE = (64, 64)  # bitsandbytes keeps 8-bit states of tensors with 4096 numbers or more
_REHEARSAL_STEPS = 100
_OPTIMIZER_ERRORS = (ImportError, ValueError, TypeError, RuntimeError, AttributeError, KeyError)
_GIVEN_BY_THE_TRAINER = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}


def depth_of(name: str, layers: int) -> int:
    """How many layers below the top a parameter sits: 0 for the top layer and the head, ``layers`` for the embedding.

    Args:
        name: The parameter's name in the model.
        layers: How many transformer layers the model has.
    """
    layer = _LAYER.search(name)
    if layer is not None:
        return layers - 1 - int(layer[1])
    return layers if _EMBEDDING.search(name) else 0


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]],
    *,
    layers: int,
    train: TrainSection,
    weight_decays: Callable[[str], float],
) -> list[dict[str, Any]]:
    """Groups of trained parameters with a learning rate each, in an order that depends on the names alone.

    LoRA+ (Hayou et al. 2024, https://arxiv.org/abs/2402.12354) multiplies the rate of ``lora_B``, and of vectors such
    as DoRA's magnitudes, by ``loraplus_lr_ratio``, as PEFT does. A layer's rate is ``layerwise_lr_decay`` times that of
    the layer above it (Howard & Ruder 2018, https://arxiv.org/abs/1801.06146); the embedding comes lowest.
    The first group has the rate ``learning_rate`` itself where any parameter has: it is the one that is logged.

    Args:
        named: Name and parameter; those that are not trained are left out.
        layers: How many transformer layers the model has.
        train: Learning rate, ratio and decay.
        weight_decays: The weight decay of a parameter, by its name.
    """
    ratio = 1.0 if train.loraplus_lr_ratio is None else train.loraplus_lr_ratio
    decay = 1.0 if train.layerwise_lr_decay is None else train.layerwise_lr_decay
    groups: dict[tuple[int, bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            is_b = "lora_B" in name or parameter.ndim == 1
            key = (depth_of(name, layers) if decay != 1 else 0, is_b, weight_decays(name))
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[depth, is_b, weight_decay],
            "lr": train.learning_rate * decay**depth * (ratio if is_b else 1.0),
            "weight_decay": weight_decay,
        }
        for depth, is_b, weight_decay in sorted(groups)
    ]


def grouped_optimizer(trainer: Trainer, train: TrainSection) -> torch.optim.Optimizer | None:
    """The optimizer with ``parameter_groups``; None where all parameters have one rate, as transformers makes it."""
    if train.loraplus_lr_ratio is None and train.layerwise_lr_decay is None:
        return None
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    groups = parameter_groups(
        trainer.model.named_parameters(),
        layers=trainer.model.config.num_hidden_layers,
        train=train,
        weight_decays=lambda name: trainer.args.weight_decay if name in decayed else 0.0,
    )
    optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **arguments)
    return optimizer


def rehearse_optimizer(arguments: SFTConfig, device: torch.device) -> None:
    """Make the optimizer and the scheduler of a run on one small tensor, and take a step.

    Raises:
        ConfigError: The optimizer is not there or does not run on this device; the scheduler lacks arguments.
    """
    name = OptimizerNames(arguments.optim).value
    if "paged" in name and device.type != "cuda":
        logger.warning("train.optim %s: there is no paged memory on the CPU, its states lie there as any", name)
    tensor = torch.nn.Parameter(torch.zeros(_REHEARSAL_SHAPE, device=device))
    try:
        with warnings.catch_warnings(action="ignore"):  # bitsandbytes warns of the same for each tensor
            optimizer_class, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
            optimizer = optimizer_class([{"params": [tensor]}], **keywords)
            tensor.grad = torch.zeros_like(tensor)
            optimizer.step()
    except _OPTIMIZER_ERRORS as error:
        raise ConfigError(
            f"train.optim: {name} does not run here, on {device} ({error})",
            expected="an optimizer whose package is installed and that has an implementation for this device",
            fix="set train.optim=adamw_torch or another one, or install what the message names; see train.optim_args",
        ) from error
    _rehearse_scheduler(arguments, optimizer)


def _rehearse_scheduler(arguments: SFTConfig, optimizer: torch.optim.Optimizer) -> None:
    kind = SchedulerType(arguments.lr_scheduler_type)
    try:
        scheduler = get_scheduler(
            kind,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(_REHEARSAL_STEPS),
            num_training_steps=_REHEARSAL_STEPS,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        taken = ", ".join(_scheduler_arguments(kind))
        raise ConfigError(
            f"train.lr_scheduler_type: {kind.value} cannot be made ({error})",
            expected=f"train.lr_scheduler_kwargs with what it needs, of {taken}",
            fix=f"write train.lr_scheduler_kwargs: {{{_EXAMPLES.get(kind, 'NAME: VALUE')}}}, or take another scheduler",
        ) from error
    if isinstance(scheduler, GreedyLR) and min(scheduler.min_lrs) >= arguments.learning_rate:
        raise ConfigError(
            f"train.lr_scheduler_type: greedy never goes below its min_lr {min(scheduler.min_lrs):g}, and "
            f"train.learning_rate is {arguments.learning_rate:g}",
            expected="a min_lr below the learning rate",
            fix=f"write train.lr_scheduler_kwargs: {{min_lr: {arguments.learning_rate / 100:g}}}",
        )


_EXAMPLES: Mapping[SchedulerType, str] = {
    SchedulerType.WARMUP_STABLE_DECAY: "num_decay_steps: 100",
    SchedulerType.COSINE_WITH_MIN_LR: "min_lr_rate: 0.1",
    SchedulerType.COSINE_WARMUP_WITH_MIN_LR: "min_lr_rate: 0.1",
}


def _scheduler_arguments(kind: SchedulerType) -> list[str]:
    made_by = {
        SchedulerType.REDUCE_ON_PLATEAU: torch.optim.lr_scheduler.ReduceLROnPlateau,
        SchedulerType.GREEDY: GreedyLR,
    }.get(kind, TYPE_TO_SCHEDULER_FUNCTION[kind])
    return [name for name in inspect.signature(made_by).parameters if name not in _GIVEN_BY_THE_TRAINER]
