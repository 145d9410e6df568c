"""Renders conversations by the base's own chat template: the one place where templates are applied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.conversation import Message
from qlora_kit.data.tool_rendering import (
    PROBE_RESULT,
    PROBE_TOOL,
    TOOL_PROBE,
    missing_from_turn,
    plain_message,
)
from qlora_kit.errors import BaseModelError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Passed to every template, which ignores what it does not know. A prompt then never depends on the day it is rendered
# (the date is the one that Llama 3's templates name themselves), and a reasoning model's prompt ends with the empty
# thought that its plain answers are trained behind.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}
# Templates that ask for the day by `strftime_now` get that one too; transformers hands them no function but its own.
_DATE_PARTS = {
    "%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%-d": "26", "%B": "July", "%b": "Jul", "%A": "Friday",
    "%a": "Fri", "%j": "208", "%H": "00", "%M": "00", "%S": "00",
}  # fmt: skip
_REPLACED = "".join(f" | replace('{part}', '{value}')" for part, value in _DATE_PARTS.items())
_ONE_DAY = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}{{{{ '' }}}}"


def on_one_day(template: str) -> str:
    """The same template, for which it is always the same day."""
    return _ONE_DAY + template if "strftime_now" in template else template


def render_texts(
    conversations: Sequence[Sequence[Message]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    for_generation: bool,
    tools: Sequence[Sequence[str]] | None = None,
) -> list[str]:
    """Renders conversations by the tokenizer's chat template.

    Args:
        conversations: Messages of each conversation.
        tokenizer: A tokenizer with a chat template.
        for_generation: Whether the text ends with the opening of an assistant turn.
        tools: The tools of each conversation (``Example.tools``); None for none.

    Raises:
        BaseModelError: The tokenizer has no chat template.
        DataError: The template itself refuses a conversation (some take no system message).
    """
    if not conversations:
        return []
    if tokenizer.chat_template is None:
        raise BaseModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template",
            expected="a base model whose tokenizer carries one (an instruction-tuned model)",
            fix="use the -Instruct variant of the base model",
        )
    groups: dict[tuple[str, ...], list[int]] = {}  # one call of the template for all that share their tools
    for index in range(len(conversations)):
        groups.setdefault(() if tools is None else tuple(tools[index]), []).append(index)
    texts = [""] * len(conversations)
    for schemas, indices in groups.items():
        plain = [[plain_message(message) for message in conversations[index]] for index in indices]
        for index, text in zip(indices, _apply_template(plain, schemas, tokenizer, for_generation), strict=True):
            texts[index] = text
    return texts


def _apply_template(
    plain: list[list[dict[str, Any]]],
    schemas: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    for_generation: bool,
) -> list[str]:
    import jinja2

    template = tokenizer.chat_template
    try:
        return tokenizer.apply_chat_template(
            plain,
            chat_template=on_one_day(template) if isinstance(template, str) else None,
            tools=[json.loads(schema) for schema in schemas] or None,
            tokenize=False,
            add_generation_prompt=for_generation,
            **TEMPLATE_ARGUMENTS,
        )
    except (jinja2.TemplateError, TypeError) as error:  # a template that adds text to what is no text raises TypeError
        raise DataError(
            f"the chat template refuses a conversation: {error}",
            expected="a conversation that the base model's template can render",
            fix="leave out what it refuses (a system message, a role, several tool calls in a turn), or remove the row",
        ) from error


def require_tool_support(tokenizer: PreTrainedTokenizerBase) -> None:
    """Proves on a probe conversation that the chat template renders tools, calls and results.

    Raises:
        BaseModelError: It leaves one of them out, as templates do that do not know tools.
    """
    try:
        prompt, whole = (
            render_texts([TOOL_PROBE[:turns]], tokenizer, for_generation=turns == 1, tools=[[PROBE_TOOL]])[0]
            for turns in (1, len(TOOL_PROBE))
        )
    except DataError as error:
        missing = error.faults[0].what
    else:
        in_text = {
            "the tools": "probe_tool" in prompt and "probe_argument" in prompt,
            "the tool calls": missing_from_turn(whole[len(prompt) :], TOOL_PROBE[1]) is None,
            "the tools' results": PROBE_RESULT in whole,
        }
        missing = ", ".join(name for name, found in in_text.items() if not found)
        if not missing:
            return
        missing = f"it leaves out {missing}"
    raise BaseModelError(
        f"the chat template of {tokenizer.name_or_path or 'the base model'!r} does not know tools: {missing}",
        expected="a template that renders the column 'tools', tool_calls and tool turns",
        fix="use a base model that was trained for tool calling (Qwen2.5-Instruct is one), or remove these rows",
    )
