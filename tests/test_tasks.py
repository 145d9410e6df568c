"""The five tasks and their templates."""

from __future__ import annotations

import pytest

from qlora_kit.errors import ConfigError
from qlora_kit.metrics import METRICS
from qlora_kit.tasks import TASKS, get_task, render_template, template_fields


def test_the_five_tasks_agree_with_themselves() -> None:
    assert list(TASKS) == ["text_generation", "question_answering", "translation", "sentiment", "code_generation"]
    for name, task in TASKS.items():
        assert task.name == name
        assert set(task.fields) == {*template_fields(task.prompt), *template_fields(task.completion)}
        assert task.metrics
        assert set(task.metrics) <= set(METRICS)
        assert task.max_new_tokens > 0
        assert not set(task.extra) & set(task.fields)
        assert set(template_fields(task.alpaca_prompt)) == {"instruction", "input"}


def test_unknown_task() -> None:
    assert get_task("sentiment") is TASKS["sentiment"]
    with pytest.raises(ConfigError, match="did you mean 'translation'") as caught:
        get_task("translations")
    assert caught.value.faults[0].expected.startswith("one of text_generation")


@pytest.mark.parametrize(
    ("template", "fields"),
    [("{a}\n\n{b}", ("a", "b")), ("{b}{a}{b}", ("b", "a")), ("{{x}} {a b}", ("a b",)), ("none", ())],
)
def test_template_fields(template: str, fields: tuple[str, ...]) -> None:
    assert template_fields(template) == fields


@pytest.mark.parametrize("template", ["{", "}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}"])
def test_templates_that_are_more_than_names(template: str) -> None:
    with pytest.raises(ValueError, match=r"encountered|expected|column"):
        template_fields(template)


def test_render_template_inserts_text_as_it_is() -> None:
    assert render_template("{{{a}}} {b}", {"a": "{b}", "b": 3}) == "{{b}} 3"
    with pytest.raises(KeyError, match="c"):
        render_template("{c}", {})
