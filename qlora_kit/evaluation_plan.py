"""What a scorecard needs beside a loaded base: adapters, configs, rows and permissions, all checked without torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qlora_kit.adapters import AdapterStore, check_adapter_folder
from qlora_kit.adapters.card import RUN_CONFIG_FILE
from qlora_kit.config import RunConfig, load_config
from qlora_kit.data.preparing import prepare
from qlora_kit.data.sources import locate_file
from qlora_kit.errors import AdapterError, ConfigError, Fault, QloraKitError
from qlora_kit.formats import Example
from qlora_kit.scoring import check_scorable
from qlora_kit.suggest import advice
from qlora_kit.tasks import TASKS, Task

logger = logging.getLogger(__name__)

CONFIG_FOLDER = Path("configs")

Split = Literal["validation", "test"]


@dataclass(frozen=True)
class PlannedTask:
    """A task, the rows to score it on, and how many of them at once."""

    task: Task
    examples: tuple[Example, ...]
    batch_size: int


@dataclass(frozen=True)
class PlannedAdapter:
    """An adapter that was found: what the user called it, its name and folder, its own task (None without contract)."""

    given: str
    name: str
    folder: Path
    task: str | None

    def is_off(self, task: str) -> bool:
        """Whether it was trained for another task."""
        return self.task is not None and self.task != task


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that a scorecard needs beside the loaded base.

    Attributes:
        split: Which rows.
        tasks: In the order of the scorecard.
        adapters: The adapters to load.
        pairs: Task and adapter (None for the base) in the order of scoring.
        allow_code_execution: Whether generated code may be run.
    """

    split: Split
    tasks: tuple[PlannedTask, ...]
    adapters: tuple[PlannedAdapter, ...]
    pairs: tuple[tuple[PlannedTask, PlannedAdapter | None], ...]
    allow_code_execution: bool


