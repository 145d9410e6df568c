"""Compares a run with the memory at hand before the base is loaded: refuses it, adapts it, or lets it pass."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.architecture import FAMILIES, read_architecture
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.config import RunConfig
from qlora_kit.data.ledger import Ledger
from qlora_kit.errors import ConfigError
from qlora_kit.host_memory import free_memory_bytes
from qlora_kit.launched import count_on_this_machine
from qlora_kit.memory.cards import GIB, Card, known_card
from qlora_kit.memory.estimate import CUDA_CONTEXT_BYTES, MARGIN
from qlora_kit.memory.planner import Plan, Suggestion, changes, fastest_that_fits, make_plan
from qlora_kit.memory.workload import Workload, workload_of
from qlora_kit.training.settings import Start

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ADAPTED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "checkpointed_layers",
    "embedding_on_host",
)
"""The keys of ``train`` that ``train.memory=auto`` may change."""


def within_memory(
    config: RunConfig, ref: BaseRef, ledger: Ledger, *, device: torch.device, adapt: bool = True
) -> RunConfig:
    """The config to train with: as given, or with ``train.memory: auto`` the fastest settings that fit.

    The rows of each optimizer step stay the same. What is compared is the prediction for the longest row there is.

    Args:
        config: The run.
        ref: Its base, whose ``config.json`` is read.
        ledger: Of the tokenised data; its lengths count.
        device: Where it is trained.
        adapt: Whether settings may be changed; a resumed run keeps those that it began with.

    Raises:
        ConfigError: It cannot fit; the message holds the settings that do.
    """
    if config.train.memory == "ignore":
        return config
    base_config = read_model_config(ref)
    card = _card(device)
    if base_config.get("model_type") not in FAMILIES or card is None:
        logger.warning("memory is not checked: the base's family, or the free memory of this machine, is not known")
        return config
    workload = workload_of(
        config,
        read_architecture(base_config, where=str(ref.path / "config.json")),
        base_config=base_config,
        device="cuda" if device.type == "cuda" else "cpu",
        bf16=card.bf16,
    )
    weight = max(part.section.weight for part in config.parts())
    workload = _with_real_lengths(workload, ledger, weight=weight)
    plan = make_plan(workload, card)
    if adapt and config.train.memory == "auto":
        best = fastest_that_fits(workload, card)
        if best is not None:
            return _adapted(config, workload, best)
    if not plan.fits:
        raise does_not_fit(plan)
    return config


def begun_with(config: RunConfig, folder: Path) -> RunConfig:
    """On resuming with ``train.memory: auto``: the settings that the run began with, whatever is free now.

    They are taken only where the rows of an optimizer step are the same; else the comparison of the settings tells.

    Raises:
        ConfigError: What the run began with cannot be read.
    """
    if config.train.memory != "auto":
        return config
    began = Start.read(folder).settings
    values = {key: began[f"train.{key}"] for key in ADAPTED if f"train.{key}" in began}
    adapted = _with_train(config, values)
    return adapted if _rows_of_a_step(adapted) == _rows_of_a_step(config) else config


def does_not_fit(plan: Plan) -> ConfigError:
    """The error of a run that cannot fit, with the settings that can."""
    place = "the GPU" if plan.workload.device == "cuda" else "this machine"
    whole_rows = [suggestion for suggestion in plan.suggestions if "max_length" not in suggestion.changes]
    lines = "\n".join(
        f"  {suggestion.why} ({suggestion.peak_bytes / GIB:.1f} GiB):\n    " + "\n    ".join(suggestion.yaml_lines)
        for suggestion in whole_rows or plan.suggestions
    )
    least = "" if plan.smallest is None else f": not even {_as_little(plan.smallest)} fits"
    return ConfigError(
        f"train: the run needs about {plan.estimate.needed_bytes / GIB:.1f} GiB ({MARGIN:.0%} margin counted), "
        f"and {place} ({plan.card.name}) has {plan.card.free_bytes / GIB:.1f} GiB free",
        expected="a run that fits, by its prediction for the longest row",
        fix=f"change the config:\n{lines}\n  or set train.memory=auto, or train.memory=ignore to try anyway"
        if lines
        else f"take a smaller base or a larger card{least}; train.memory=ignore tries anyway",
    )


def _as_little(smallest: Suggestion) -> str:
    settings = ", ".join(f"{key}={json.dumps(value)}" for key, value in smallest.changes.items())
    return f"{settings or 'the smallest settings'} ({smallest.peak_bytes / GIB:.1f} GiB)"


def _card(device: torch.device) -> Card | None:
    """The GPU with what is free of it now, or the host's free memory; None where that is not known."""
    if device.type != "cuda":
        free = free_memory_bytes()
        return None if free is None else Card("host memory", free // count_on_this_machine())
    import torch

    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    properties = torch.cuda.get_device_properties(device)
    # This process has its context already, which the prediction counts.
    used_bytes = max(total_bytes - free_bytes - CUDA_CONTEXT_BYTES, 0)
    known = known_card(properties.name)
    return Card(
        properties.name,
        total_bytes,
        None if known is None else known.tflops,
        None if known is None else known.gigabytes_per_second,
        bf16=properties.major >= 8,
        used_bytes=used_bytes,
    )


def _with_real_lengths(workload: Workload, ledger: Ledger, *, weight: float) -> Workload:
    """With rows as long as the longest of the data, and no more of them than an epoch has.

    Args:
        workload: As the config says.
        ledger: Of the data.
        weight: The largest of the parts' weights: how often an epoch may see a row.
    """
    rows, length = _rows_and_length(workload, ledger, "train", weight=max(weight, 1.0))
    eval_rows, eval_length = _rows_and_length(workload, ledger, "validation", weight=1.0)
    return workload.with_(
        length=length,
        most_rows=rows,
        eval_length=eval_length,
        eval_batch_size=min(workload.eval_batch_size, eval_rows),
    )


def _rows_and_length(workload: Workload, ledger: Ledger, split: str, *, weight: float) -> tuple[int, int]:
    """How many rows a split has, and the longest; packed, they are sequences that ``max_length`` bounds."""
    lengths = ledger.lengths[split]
    if not lengths:
        return 0, workload.length
    rows, tokens = math.ceil(weight * lengths.total()), math.ceil(weight * ledger.total_tokens(split))
    if not workload.packing:
        return rows, max(lengths)
    return min(math.ceil(tokens / workload.length), rows), min(workload.length, tokens)


def _adapted(config: RunConfig, before: Workload, after: Workload) -> RunConfig:
    values = changes(before, after)
    if values:
        told = ", ".join(f"{key}={json.dumps(value)}" for key, value in values.items())
        logger.warning("train.memory=auto sets %s (%d rows in each step, as before)", told, after.effective_batch)
    return _with_train(config, values)


def _rows_of_a_step(config: RunConfig) -> int:
    return config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps


def _with_train(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update=values)})
