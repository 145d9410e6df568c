"""``RunConfig``: everything that one run is made of, and what the verbs ask it. ``loading`` makes it from a file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr

from qlora_kit.adapters.names import NAME_PATTERN
from qlora_kit.config.sections import (
    DataSection,
    EvalSection,
    LoraSection,
    ModelSection,
    PartSection,
    QuantizationSection,
    Source,
)
from qlora_kit.config.serving_targets import ServingTargets
from qlora_kit.config.sft_fields import sft_fields
from qlora_kit.config.train_section import (
    EVAL_LOSS,
    SECTION,
    TrainSection,
    kit_fields,
)
from qlora_kit.config.yaml_source import dump_yaml
from qlora_kit.metrics import METRICS
from qlora_kit.tasks import TASKS, Task, template_fields

NEW_TASK_MAX_NEW_TOKENS = 256
WATCHING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")  # they follow metric_for_best_model


@dataclass(frozen=True)
class DataPart:
    """Rows of one task: the task, with the part's own words in it, and where the rows are."""

    task: Task
    section: PartSection


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

    def read_from(self, folder: Path) -> None:
        """Say where the YAML stands, for data paths beside it."""
        self._folder = folder

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


SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSection,
    "quantization": QuantizationSection,
    "lora": LoraSection,
    "data": DataSection,
    "train": TrainSection,
    "eval": EvalSection,
}
