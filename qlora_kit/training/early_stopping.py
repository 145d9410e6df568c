"""Early stopping, decided by the log of evaluations alone: every checkpoint has it, so a resumed run stops alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass(frozen=True)
class Patience:
    """When a run has stopped getting better.

    Attributes:
        key: Name of the watched value in a log line, such as ``eval_loss``.
        higher_is_better: Its direction.
        evaluations: So many in a row without a better value end the run.
        threshold: A value counts as better if it is better by more than this.
    """

    key: str
    higher_is_better: bool
    evaluations: int
    threshold: float

    def exhausted(self, history: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the last ``evaluations`` evaluations of a log brought nothing better than the best before them."""
        sign = 1 if self.higher_is_better else -1
        values = {line["step"]: sign * line[self.key] for line in history if self.key in line}  # a step counts once
        best, stale = float("-inf"), 0
        for step in sorted(values):
            if values[step] > best + self.threshold:
                best, stale = values[step], 0
            else:
                stale += 1
        return stale >= self.evaluations


class EarlyStopping(TrainerCallback):
    """Ends a run after the evaluation that exhausts its patience."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._patience.exhausted(state.log_history):
            control.should_training_stop = True
