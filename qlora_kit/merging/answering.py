"""The task's metric of generated answers: merged model beside live adapter where the model fits, else why not."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.base_files import BaseRef
from qlora_kit.config import QuantizationSection
from qlora_kit.data.chat import stop_token_ids
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.results import MetricCheck
from qlora_kit.merging.rows import ValidationRows
from qlora_kit.models import load_base_model, load_tokenizer
from qlora_kit.scoring import PASS_AT_1, TaskScores, score_task
from qlora_kit.tasks import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qlora_kit.conversation import Example

MAX_ANSWERS = 32
MAX_CPU_BYTES = 2**30
"""Of the merged model in fp32: on a CPU a larger one would neither answer quickly nor keep to the merge's memory."""
_GPU_SHARE = 0.6  # of the free memory for the weights; the rest for logits, keys and values
_FP32_BYTES = 4


def check_answers(plan: MergePlan, folder: Path, rows: ValidationRows | str) -> MetricCheck:
    """Let the merged model and the live adapter answer up to 32 validation prompts, greedily, and score both.

    The live adapter is the base loaded as it was trained. What runs code is left out: nobody allowed that here.

    Args:
        plan: The merge.
        folder: The written checkpoint.
        rows: The adapter's validation rows, or why there are none.

    Raises:
        BaseModelError: What was written cannot be loaded.
        GuardError: Logits are not finite.
    """
    if isinstance(rows, str):
        return MetricCheck(rows)
    if plan.contract is None and plan.onto == "original":
        return MetricCheck("without a contract it is not known how the adapter was trained")
    too_large = _too_large(plan)
    if too_large is not None:
        return MetricCheck(too_large)
    examples = rows.examples[:MAX_ANSWERS]
    task = replace(rows.task, metrics=tuple(name for name in rows.task.metrics if name != PASS_AT_1))
    try:
        live = _live_scores(plan, examples, task, rows.batch_size)
    except AdapterError as error:  # such as one with a head of more rows than the base's
        return MetricCheck(f"the adapter is not served beside others: {error.faults[0].what}")
    gc.collect()  # a model and its PEFT layers refer to each other
    model = load_base_model(BaseRef("merged", folder), QuantizationSection(load_in_4bit=False), device=_device(plan))
    merged = _scores(model, load_tokenizer(BaseRef("merged", folder)), examples, task, rows.batch_size)
    texts = zip(live.rows, merged.rows, strict=True)
    has_answers = examples[0].text is None
    return MetricCheck(
        reason="",
        task=task.name,
        metric=merged.scores[0].metric,
        rows=len(examples),
        merged=merged.scores[0].value,
        live=live.scores[0].value,
        merged_stop_rate=merged.stop_rate if has_answers else None,
        live_stop_rate=live.stop_rate if has_answers else None,
        same_answers=sum(one.prediction == other.prediction for one, other in texts) / len(examples)
        if has_answers
        else None,
    )


def _too_large(plan: MergePlan) -> str | None:
    written_bytes = sum(spec.size_bytes for spec in plan.specs.values())
    if plan.device == "cpu":
        numbers = sum(prod(spec.shape) for spec in plan.specs.values())
        needed_bytes, most_bytes, where = _FP32_BYTES * numbers, MAX_CPU_BYTES, "is answered with on a CPU"
    else:
        import torch

        free_bytes, _ = torch.cuda.mem_get_info()
        needed_bytes, most_bytes, where = written_bytes, int(_GPU_SHARE * free_bytes), "this GPU has room for"
    if needed_bytes <= most_bytes:
        return None
    return f"the model takes {needed_bytes / 2**30:.1f} GiB, more than the {most_bytes / 2**30:.1f} GiB that {where}"


def _device(plan: MergePlan) -> torch.device:
    import torch

    return torch.device(plan.device)


def _live_scores(plan: MergePlan, examples: Sequence[Example], task: Task, batch_size: int) -> TaskScores:
    engine = Engine(str(plan.base.path), quantization=plan.quantization, device=_device(plan))
    name = engine.load(str(plan.files.folder))
    with engine.using(name) as model:
        return _scores(model, engine.tokenizer, examples, task, batch_size)


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    task: Task,
    batch_size: int,
) -> TaskScores:
    stops = stop_token_ids(tokenizer)
    return score_task(model, tokenizer, examples, task, batch_size=batch_size, stop_token_ids=stops)
