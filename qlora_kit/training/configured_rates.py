"""Keeps what the configuration says of learning rate, decay and betas when an older optimizer state is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from qlora_kit.errors import ConfigError


@dataclass(frozen=True)
class ConfiguredRates:
    """The settings of a fresh optimizer and scheduler, which loading a checkpoint would replace by its own.

    Attributes:
        groups: Settings of each parameter group, without its learning rate.
        base_rates: The highest learning rate of each group.
    """

    groups: list[dict[str, Any]]
    base_rates: list[float]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, scheduler: Any, *, name: str) -> ConfiguredRates:
        """Those of ``optimizer`` and of the ``scheduler`` called ``name``, before a checkpoint is loaded.

        Raises:
            ConfigError: The schedule is not computed from the step alone.
        """
        if not isinstance(scheduler, LambdaLR):
            raise ConfigError(
                f"--allow-changed with train.lr_scheduler_type {name}, which has a state of its own",
                expected="a schedule that is computed from the step",
                fix="set the changed values back, or start again with --overwrite",
            )
        kept = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
        return cls(kept, [float(rate) for rate in scheduler.base_lrs])

    def apply(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
        """Put them back, with the learning rates of the step that was loaded."""
        step = scheduler.last_epoch
        rates = [rate * share(step) for rate, share in zip(self.base_rates, scheduler.lr_lambdas, strict=True)]
        scheduler.base_lrs = [*self.base_rates]
        scheduler._last_lr = [*rates]
        for group, settings, rate in zip(optimizer.param_groups, self.groups, rates, strict=True):
            group.update(settings, lr=rate)
