"""The task's own metric during training: answers to some validation rows, scored as ``qlora-kit eval`` scores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.config import RunConfig
from qlora_kit.config.train_section import EVAL_LOSS
from qlora_kit.data.chat import control_tokens, render_prompts, stop_token_ids
from qlora_kit.data.preparing import prepare
from qlora_kit.errors import ConfigError
from qlora_kit.formats import Example
from qlora_kit.reference_answers import with_system
from qlora_kit.scoring import score_task
from qlora_kit.tasks import Task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskMetric:
    """A metric and the rows that it is measured on.

    Attributes:
        name: In ``metrics.METRICS``.
        task: The task, with this metric alone.
        examples: Validation rows.
        tokenizer: The base's.
        batch_size: Prompts answered at once.
    """

    name: str
    task: Task
    examples: tuple[Example, ...]
    tokenizer: PreTrainedTokenizerBase
    batch_size: int

    @property
    def key(self) -> str:
        """Its name in a log line."""
        return f"eval_{self.name}"

    def measure(self, model: PeftModel, *, interrupt: Callable[[], None]) -> float:
        """The metric of greedy answers. No random number is drawn, and the model keeps its mode.

        Args:
            model: With the adapter active.
            interrupt: Called after each token and each batch; what it raises ends the measuring.
        """
        scores = score_task(
            model,
            self.tokenizer,
            self.examples,
            self.task,
            batch_size=self.batch_size,
            stop_token_ids=stop_token_ids(self.tokenizer),
            progress=lambda done, total: interrupt(),
            interrupt=interrupt,
        )
        return float(scores.score(self.name).value)


def task_metric(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> TaskMetric | None:
    """What ``train.metric_for_best_model`` asks for; None where it is the validation loss.

    Raises:
        DataError: Validation rows cannot be used.
        ConfigError: There is nothing to answer in them.
    """
    name = config.train.metric_for_best_model
    if name == EVAL_LOSS:
        return None
    only = {"train": (), "test": (), "mix": ()}
    data = config.data.model_copy(update=only)
    rows = prepare(config.model_copy(update={"data": data}), control_tokens=control_tokens(tokenizer)).validation
    examples = spread(rows, config.train.metric_rows)
    if not examples or any(len(example.messages) < 2 for example in examples):
        raise ConfigError(
            f"train.metric_for_best_model: {name} is scored on answers, and the validation rows hold none",
            expected="validation rows with a prompt and an answer",
            fix="give such rows in data.validation, or set train.metric_for_best_model=eval_loss",
        )
    task = replace(config.task_spec(), metrics=(name,))
    prompts = [with_system(example.messages, task.system_prompt)[:-1] for example in examples]
    render_prompts(prompts, tokenizer)  # a prompt that the template refuses must not stop the run in its middle
    return TaskMetric(name, task, examples, tokenizer, config.eval.batch_size)


def spread(rows: Sequence[Example], count: int) -> tuple[Example, ...]:
    """``count`` rows at even distances, the same in every run: files are often sorted by their answers."""
    count = min(count, len(rows))
    return tuple(rows[index * len(rows) // count] for index in range(count))
