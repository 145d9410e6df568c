"""The scorecard: an engine, adapters and tasks in, the score of the base and of each adapter on each task out.

``evaluate`` plans (``evaluation_plan``) and scores; a caller that loads the base itself plans before it does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config import RunConfig
from qlora_kit.data.chat import template_system_prompt
from qlora_kit.evaluation_plan import EvaluationPlan, PlannedAdapter, PlannedTask, Split, plan_evaluation
from qlora_kit.metrics import METRICS
from qlora_kit.scoring import TaskScores, score_task

if TYPE_CHECKING:
    from qlora_kit.engine import Engine

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what is being scored, its steps done and its steps in all."""


@dataclass(frozen=True)
class ScoredPair:
    """What the base (``adapter`` None) or an adapter scored on a task; ``off_task`` if it was trained for another."""

    task: str
    adapter: str | None
    off_task: bool
    scores: TaskScores


@dataclass(frozen=True)
class Result:
    """One number of the scorecard; see ``metrics.Score`` and ``ScoredPair``."""

    task: str
    adapter: str | None
    metric: str
    value: float
    ci95: tuple[float, float]
    n: int
    off_task: bool


@dataclass(frozen=True)
class Gain:
    """What an adapter adds on its own task, by the task's first metric.

    Attributes:
        task: The task.
        metric: Its first metric.
        adapter: The adapter.
        base_value: None where the base was not scored.
        adapter_value: The adapter's.
        gain: Above 0 where the adapter is better: the difference, turned round for metrics where less is better.
    """

    task: str
    metric: str
    adapter: str
    base_value: float | None
    adapter_value: float
    gain: float | None


@dataclass(frozen=True)
class Scorecard:
    """Scores of the base and of adapters.

    Attributes:
        base: The base's id.
        split: Which rows were scored.
        pairs: Every scored pair, with each row's answer.
    """

    base: str
    split: Split
    pairs: tuple[ScoredPair, ...]

    @property
    def results(self) -> tuple[Result, ...]:
        """Every number: each metric of each pair."""
        return tuple(
            Result(pair.task, pair.adapter, score.metric, score.value, score.ci95, score.n, pair.off_task)
            for pair in self.pairs
            for score in pair.scores.scores
        )

    def headline(self) -> tuple[Gain, ...]:
        """What each adapter gained on its own task; off-task scores never appear here."""
        bases = {pair.task: pair.scores.scores[0].value for pair in self.pairs if pair.adapter is None}
        gains = []
        for pair in self.pairs:
            if pair.adapter is None or pair.off_task:
                continue
            score, base = pair.scores.scores[0], bases.get(pair.task)
            sign = 1 if METRICS[score.metric].higher_is_better else -1
            gain = None if base is None else sign * (score.value - base)
            gains.append(Gain(pair.task, score.metric, pair.adapter, base, score.value, gain))
        return tuple(gains)

    def to_json(self) -> dict[str, Any]:
        """The object that ``--json`` prints; a number that is not finite becomes null."""
        return {
            "base": self.base,
            "split": self.split,
            "results": [_finite(asdict(result)) for result in self.results],
            "headline": [_finite(asdict(gain)) for gain in self.headline()],
        }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    engine: Engine,
    *,
    adapters: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    split: Split = "test",
    matrix: bool = False,
    limit: int | None = None,
    allow_code_execution: bool = False,
    configs: Mapping[str, RunConfig] | None = None,
    include_base: bool = True,
    progress: Progress | None = None,
) -> Scorecard:
    """Score the engine's base and adapters; the arguments and exceptions are those of the two functions it joins."""
    plan = plan_evaluation(
        engine.store,
        adapters=adapters,
        tasks=tasks,
        split=split,
        matrix=matrix,
        limit=limit,
        allow_code_execution=allow_code_execution,
        configs={} if configs is None else configs,
        include_base=include_base,
    )
    return run_evaluation(engine, plan, progress=progress)


def run_evaluation(engine: Engine, plan: EvaluationPlan, *, progress: Progress | None = None) -> Scorecard:
    """Score every pair of the plan.

    Args:
        engine: Has the base; the plan's adapters are loaded into it, all before anything is scored.
        plan: Made by ``plan_evaluation``.
        progress: Called while a pair is scored.

    Raises:
        AdapterError: An adapter does not fit the base.
        DataError: The chat template refuses rows.
        GuardError: The model's logits are not finite.
    """
    names = {adapter.name: engine.load(adapter.given) for adapter in plan.adapters}
    scored = []
    for planned, adapter in plan.pairs:
        name = None if adapter is None else names[adapter.name]
        _tell_other_system_prompt(engine, planned, adapter, name)
        with engine.using(name) as model:
            scores = score_task(
                model,
                engine.tokenizer,
                planned.examples,
                planned.task,
                batch_size=planned.batch_size,
                stop_token_ids=engine.stop_token_ids,
                allow_code_execution=plan.allow_code_execution,
                progress=_labelled(progress, planned.task.name, name),
            )
        off_task = adapter is not None and adapter.is_off(planned.task.name)
        scored.append(ScoredPair(planned.task.name, name, off_task, scores))
    return Scorecard(engine.ref.id, plan.split, tuple(scored))


def _tell_other_system_prompt(
    engine: Engine, planned: PlannedTask, adapter: PlannedAdapter | None, name: str | None
) -> None:
    """An adapter off its task sees another prompt anyway; on it, the config's prompt must not differ in silence."""
    contract = None if adapter is None or name is None else engine.contract(name)
    if adapter is None or contract is None or adapter.is_off(planned.task.name):
        return
    asked = planned.task.system_prompt or template_system_prompt(engine.tokenizer)
    fault = contract.system_prompt_fault(asked)
    if fault is not None:
        logger.warning("%s: %s", name, fault)


def _labelled(progress: Progress | None, task: str, adapter: str | None) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    label = f"{task}: {'the base' if adapter is None else adapter}"
    return lambda done, total: progress(label, done, total)
