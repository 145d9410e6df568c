"""Score one task with one active model: checked rows in, each metric's value with its interval and every answer out.

Answers are generated greedily in left-padded batches. Labels are compared without the white space around them. The
perplexity is that of the reference answer and its stop token, under the mask that training uses. Of plain texts the
perplexity of the whole text is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.code_execution import ExecutionResult, run_answers
from qlora_kit.conversation import Example
from qlora_kit.data.chat import render_prompts
from qlora_kit.data.encoding import encode_texts
from qlora_kit.data.ledger import Problem, data_error, split_source
from qlora_kit.errors import ConfigError
from qlora_kit.generation import Completion, FinishReason, Sampling, generate
from qlora_kit.likelihood import answer_nlls
from qlora_kit.metrics import (
    METRICS,
    Score,
    perplexity,
    score_perplexity,
    score_rows,
    score_text,
    text_rows,
)
from qlora_kit.reference_answers import answer_texts, encode_answers, require_no_control_tokens, with_system
from qlora_kit.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOP_RATE = "stop_rate"
PASS_AT_1 = "pass@1"
PERPLEXITY = "perplexity"

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""


@dataclass(frozen=True)
class RowScore:
    """One scored row.

    Attributes:
        source: ``file:line``.
        prompt: The turn that was answered.
        reference: The row's own answer.
        prediction: What the model answered, without the stop token.
        finish_reason: ``stop`` when it ended by itself, ``length`` when the limit cut it; None for a plain text.
        score: The row by the task's first metric; by accuracy for ``macro_f1`` and by chrF for ``bleu``, which are
            not defined for one row.
        reason: Why a function did not pass; else empty.
    """

    source: str
    prompt: str
    reference: str
    prediction: str
    finish_reason: FinishReason | None
    score: float
    reason: str = ""


@dataclass(frozen=True)
class TaskScores:
    """What one model scored on one task.

    Attributes:
        scores: The task's metrics in their order, then ``stop_rate``, which plain texts do not have.
        rows: Every row, in the order given.
    """

    scores: tuple[Score, ...]
    rows: tuple[RowScore, ...]

    @property
    def stop_rate(self) -> float:
        """Share of the generated answers that ended by themselves."""
        return self.score(STOP_RATE).value

    def score(self, metric: str) -> Score:
        """The score by that metric.

        Raises:
            KeyError: It was not scored.
        """
        for score in self.scores:
            if score.metric == metric:
                return score
        raise KeyError(metric)


def scored_metrics(task: Task) -> tuple[str, ...]:
    """The task's metrics, the headline first, and ``stop_rate``."""
    return tuple(dict.fromkeys((*task.metrics, STOP_RATE)))


def check_scorable(examples: Sequence[Example], task: Task, *, allow_code_execution: bool) -> None:
    """Refuse, without any model, what could not be scored.

    Raises:
        ConfigError: The task runs generated code and nobody allowed it, or scores plain texts by their answers.
        DataError: Rows bring no assertions although the task is scored by them.
    """
    other_metrics = [metric for metric in task.metrics if metric != PERPLEXITY]
    if other_metrics and any(example.text is not None for example in examples):
        raise ConfigError(
            f"the task {task.name} is scored by {', '.join(other_metrics)}, but plain texts have no answers",
            expected=f"the metric {PERPLEXITY} alone",
            fix=f"set eval.metrics=[{PERPLEXITY}]",
        )
    if PASS_AT_1 not in task.metrics:
        return
    if not allow_code_execution:
        raise ConfigError(
            f"the task {task.name} is scored by {PASS_AT_1}, which runs the functions that the model writes",
            expected="your permission: they run on this machine, in child processes with limits on time, memory, files "
            "and processes, which stop mistakes but are no sandbox against malice",
            fix="give --allow-code-execution (in Python allow_code_execution=True), best inside a container; "
            "or leave the task or the metric out",
        )
    problems = []
    for example in examples:
        if not example.extra.get("tests"):
            file, line = split_source(example.source)
            expected = "a column 'tests' with the assertions that the function has to pass"
            problems.append(Problem(file, line, "no assertions to run", expected, "add them, or remove the row"))
    if problems:
        raise data_error(problems)


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    *,
    batch_size: int,
    stop_token_ids: Sequence[int],
    allow_code_execution: bool = False,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
    interrupt: Callable[[], None] | None = None,
) -> TaskScores:
    """Generate an answer for every row and score it by the task's metrics and by ``stop_rate``.

    Args:
        model: A causal language model with the wanted adapter active.
        tokenizer: The base's.
        examples: Rows that end with the reference answer (a row without system turn gets the task's), or plain texts.
        task: Says the metrics and the limit of an answer.
        batch_size: Rows at once; for the perplexity at most so many.
        stop_token_ids: Tokens that end an answer.
        allow_code_execution: Whether ``pass@1`` may run what the model writes.
        max_new_tokens: In place of the task's limit, in tokens.
        progress: Called while rows are generated, run and measured; each counts as a step.
        interrupt: Called before each batch of answers and after each of their tokens; what it raises ends the scoring.

    Raises:
        ConfigError: ``pass@1`` without permission, or plain texts and a metric of answers.
        DataError: Rows without assertions for ``pass@1``, with control tokens, or that the chat template refuses.
        GuardError: The model's logits are not finite.
        ValueError: There are no rows.
    """
    if not examples:
        raise ValueError("no rows to score")
    require_no_control_tokens(examples, tokenizer)
    check_scorable(examples, task, allow_code_execution=allow_code_execution)
    if examples[0].text is not None:
        return _score_texts(model, tokenizer, examples, batch_size=batch_size, progress=progress)
    metrics = scored_metrics(task)
    steps = _Steps(progress, len(examples) * (1 + (PASS_AT_1 in metrics) + (PERPLEXITY in metrics)))
    conversations = [with_system(example.messages, task.system_prompt) for example in examples]
    completions = generate(
        model,
        render_prompts(
            [messages[:-1] for messages in conversations], tokenizer, tools=[example.tools for example in examples]
        ),
        sampling=Sampling(max_new_tokens=task.max_new_tokens if max_new_tokens is None else max_new_tokens),
        stop_token_ids=stop_token_ids,
        pad_token_id=_pad_token_id(tokenizer, stop_token_ids),
        batch_size=batch_size,
        progress=steps.at,
        interrupt=interrupt,
    )
    steps.next_pass(len(examples))
    answers = _Answers(
        predictions=[tokenizer.decode(list(one.token_ids), skip_special_tokens=False) for one in completions],
        references=answer_texts(examples, conversations, tokenizer),
        stopped=[float(one.finish_reason == "stop") for one in completions],
    )
    if PASS_AT_1 in metrics:
        answers.verdicts = run_answers(answers.predictions, [example.extra["tests"] for example in examples], steps.at)
        steps.next_pass(len(examples))
    if PERPLEXITY in metrics:
        encoded = encode_answers(examples, conversations, tokenizer)
        pad_token_id = _pad_token_id(tokenizer, stop_token_ids)
        answers.tokens = [row.supervised_tokens for row in encoded]
        answers.nll_sums = answer_nlls(
            model, encoded, batch_size=batch_size, pad_token_id=pad_token_id, progress=steps.at
        )
    scores = tuple(answers.score(metric) for metric in metrics)
    return TaskScores(scores, _rows(examples, completions, answers, metrics[0]))


