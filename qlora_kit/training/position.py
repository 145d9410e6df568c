"""Where a run stands between two optimizer steps, beyond weights and optimizer: random states, sums, what is due."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlora_kit.errors import OutputError
from qlora_kit.strict_json import read_json_object

POSITION_FILE = "position.json"
EPOCH_RANDOM_FILE = "rng_state_epoch.pth"
MAX_POSITION_BYTES = 1 << 26


@dataclass(frozen=True)
class RandomState:
    """The states of every random generator that training draws from.

    Attributes:
        python: Of ``random``.
        numpy: Of ``numpy.random``.
        cpu: Of torch.
        cuda: Of each GPU.
    """

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def current(cls) -> RandomState:
        """The states now."""
        return cls(
            random.getstate(),
            dict(np.random.get_state(legacy=False)),
            torch.random.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        )

    def restore(self) -> None:
        """Make them the states of the generators."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.random.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    def save(self, path: Path) -> None:
        """Write them as tensors and plain numbers, which load without unpickling code."""
        key = torch.from_numpy(self.numpy["state"]["key"].astype(np.int64))
        numpy = {**self.numpy, "state": {**self.numpy["state"], "key": key}}
        torch.save({"python": self.python, "numpy": numpy, "cpu": self.cpu, "cuda": self.cuda}, path)

    @classmethod
    def load(cls, path: Path) -> RandomState:
        """What ``save`` wrote."""
        values = torch.load(path, map_location="cpu", weights_only=True)
        numpy = values["numpy"]
        numpy["state"]["key"] = numpy["state"]["key"].numpy().astype(np.uint32)
        return cls(values["python"], numpy, values["cpu"], values["cuda"])


@dataclass(frozen=True)
class Position:
    """What a resumed run must know beside the trainer's own state to go on as if it had never stopped.

    Attributes:
        evaluate: The evaluation after this step is still to be made.
        save: A checkpoint is to be saved after that.
        epoch_end: The step was the last of its epoch, and what is done at an epoch's end is still to be done.
        grad_norm: Of this step; None where none was measured.
        learning_rate: Of this step.
        running_loss: Sum of the losses since the last log line.
        total_loss: Sum of all losses before that.
        last_logged_step: Of the last log line.
        metrics: TRL's running metrics since the last log line.
        tokens: Tokens of the whole run, as TRL counts them.
        seconds: Training time of the whole run.
        pieces: Into how many pieces micro-batches are split for want of memory.
        recomputes: Whether activations are computed again for want of memory.
        fused: Whether the fused path was in use.
        card: On which device that was (``card_of``).
    """

    evaluate: bool
    save: bool
    epoch_end: bool
    grad_norm: float | None
    learning_rate: float | None
    running_loss: float
    total_loss: float
    last_logged_step: int
    metrics: dict[str, list[float]] = field(default_factory=dict)
    tokens: float = 0.0
    seconds: float = 0.0
    pieces: int = 1
    recomputes: bool = False
    fused: bool = False
    card: str = ""

    def write(self, checkpoint: Path) -> None:
        """Write it into a checkpoint."""
        metrics = {name: [_json_number(value) for value in values] for name, values in self.metrics.items()}
        values = {**asdict(self), "metrics": metrics, "grad_norm": _json_number(self.grad_norm)}
        text = json.dumps(values, indent=1, allow_nan=False)
        (checkpoint / POSITION_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> Position:
        """That of a checkpoint which was verified."""
        fix = "resume from an earlier checkpoint, or start again"
        path = checkpoint / POSITION_FILE
        values = read_json_object(path, max_bytes=MAX_POSITION_BYTES, error=OutputError, fix=fix)
        metrics = {
            name: [math.nan if value is None else value for value in found] for name, found in values["metrics"].items()
        }
        return cls(**{**values, "metrics": metrics})


@dataclass(frozen=True)
class Sums:
    """The trainer's sums between two optimizer steps, to be put back when a step is given up half way."""

    random: RandomState
    running_loss: torch.Tensor
    metrics: dict[str, list[float]]
    tokens: float
    flos: tuple[float, float]
    input_tokens: Any


def _json_number(value: float | None) -> float | None:
    """JSON has no NaN: a metric (not the loss) may be one, and a gradient norm where fp16 overflowed."""
    return value if value is not None and math.isfinite(value) else None
