"""The five tasks: what a row holds, how it is put into words, and how an answer is scored.

A new task is one more entry of ``TASKS``, or no code at all: ``data.prompt``, ``data.completion`` and
``eval.metrics`` in the YAML make one.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.errors import ConfigError
from qlora_kit.suggest import advice


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: Name used for folders, configs and adapters.
        description: One line for people.
        fields: Task-native columns: the names in ``prompt`` and ``completion``.
        system_prompt: System turn of rows that bring none; empty for none.
        prompt: Template of the user turn, with columns in braces.
        completion: Template of the assistant turn.
        metrics: Names in ``metrics.METRICS``; the first is the headline.
        max_new_tokens: Limit of a generated answer, in tokens.
        labels: The only answers allowed, for a classification; empty for free text.
        extra: Columns that are not shown to the model but that scoring needs, where the row has them.
        alpaca_prompt: Template of the user turn of an alpaca row that has an input.
    """

    name: str
    description: str
    fields: tuple[str, ...]
    system_prompt: str
    prompt: str
    completion: str
    metrics: tuple[str, ...]
    max_new_tokens: int
    labels: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    alpaca_prompt: str = "{instruction}\n\n{input}"


TASKS: dict[str, Task] = {
    "text_generation": Task(
        name="text_generation",
        description="go on from the opening of a story",
        fields=("opening", "story"),
        system_prompt="Continue the story.",
        prompt="{opening}",
        completion="{story}",
        metrics=("perplexity",),
        max_new_tokens=192,
    ),
    "question_answering": Task(
        name="question_answering",
        description="answer a question from a given text",
        fields=("context", "question", "answer"),
        system_prompt="Answer the question from the text.",
        prompt="{context}\n\n{question}",
        completion="{answer}",
        metrics=("exact_match", "token_f1"),
        max_new_tokens=32,
        alpaca_prompt="{input}\n\n{instruction}",
    ),
    "translation": Task(
        name="translation",
        description="translate English into French",
        fields=("english", "french"),
        system_prompt="Translate English to French.",
        prompt="{english}",
        completion="{french}",
        metrics=("chrf", "bleu"),
        max_new_tokens=64,
    ),
    "sentiment": Task(
        name="sentiment",
        description="say whether a review is positive, negative or neutral",
        fields=("text", "label"),
        system_prompt="Is this review positive, negative or neutral?",
        prompt="{text}",
        completion="{label}",
        metrics=("accuracy", "macro_f1"),
        max_new_tokens=8,
        labels=("positive", "negative", "neutral"),
    ),
    "code_generation": Task(
        name="code_generation",
        description="write the Python function that an instruction asks for",
        fields=("instruction", "code"),
        system_prompt="Write a Python function.",
        prompt="{instruction}",
        completion="{code}",
        metrics=("pass@1",),
        max_new_tokens=128,
        extra=("tests",),
    ),
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: There is none.
    """
    task = TASKS.get(name)
    if task is None:
        raise ConfigError(f"unknown task {name!r}", expected=f"one of {', '.join(TASKS)}", fix=advice(name, TASKS))
    return task


def template_fields(template: str) -> tuple[str, ...]:
    """The columns that a template names, each once and in order. A literal brace is written twice.

    Raises:
        ValueError: A brace is not closed, or something other than a plain column name stands between braces.
    """
    names: dict[str, None] = {}
    for _, name, format_spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or format_spec or conversion or any(mark in name for mark in ".[]{}"):
            raise ValueError(f"{{{name}}} is not a plain column name in braces")
        names[name] = None
    return tuple(names)


def render_template(template: str, values: Mapping[str, Any]) -> str:
    """``template`` with each ``{column}`` replaced by its value.

    Raises:
        KeyError: ``values`` lacks a column that the template names.
    """
    parts: list[str] = []
    for literal, name, _, _ in string.Formatter().parse(template):
        parts.append(literal)
        if name is not None:
            parts.append(str(values[name]))
    return "".join(parts)
