"""How far a training run is, told to people after every step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.training.peak_memory import peak_memory_bytes


@dataclass(frozen=True)
class TrainingProgress:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        total_steps: Of all.
        loss: Mean training loss since the last log line; None before the first.
        eval_loss: Latest validation loss; None before the first.
        learning_rate: Of the last step.
        tokens: Tokens that went through the model since the program was started, padding left out.
        seconds: Since that part began.
        peak_bytes: Peak memory so far: allocated on the GPU, else resident in the process.
    """

    step: int
    total_steps: int
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    tokens: int
    seconds: float
    peak_bytes: int


class ProgressCallback(TrainerCallback):
    """Tells a function how far the run is: at its begin, after each step and each evaluation."""

    def __init__(self, tell: Callable[[TrainingProgress], None], *, tokens_seen: Callable[[], int]) -> None:
        self._tell = tell
        self._tokens_seen = tokens_seen
        self._began = time.monotonic()
        self._latest: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.monotonic()
        self._report(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._latest |= logs or {}
        self._report(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._report(state)

    def _report(self, state: TrainerState) -> None:
        latest = self._latest
        self._tell(
            TrainingProgress(
                step=state.global_step,
                total_steps=state.max_steps,
                loss=latest.get("loss"),
                eval_loss=latest.get("eval_loss"),
                learning_rate=latest.get("learning_rate"),
                tokens=self._tokens_seen(),
                seconds=time.monotonic() - self._began,
                peak_bytes=peak_memory_bytes(),
            )
        )
