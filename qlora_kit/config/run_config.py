"""The run configuration: one YAML file and ``section.key=value`` overrides in, one checked ``RunConfig`` out.

All faults of a file are reported at once, each with its line, what was expected and what to do.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from qlora_kit.adapters.store import NAME_PATTERN
from qlora_kit.config.sections import (
    FILE_TAG,
    HUB_TAG,
    DataSection,
    EvalSection,
    HubDataset,
    LoraSection,
    MixedPart,
    ModelSection,
    PartSection,
    QuantizationSection,
    Source,
)
from qlora_kit.config.serving_targets import ServingTargets, serving_problems
from qlora_kit.config.sft_fields import sft_fields
from qlora_kit.config.strategy_checks import strategy_problems
from qlora_kit.config.synonyms import meant_by
from qlora_kit.config.train_section import (
    EVAL_LOSS,
    SECTION,
    Problem,
    TrainSection,
    kit_fields,
    settable_fields,
    undeclared_problems,
)
from qlora_kit.config.yaml_source import KeyPath, dump_yaml, parse_value, read_yaml
from qlora_kit.errors import ConfigError, Fault
from qlora_kit.formats import TASK_COLUMNS
from qlora_kit.metrics import METRICS
from qlora_kit.suggest import advice, nearest
from qlora_kit.tasks import TASKS, Task, get_task, template_fields

NEW_TASK_MAX_NEW_TOKENS = 256
WATCHING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # they follow metric_for_best_model


@dataclass(frozen=True)
class DataPart:
    """Rows of one task: the task, with the part's own words in it, and where the rows are."""

    task: Task
    section: PartSection


_FOLLOW_UP = "default_factory_not_called"  # pydantic adds it to another key's fault


class RunConfig(BaseModel):
    """One run: everything that the verbs read. Made by ``load_config``."""

    model_config = SECTION

    name: str = Field(pattern=NAME_PATTERN)
    """Name of the run and its adapter."""
    task: str = Field(pattern=NAME_PATTERN)
    """One of ``tasks.TASKS``, or a new name with data.prompt, data.completion and eval.metrics."""
    model: ModelSection = ModelSection()
    quantization: QuantizationSection = QuantizationSection()
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    target: ServingTargets = ()
    """Where the adapter will be served: vllm, llama.cpp, ollama; what they cannot serve is refused before training."""
    output_dir: str = Field(default_factory=lambda known: f"runs/{known['name']}", min_length=1)
    """The run folder."""

    _folder: Path = PrivateAttr(default=Path())  # the YAML's own folder

    def sources(self, split: str) -> tuple[Source, ...]:
        """The files and data sets of a split, of all parts."""
        return tuple(source for part in self.parts() for source in part.section.of(split))

    def resolve(self, path: str) -> Path:
        """A data path: relative to the current folder where something is there, else to the YAML's folder."""
        beside_config = self._folder / path
        return beside_config if not Path(path).exists() and beside_config.exists() else Path(path)

    def task_spec(self) -> Task:
        """The task with what ``data`` and ``eval`` say in place of its own prompt, answer, metrics and limit."""
        task = _with_own_words(self.task, self.data)
        metrics = task.metrics if self.eval.metrics is None else self.eval.metrics
        limit = task.max_new_tokens if self.eval.max_new_tokens is None else self.eval.max_new_tokens
        extra = ("tests",) if "pass@1" in metrics else task.extra
        return replace(task, metrics=metrics, max_new_tokens=limit, extra=extra)

    def parts(self) -> tuple[DataPart, ...]:
        """What the data are made of: the config's own task, then those of ``data.mix``."""
        mixed = (DataPart(_with_own_words(part.task, part), part) for part in self.data.mix)
        return (DataPart(self.task_spec(), self.data), *mixed)

    def sft_arguments(self) -> dict[str, Any]:
        """``train`` as keyword arguments of ``SFTConfig``; without validation data nothing is evaluated."""
        arguments = self.train.model_dump(mode="json", exclude=set(kit_fields()))
        if not any(part.section.validation for part in self.parts()):
            arguments["eval_strategy"] = "no"
        if "no" in (arguments["eval_strategy"], arguments["save_strategy"]):
            arguments["load_best_model_at_end"] = False
        metric = self.train.metric_for_best_model
        arguments["greater_is_better"] = metric != EVAL_LOSS and METRICS[metric].higher_is_better
        if metric != EVAL_LOSS:
            arguments["metric_for_best_model"] = f"eval_{metric}"
            if arguments["greater_is_better"] and arguments["lr_scheduler_type"] in WATCHING_SCHEDULERS:
                given = arguments.get("lr_scheduler_kwargs") or {}
                arguments["lr_scheduler_kwargs"] = {"mode": "max", **given}
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")  # transformers renamed them after 5.17, and warns
            if old in arguments and new in sft_fields():
                arguments[new] = arguments.pop(old)
        return arguments

    def to_yaml(self) -> str:
        """Every key with its value, as YAML that ``load_config`` reads back to the same."""
        return dump_yaml(self.model_dump(mode="json"))

    def sha256(self) -> str:
        """Hash of every value, whatever the order and comments of the file."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


def _with_own_words(name: str, part: PartSection) -> Task:
    task = TASKS.get(name)
    if task is None:
        task = Task(name, "a task of the config's own", (), "", "", "", (), NEW_TASK_MAX_NEW_TOKENS)
    prompt = task.prompt if part.prompt is None else part.prompt
    completion = task.completion if part.completion is None else part.completion
    return replace(
        task,
        fields=tuple(dict.fromkeys((*template_fields(prompt), *template_fields(completion)))),
        system_prompt=task.system_prompt if part.system_prompt is None else part.system_prompt,
        prompt=prompt,
        completion=completion,
        labels=task.labels if part.completion is None else (),
    )


_KIND_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "text",
    "a valid dictionary": "a mapping",
}
_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "quantization": QuantizationSection,
    "lora": LoraSection,
    "data": DataSection,
    "train": TrainSection,
    "eval": EvalSection,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a config file, apply ``section.key=value`` overrides in order, and check everything.

    Raises:
        ConfigError: Something is wrong; it carries all faults of the file and the overrides.
    """
    path = Path(path)
    source = read_yaml(path)
    values = {key: {} if key in _SECTIONS and value is None else value for key, value in source.values.items()}
    given, faults = _apply_overrides(values, overrides)
    config, problems = _validate(values)
    faults += [_locate(problem, path, source.lines, given) for problem in problems]
    if faults or config is None:
        raise ConfigError.of(faults)
    config._folder = path.parent
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
                faults.append(Fault(what, "a section before the dot", f"sections are {', '.join(_SECTIONS)}"))
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
        problems = _merged(_problem_of(entry) for entry in error.errors() if entry["type"] != _FOLLOW_UP)
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


