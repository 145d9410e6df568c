"""What a trainer is told of its run, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.training.checkpoints import Refusal

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RunFacts:
    """What the trainer is told of its run.

    Attributes:
        stop_wanted: Whether a signal asked to stop.
        settings_sha256: Of the settings that the run began with.
        rows: The training rows with their sources, before packing.
        refused: Checkpoints that were refused when the run was resumed.
        changed: Whether settings were allowed to change since the run began.
        probe: Whether to try the longest batch before the first step.
    """

    stop_wanted: Callable[[], bool]
    settings_sha256: str
    rows: Dataset
    refused: tuple[Refusal, ...] = ()
    changed: bool = False
    probe: bool = False


class StopRequested(Exception):
    """Leaves the training loop between two micro-batches."""
