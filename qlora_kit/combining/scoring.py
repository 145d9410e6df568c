"""Scores a combination and its parts on the validation rows of each part's task: losses, answers, stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_kit.adapters.contract_file import CONTRACT_FILE
from qlora_kit.combining.planning import CombinationPlan
from qlora_kit.config.trained_quantization import trained_quantization
from qlora_kit.engine import Engine
from qlora_kit.likelihood import Loss, answer_nlls
from qlora_kit.merging.rows import ValidationRows, read_rows
from qlora_kit.scoring import PASS_AT_1, score_task

MAX_ANSWERS = 32


@dataclass(frozen=True)
class TaskScore:
    """What one adapter scored on one task's validation rows.

    Attributes:
        task: The task.
        rows_of: The part whose validation rows they are.
        adapter: The adapter that was scored.
        loss: Teacher-forced, in nats a supervised token.
        rows: How many rows the loss was measured on.
        metric: The task's first metric that runs no code.
        value: Its value, of generated answers.
        stop_rate: Share of the answers that ended by themselves; None for plain texts.
        answers: How many rows were answered.
    """

    task: str
    rows_of: str
    adapter: str
    loss: float
    rows: int
    metric: str
    value: float
    stop_rate: float | None
    answers: int


def score_combination(
    plan: CombinationPlan, folder: Path, *, base: str | None, progress: Callable[[str], None]
) -> tuple[tuple[TaskScore, ...], tuple[str, ...]]:
    """Score each part and the combination on each part's own rows, on the base as it was trained.

    Args:
        plan: The combination.
        folder: Its adapter, with a contract.
        base: In place of the contracts' own; its weights must be theirs.
        progress: Told what is being done.

    Returns:
        The scores, and a sentence for each part whose rows could not be had.

    Raises:
        AdapterError: The base is another one.
        BaseModelError: The base cannot be loaded.
        GuardError: A likelihood is not finite.
    """
    first = plan.parts[0]
    progress("loading the base")
    engine = Engine(
        first.contract.base.id if base is None else base,
        revision=first.contract.base.revision if base is None else None,
        quantization=trained_quantization(first.folder / CONTRACT_FILE, first.contract.quantization),
    )
    names = {plan.name: engine.load(str(folder))}
    names |= {part.name: engine.load(str(part.folder)) for part in plan.parts}
    scores: list[TaskScore] = []
    notes: list[str] = []
    for part in plan.parts:
        rows = read_rows(part.folder, part.contract, engine.tokenizer)
        if isinstance(rows, str):
            notes.append(f"not scored on {part.contract.task} ({part.name}): {rows}")
            continue
        progress(f"scoring on {part.contract.task}")
        scores += [_score(engine, rows, part.name, shown, name) for shown, name in names.items()]
    return tuple(scores), tuple(notes)


def _score(engine: Engine, rows: ValidationRows, rows_of: str, adapter: str, name: str) -> TaskScore:
    task = replace(rows.task, metrics=tuple(metric for metric in rows.task.metrics if metric != PASS_AT_1))
    pad = engine.tokenizer.pad_token_id
    examples = rows.examples[:MAX_ANSWERS]
    with engine.using(name) as model:
        nlls = answer_nlls(model, rows.encoded, batch_size=rows.batch_size, pad_token_id=int(pad))
        found = score_task(
            model,
            engine.tokenizer,
            examples,
            task,
            batch_size=rows.batch_size,
            stop_token_ids=engine.stop_token_ids,
        )
    loss = Loss(tuple(nlls), tuple(row.supervised_tokens for row in rows.encoded))
    return TaskScore(
        task=task.name,
        rows_of=rows_of,
        adapter=adapter,
        loss=loss.mean,
        rows=len(rows.encoded),
        metric=found.scores[0].metric,
        value=found.scores[0].value,
        stop_rate=None if examples[0].text is not None else found.stop_rate,
        answers=len(examples),
    )


def as_metrics(scores: tuple[TaskScore, ...], name: str) -> Mapping[str, float]:
    """What the contract of the combination ``name`` keeps: its own loss and metric on each part's rows."""
    metrics = {}
    for score in scores:
        if score.adapter == name:
            metrics[f"{score.rows_of}/eval_loss"] = score.loss
            metrics[f"{score.rows_of}/{score.metric}"] = score.value
    return metrics