def _merged(problems: Iterable[Problem]) -> list[Problem]:
    """One problem a key: a union reports each of its types."""
    merged: dict[KeyPath, Problem] = {}
    for problem in problems:
        first = merged.setdefault(problem.path, problem)
        if first is not problem:
            merged[problem.path] = replace(first, expected=f"{first.expected} or {problem.expected}")
    return list(merged.values())


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


def _problem_of(error: ErrorDetails) -> Problem:
    """pydantic's error in the kit's words."""
    path = _key_path(error["loc"])
    dotted, value = ".".join(path), error["input"]
    expected = error["msg"].replace("Input should be ", "").replace("String should", "a text that should")
    expected = _KIND_WORDS.get(expected, expected)
    if error["type"] == "extra_forbidden":
        return Problem(path, "is an unknown key", f"one of {', '.join(_known_keys(path))}", _where_it_belongs(path))
    if error["type"] == "missing":
        return Problem(path, "is missing", "a value", f"add {dotted}")
    if error["type"] in ("model_type", "model_attributes_type"):
        return Problem(path, f"is {value!r}", "a section with keys of its own", f"write the keys below '{dotted}:'")
    if error["type"] == "string_pattern_mismatch":
        expected = "1-64 letters, digits, '-' and '_', beginning with a letter or digit"
    if error["type"] == "literal_error":
        choices = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return Problem(path, f"is {value!r}", expected, advice(str(value), choices))
    known = error.get("ctx", {}).get("known", ())
    if known and isinstance(value, str):
        return Problem(path, f"is {value!r}", expected, advice(value, known))
    return Problem(path, f"is {value!r}", expected, f"correct {dotted}")


def _key_path(location: tuple[int | str, ...]) -> KeyPath:
    """The key of the config that ``loc`` of an error lies in; deeper parts are keys only in mixed parts and sources."""
    parts = tuple(str(part) for part in location)
    if parts[0] not in _SECTIONS:
        return parts[:1]
    depth = 4 if parts[:2] == ("data", "mix") else 2
    if FILE_TAG in parts or HUB_TAG in parts:
        depth = len(parts)
    return tuple(part for part in parts[:depth] if part not in (FILE_TAG, HUB_TAG))


def _known_keys(path: KeyPath) -> tuple[str, ...]:
    model: type[BaseModel] = RunConfig
    if len(path) == 2:
        model = _SECTIONS[path[0]]
    elif len(path) > 2:
        model = MixedPart if path[:2] == ("data", "mix") and len(path) == 4 else HubDataset
    return tuple(model.model_fields)


def _where_it_belongs(path: KeyPath) -> str:
    """The section that has the unknown key, else its nearest match in its own section."""
    key = path[-1]
    for section, model in _SECTIONS.items() if len(path) <= 2 else ():
        if key in (settable_fields() if section == "train" else model.model_fields):
            return f"it belongs to the section {section}: write {section}.{key}"
    own = path[0] if len(path) == 2 else ""
    return (meant_by(key, section=own) if len(path) <= 2 else None) or advice(key, _known_keys(path))


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
