"""Rendering by literals gives what the template gives, or leaves the conversation to the template."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from qlora_kit.conversation import Message
from qlora_kit.data import segments
from qlora_kit.data.chat import read_turn_format
from qlora_kit.data.cutting import Cut, cut_texts
from qlora_kit.data.rendering import render_texts
from qlora_kit.data.segments import ContentChangesTemplate, SegmentRenderer
from qlora_kit.data.template_reading import only_joins_contents
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STOP = "<|im_end|>"


def conversation(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    turns = tuple(Message(("user", "assistant")[index % 2], text) for index, text in enumerate(contents))
    return turns if system is None else (Message("system", system), *turns)


def by_template(conversations: list[tuple[Message, ...]], tokenizer: PreTrainedTokenizerFast) -> list[Cut]:
    texts = render_texts(conversations, tokenizer, for_generation=False)
    return cut_texts(texts, conversations, tokenizer, read_turn_format(tokenizer))


def random_conversations(count: int) -> list[tuple[Message, ...]]:
    source = random.Random(0)
    alphabet = [" ", "\n", "a", "b ", "é", "{", "}", "</think>", "'", "<", "Qz0Xw0Qz", "[INST]"]
    return [
        conversation(
            *("".join(source.choices(alphabet, k=source.randint(1, 9))) + "z" for _ in range(source.choice([2, 4, 6]))),
            system=source.choice([None, "Rules.", " Rules "]),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("family", "template", "eos", "by_literals"),
    [
        ("qwen", "qwen2_5", STOP, True),
        ("qwen", "qwen3", STOP, False),  # it takes thoughts out of earlier turns
        ("llama3", "llama3", "<|eot_id|>", False),  # it strips contents
    ],
)
def test_conversations_are_cut_as_by_the_template(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], family: str, template: str, eos: str, by_literals: bool
) -> None:
    tokenizer = make_tokenizer(family, template, eos_token=eos)
    conversations = random_conversations(600)
    renderer = SegmentRenderer(tokenizer, read_turn_format(tokenizer))
    assert renderer.cut(conversations, [()] * 600) == by_template(conversations, tokenizer)
    proven = {roles for roles, found in renderer._segments.items() if found is not None}
    assert (("user", "assistant") in proven) == by_literals


def test_a_template_that_looks_into_contents_is_caught_by_the_spot_check(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reading the code and the trials would let pass is seen in the rows."""
    monkeypatch.setattr(segments, "only_joins_contents", lambda template: True)
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    secret = "{% if 'secret' in messages[-1].content %}{{ bos_token or 'X' }}{% endif %}"
    tokenizer.chat_template = secret + tokenizer.chat_template
    renderer = SegmentRenderer(tokenizer, read_turn_format(tokenizer))
    monkeypatch.setattr(segments, "SPOT_CHECK_ROWS", 4)
    renderer.cut([conversation("q", "plain")] * 4, [()] * 4)
    with pytest.raises(ContentChangesTemplate):
        renderer.cut([conversation("q", "a secret")] * 4, [()] * 4)


def test_roles_that_the_template_refuses_are_refused(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    check = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    tokenizer.chat_template = check + tokenizer.chat_template
    renderer = SegmentRenderer(tokenizer, read_turn_format(tokenizer))
    assert renderer.cut([conversation("q", "a")], [()]) == by_template([conversation("q", "a")], tokenizer)
    with pytest.raises(DataError, match="no system turn here"):
        renderer.cut([conversation("q", "a", system="s")], [()])


@pytest.mark.parametrize(
    ("template", "only_joins"),
    [
        ("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}", True),
        ("{{ messages[0]['content'] ~ 'x' }}", True),
        ("{% if m.content %}{{ m['content'] }}{% endif %}", True),
        ("{% if m.content is string and m.role == 'user' %}{{ m.content }}{% endif %}", True),
        ("{{ m.content if m.content is defined else 'none' }}", True),
        ("{% generation %}{{ m.content }}{% endgeneration %}", True),
        ("{{ m.content | trim }}", False),
        ("{{ m['content'].strip() }}", False),
        ("{% if '/nothink' in m.content %}x{% endif %}{{ m.content }}", False),
        ("{% if m.content.endswith('x') %}y{% endif %}", False),
        ("{% set text = m.content %}{{ text.split('</think>')[-1] }}", False),
        ("{% if m.content == 'x' %}y{% endif %}", False),
        ("{{ messages | map(attribute='content') | join }}", False),
        ("{% macro show(m) %}{{ m }}{% endmacro %}{{ show(m.content) }}", False),
        ("{{ m.content[1:] }}", False),
        ("{{ broken", False),
    ],
)
def test_a_templates_code_tells_what_it_does_with_contents(template: str, only_joins: bool) -> None:
    assert only_joins_contents(template) == only_joins


def test_a_template_that_looks_into_contents_renders_every_row(
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:
    """The rule of a template that marks user turns unless they end with the mark; there are fewer rows than a check."""
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token=STOP)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '/nothink' if m.role == 'user' and not m.content.endswith('/nothink') else '' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [conversation("q", "a"), conversation("q /nothink", "a")]
    renderer = SegmentRenderer(tokenizer, read_turn_format(tokenizer))
    assert renderer.cut(rows, [(), ()]) == by_template(rows, tokenizer)