def plan_evaluation(
    store: AdapterStore,
    *,
    adapters: Sequence[str],
    tasks: Sequence[str] | None,
    split: Split,
    matrix: bool,
    limit: int | None,
    allow_code_execution: bool,
    configs: Mapping[str, RunConfig],
    include_base: bool,
) -> EvaluationPlan:
    """Find and check everything that can be checked before the base is loaded; no torch.

    Args:
        store: Where adapter names are looked up.
        adapters: Names or folders.
        tasks: Their names; None for each adapter's own.
        split: Which rows.
        matrix: Score each adapter on every task, also on those that it was not trained for.
        limit: Only so many rows of each task, from the first; None for the config's ``eval.limit``.
        allow_code_execution: Whether generated code may be run.
        configs: Task name -> config, in place of those that ``task_config`` finds.
        include_base: Score the base too, on the same tasks.

    Raises:
        AdapterError: An adapter is not there or not sound.
        ConfigError: Nothing to score, no config for a task, no data, or code would be run without permission.
        DataError: Data files cannot be used.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}", expected="a number of rows, at least 1", fix="raise it or leave it out")
    found = _find_adapters(store, adapters)
    names = _task_names(found, tasks)
    if not matrix:
        _refuse_off_task(found, names)
    planned: list[PlannedTask] = []
    errors: list[QloraKitError] = []
    for name in names:
        try:
            config = configs[name] if name in configs else _config_of(name, found, split)
            planned.append(_plan_task(config, split, limit, allow_code_execution=allow_code_execution))
        except QloraKitError as error:
            errors.append(error)
    _raise_all(errors)
    pairs: list[tuple[PlannedTask, PlannedAdapter | None]] = []
    for one in planned:
        if include_base:
            pairs.append((one, None))
        pairs += [(one, adapter) for adapter in found if matrix or not adapter.is_off(one.task.name)]
    if not pairs:
        raise _nothing_to_score()
    return EvaluationPlan(split, tuple(planned), tuple(found), tuple(pairs), allow_code_execution)


def _raise_all(errors: Sequence[QloraKitError]) -> None:
    """One exception for the faults of all tasks, of the class of the first."""
    if errors:
        raise type(errors[0]).of([fault for error in errors for fault in error.faults])


def _nothing_to_score() -> ConfigError:
    return ConfigError(
        "nothing to score: neither an adapter nor a task is given, or the base alone and left out",
        expected="an adapter, or a task to score the base on",
        fix="give --adapter NAME (see `qlora-kit adapters list`) or --task NAME",
    )


def _find_adapters(store: AdapterStore, adapters: Sequence[str]) -> list[PlannedAdapter]:
    found: dict[str, PlannedAdapter] = {}
    errors: list[QloraKitError] = []
    for given in adapters:
        try:
            card = store.show(given).card
            check_adapter_folder(card.path)
            twin = found.setdefault(card.name, PlannedAdapter(given, card.name, card.path, card.task))
            if twin.folder.resolve() != card.path.resolve():
                what = f"two adapters are named {card.name!r}: {twin.folder} and {card.path}"
                raise AdapterError(what, expected="a name for each", fix="rename one of the two folders")
        except AdapterError as error:
            errors.append(error)
    _raise_all(errors)
    return list(found.values())


def _task_names(adapters: Sequence[PlannedAdapter], tasks: Sequence[str] | None) -> list[str]:
    if tasks is not None:
        return list(dict.fromkeys(tasks))
    unknown = [adapter.name for adapter in adapters if adapter.task is None]
    if unknown:
        raise ConfigError(
            f"nothing says which task {', '.join(unknown)} was trained for (no contract)",
            expected="a task for each adapter",
            fix="give --task NAME, or write a contract that names the task: `qlora-kit adapters adopt`",
        )
    return list(dict.fromkeys(adapter.task for adapter in adapters if adapter.task is not None))


def _refuse_off_task(adapters: Sequence[PlannedAdapter], tasks: Sequence[str]) -> None:
    faults = [
        Fault(
            f"the adapter {adapter.name} was trained for {adapter.task}, which is not among the tasks to score",
            f"--task {adapter.task}",
            f"add --task {adapter.task}, or give --matrix to score adapters off their task too",
        )
        for adapter in adapters
        if adapter.task is not None and adapter.task not in tasks
    ]
    if faults:
        raise ConfigError.of(faults)


def task_config(task: str, adapter_folder: Path | None = None) -> RunConfig:
    """The config that says how a task is scored: the one saved beside the adapter, else ``configs/<task>.yaml``.

    Raises:
        ConfigError: There is neither, or the file is faulty or of another task.
    """
    if adapter_folder is not None and (adapter_folder / RUN_CONFIG_FILE).is_file():
        return _load_config_of(task, adapter_folder / RUN_CONFIG_FILE)
    path = CONFIG_FOLDER / f"{task}.yaml"
    if path.is_file():
        return _load_config_of(task, path)
    beside = "" if adapter_folder is None else f"{adapter_folder / RUN_CONFIG_FILE} or "
    known = {*TASKS, *(file.stem for file in CONFIG_FOLDER.glob("*.yaml") if _is_of_its_name(file))}
    raise ConfigError(
        f"no config says how to score the task {task!r}",
        expected=f"{beside}{path} in the current folder, one of {', '.join(sorted(known))}",
        fix=advice(task, known) if task not in known else "run it where configs/ lies",
    )


def _is_of_its_name(path: Path) -> bool:
    try:
        return load_config(path).task == path.stem
    except QloraKitError:
        return False


def _load_config_of(task: str, path: Path) -> RunConfig:
    config = load_config(path)
    if config.task != task:
        raise ConfigError(
            f"{path}: is a config of the task {config.task!r}",
            expected=f"task: {task}",
            fix="correct its key `task`, or rename the file",
        )
    return config


def _config_of(task: str, adapters: Sequence[PlannedAdapter], split: Split) -> RunConfig:
    """The one config by which all adapters of a task are scored, so that their scores can be compared."""
    own = [adapter for adapter in adapters if adapter.task == task]
    if not own:
        return task_config(task)
    first = task_config(task, own[0].folder)
    for adapter in own[1:]:
        other = _measure(task_config(task, adapter.folder), split)
        different = ", ".join(key for key, value in _measure(first, split).items() if other[key] != value)
        if different:
            raise ConfigError(
                f"the adapters {own[0].name} and {adapter.name} are scored differently on {task}: {different}",
                expected="the same rows, prompts and metrics for all adapters of a task",
                fix="score them one at a time, or make the keys alike in the config.yaml of their folders",
            )
    return first


def _measure(config: RunConfig, split: Split) -> dict[str, Any]:
    """The keys by which a task is scored, with their values: where they differ, scores cannot be compared."""
    data, task = config.data, config.task_spec()
    return {
        f"data.{split}": [
            locate_file(config, entry).resolve() if isinstance(entry, str) else entry for entry in data.of(split)
        ],
        "data.format": data.format,
        "data.system_prompt": task.system_prompt,
        "data.prompt": task.prompt,
        "data.completion": task.completion,
        "eval.metrics": task.metrics,
        "eval.max_new_tokens": task.max_new_tokens,
        "eval.limit": config.eval.limit,
    }


def _plan_task(config: RunConfig, split: Split, limit: int | None, *, allow_code_execution: bool) -> PlannedTask:
    task = config.task_spec()
    check_scorable((), task, allow_code_execution=allow_code_execution)
    examples = _read_split(config, split)
    limit = config.eval.limit if limit is None else limit
    examples = examples[:limit]
    check_scorable(examples, task, allow_code_execution=allow_code_execution)
    return PlannedTask(task, examples, config.eval.batch_size)


def _read_split(config: RunConfig, split: Split) -> tuple[Example, ...]:
    """The rows of one split; the other files of the config need not be there."""
    sources = config.data.of(split)
    if not sources:
        other = "validation" if split == "test" else "test"
        raise ConfigError(
            f"the config of the task {config.task} names no {split} data",
            expected=f"data.{split} with at least one file",
            fix=f"add data.{split} to the config, or score --split {other}",
        )
    only = {"train": (), "validation": (), "test": (), "mix": (), split: sources}
    data = config.data.model_copy(update=only)
    prepared = prepare(config.model_copy(update={"data": data}))
    report = prepared.report
    if report.kept < report.rows:
        logger.warning(
            "%s: %d of %d %s rows are scored; %d faulty and %d doubled ones are left out",
            *(config.task, report.kept, report.rows, split, report.dropped, report.duplicates),
        )
    return prepared.test if split == "test" else prepared.validation