def _score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Progress | None,
) -> TaskScores:
    """The perplexity of plain texts; nothing is generated."""
    encoded = encode_texts([example.text for example in examples if example.text is not None], tokenizer)
    pad_token_id = _pad_token_id(tokenizer, [tokenizer.eos_token_id])
    steps = _Steps(progress, len(examples))
    nll_sums = answer_nlls(model, encoded, batch_size=batch_size, pad_token_id=pad_token_id, progress=steps.at)
    tokens = [row.supervised_tokens for row in encoded]
    rows = tuple(
        RowScore(example.source, "", example.text or "", "", None, perplexity(nll, count))
        for example, nll, count in zip(examples, nll_sums, tokens, strict=True)
    )
    return TaskScores((score_perplexity(nll_sums, tokens),), rows)


def _rows(
    examples: Sequence[Example], completions: Sequence[Completion], answers: _Answers, metric: str
) -> tuple[RowScore, ...]:
    values = answers.row_scores(metric)
    verdicts = answers.verdicts
    return tuple(
        RowScore(
            source=example.source,
            prompt=example.messages[-2].content if len(example.messages) > 1 else "",
            reference=answers.references[index],
            prediction=answers.predictions[index],
            finish_reason=completions[index].finish_reason,
            score=values[index],
            reason=verdicts[index].reason if verdicts else "",
        )
        for index, example in enumerate(examples)
    )


@dataclass
class _Answers:
    """What the metrics are computed from, row by row; lists stay empty where no metric needs them."""

    predictions: list[str]
    references: list[str]
    stopped: list[float]
    verdicts: Sequence[ExecutionResult] = ()
    nll_sums: Sequence[float] = ()
    tokens: Sequence[int] = ()

    def score(self, metric: str) -> Score:
        """The metric over all rows."""
        if METRICS[metric].source == "text":
            return score_text(metric, self.predictions, self.references)
        if metric == PERPLEXITY:
            return score_perplexity(self.nll_sums, self.tokens)
        return score_rows(metric, self.row_scores(metric))

    def row_scores(self, metric: str) -> list[float]:
        """The metric, or what comes nearest to it, of each row."""
        if metric == STOP_RATE:
            return self.stopped
        if metric == PASS_AT_1:
            return [float(verdict.passed) for verdict in self.verdicts]
        if metric == PERPLEXITY:
            return [perplexity(nll, tokens) for nll, tokens in zip(self.nll_sums, self.tokens, strict=True)]
        return text_rows(metric, self.predictions, self.references)


class _Steps:
    """Adds the passes over the rows up to one count for ``progress``."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._before = progress, total, 0

    def at(self, done: int) -> None:
        """So many rows of this pass are done."""
        if self._progress is not None:
            self._progress(self._before + done, self._total)

    def next_pass(self, rows: int) -> None:
        """A pass over ``rows`` rows is over."""
        self._before += rows


def _pad_token_id(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> int:
    """Padding is masked, so that any token serves where the tokenizer has none of its own."""
    return stop_token_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
