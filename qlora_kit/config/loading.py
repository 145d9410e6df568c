"""Loads a run's configuration: a YAML file and ``section.key=value`` overrides in, one checked ``RunConfig`` out.

All faults of a file are reported at once, each with its line, what was expected and what to do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from qlora_kit.config.run_config import SECTIONS, RunConfig
from qlora_kit.config.serving_targets import serving_problems
from qlora_kit.config.strategy_checks import strategy_problems
from qlora_kit.config.train_section import Problem, undeclared_problems
from qlora_kit.config.validation_problems import problems_of
from qlora_kit.config.yaml_source import KeyPath, parse_value, read_yaml
from qlora_kit.errors import ConfigError, Fault
from qlora_kit.formats import TASK_COLUMNS
from qlora_kit.suggest import advice, nearest
from qlora_kit.tasks import TASKS, get_task


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply ``section.key=value`` overrides in order, and check everything.

    Raises:
        ConfigError: Something is wrong; it carries all faults of the file and the overrides.
    """
    path = Path(path)
    source = read_yaml(path)
    values = {key: {} if key in SECTIONS and value is None else value for key, value in source.values.items()}
    given, faults = _apply_overrides(values, overrides)
    config, problems = _validate(values)
    faults += [_locate(problem, path, source.lines, given) for problem in problems]
    if faults or config is None:
        raise ConfigError.of(faults)
    config.read_from(path.parent)
    return config


def _apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[KeyPath, str], list[Fault]]:
    """Set each override in ``values``; which override set which key, and the faults of their form."""
    given: dict[KeyPath, str] = {}
    faults = []
    for override in overrides:
        dotted, equals, text = override.partition("=")
        keys = tuple(dotted.strip().split(".", 2))
        if not equals or not all(keys):
            what = f"override {override!r}: has no key and value"
            faults.append(Fault(what, "section.key=value", "write it like train.learning_rate=1e-4"))
            continue
        try:
            value = parse_value(text)
        except ValueError as error:
            what = f"override {override!r}: the value is not YAML: {error}"
            faults.append(Fault(what, "a plain value", f"put quotes around it: {dotted}='\"...\"'"))
            continue
        parent = values
        for key in keys[:-1]:
            if not isinstance(parent.setdefault(key, {}), dict):
                what = f"override {override!r}: {key} holds no keys"
                faults.append(Fault(what, "a section before the dot", f"sections are {', '.join(SECTIONS)}"))
                break
            parent[key] = copy.copy(parent[key])
            parent = parent[key]
        else:
            parent[keys[-1]] = value
            given[keys] = override
    return given, faults


def _validate(values: dict[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    config, problems = None, []
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        problems = problems_of(error)
    if isinstance(values.get("train"), dict):
        data = values.get("data")
        problems += undeclared_problems(
            values["train"], evaluates=isinstance(data, dict) and bool(data.get("validation"))
        )
    if config is not None:
        validates = bool(config.data.validation)  # of the config's own task
        problems += strategy_problems(config.train, config.lora, config.quantization, validates=validates)
        problems += serving_problems(config.lora, config.target)
    return config, problems + list(_task_problems(values))


def _task_problems(values: Mapping[str, Any]) -> Iterator[Problem]:
    """An unknown task that the config does not make itself, at the top or in a mixed part."""
    data = values.get("data")
    mix = data.get("mix") if isinstance(data, dict) else None
    for number, part in enumerate(mix if isinstance(mix, list) else ()):
        if not isinstance(part, dict) or not isinstance(part.get("task"), str) or part["task"] in TASKS:
            continue
        missing = [key for key in ("prompt", "completion") if part.get(key) is None]
        if missing and part.get("format", "auto") in ("auto", TASK_COLUMNS):
            what = f"is the new task {part['task']!r}, which lacks {' and '.join(missing)}"
            fix = f"set them; for a known task: {advice(part['task'], TASKS)}"
            yield Problem(("data", "mix", str(number), "task"), what, "a known task, or prompt and completion", fix)
    task = values.get("task")
    if not isinstance(task, str) or task in TASKS:
        return
    sections = {name: values.get(name) for name in ("data", "eval")}
    made_of = [("data", "prompt"), ("data", "completion"), ("eval", "metrics")]
    if _mappings(sections) and (sections["data"] or {}).get("format", "auto") not in ("auto", TASK_COLUMNS):
        made_of = made_of[-1:]  # the rows of such a format are whole without templates
    missing = (
        [f"{s}.{key}" for s, key in made_of if (sections[s] or {}).get(key) is None] if _mappings(sections) else []
    )
    if len(missing) == len(made_of):
        try:
            get_task(task)
        except ConfigError as error:
            fault = error.faults[0]
            needed = "data.prompt, data.completion and eval.metrics, or data.format and eval.metrics"
            fix = f"{fault.fix} (a new task needs {needed})"
            yield Problem(("task",), f"is {task!r}, which is no task", fault.expected, fix)
    elif missing:
        what = f"is the new task {task!r}, which lacks {', '.join(missing)}"
        match = nearest(task, TASKS)
        fix = f"set {', '.join(missing)}" + ("" if match is None else f", or did you mean {match!r}?")
        if "eval.metrics" not in missing:
            fix += "; for data in a format of their own, name it with data.format (messages, alpaca, text, ...) instead"
        yield Problem(("task",), what, " and ".join(map(".".join, made_of)), fix)


def _mappings(sections: Mapping[str, Any]) -> bool:
    return all(value is None or isinstance(value, dict) for value in sections.values())


def _locate(problem: Problem, path: Path, lines: Mapping[KeyPath, int], given: Mapping[KeyPath, str]) -> Fault:
    """The fault with the override that set the key, or the file and line of the key or of what it stands in."""
    where = str(path)
    for depth in range(len(problem.path), 0, -1):
        prefix = problem.path[:depth]
        override = next((text for keys, text in given.items() if keys[:depth] == prefix), None)
        if override is not None and (depth == len(problem.path) or prefix in given):
            where = f"override {override!r}"
            break
        if prefix in lines:
            where = f"{path}:{lines[prefix]}"
            break
    return Fault(f"{where}: {'.'.join(problem.path)} {problem.what}", problem.expected, problem.fix)
