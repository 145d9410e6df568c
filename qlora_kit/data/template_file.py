"""A base's chat template and stop tokens, read from its files alone: what `data.chat` asks a loaded tokenizer for.

The template is rendered as transformers does it (``utils/chat_template_utils.py``), in jinja2's sandbox, because how it
ends a turn can only be seen in what it renders. A test holds that both ways find the same stop token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qlora_kit.data.chat import PROBE_ANSWER, STOP_PROBE, stop_at_turn_end
from qlora_kit.data.rendering import TEMPLATE_ARGUMENTS, on_one_day
from qlora_kit.errors import BaseModelError
from qlora_kit.strict_json import read_json_object

TEMPLATE_FILE = "chat_template.jinja"
MAX_JSON_BYTES = 100_000_000
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# What a template can run into: its own refusals, and operations on values that are not what it expects.
_TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, RecursionError)


@dataclass(frozen=True)
class StopFacts:
    """Where a base's answers end.

    Attributes:
        has_template: Whether there is a chat template.
        token: The control token that ends an assistant turn by the template.
        token_id: Its id.
        generation_ids: Where transformers' ``generate`` stops by itself (``generation_config.json``, else
            ``config.json``).
        problem: Why no token was found.
    """

    has_template: bool
    token: str | None
    token_id: int | None
    generation_ids: tuple[int, ...]
    problem: str | None = None

    @property
    def agree(self) -> bool | None:
        """Whether ``generate`` stops where the template ends a turn; None where one of the two says nothing."""
        if self.token_id is None or not self.generation_ids:
            return None
        return self.token_id in self.generation_ids


def read_stop_facts(folder: Path, config: Mapping[str, Any]) -> StopFacts:
    """Find where a base's answers end.

    Args:
        folder: The base's files.
        config: The content of its ``config.json``.

    Raises:
        BaseModelError: A file of the tokenizer, or ``generation_config.json``, is there but is not sound JSON.
    """
    generation_ids = _generation_ids(folder, config)
    tokenizer_config = _read_json(folder / "tokenizer_config.json")
    template = _read_template(folder, tokenizer_config)
    if template is None:
        return StopFacts(False, None, None, generation_ids, "there is no chat template")
    tokens = _added_tokens(folder, tokenizer_config)
    try:
        text = _render(template, _special_tokens(folder, tokenizer_config))
    except (*_TEMPLATE_ERRORS, ValueError) as error:
        return StopFacts(True, None, None, generation_ids, f"the template fails on a plain conversation: {error}")
    token = stop_at_turn_end(text, tokens)
    if token is None:
        return StopFacts(True, None, None, generation_ids, "no control token of the tokenizer ends a turn")
    return StopFacts(True, token, tokens[token], generation_ids)


def _generation_ids(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    ids = (_read_json(path) if path.exists() else config).get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    return tuple(token for token in ids if type(token) is int)


def _read_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """The default template: a file of its own wins over the tokenizer's config, as in transformers."""
    path = folder / TEMPLATE_FILE
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BaseModelError(
                f"{path}: cannot be read ({type(error).__name__})",
                expected="a jinja template in UTF-8",
                fix="copy the base's file again",
            ) from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several, by name
        default = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = default[0].get("template") if default else None
    return template if isinstance(template, str) else None


def _added_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, int]:
    """Tokens beside the learned vocabulary, control tokens among them, with their ids."""
    listed = _read_json(folder / "tokenizer.json").get("added_tokens") or []
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    try:
        tokens = {str(entry["content"]): int(number) for number, entry in decoder.items()}
        return tokens | {str(entry["content"]): int(entry["id"]) for entry in listed}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BaseModelError(
            f"{folder}: the tokenizer's added tokens cannot be read",
            expected="tokenizer.json or tokenizer_config.json as transformers writes them",
            fix="copy the base's tokenizer files again",
        ) from error


def _special_tokens(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """What templates know as ``bos_token`` and the like."""
    values = {**_read_json(folder / "special_tokens_map.json"), **tokenizer_config}
    texts = {name: values.get(name) for name in _SPECIAL}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in texts.items()}
    return {name: value for name, value in texts.items() if isinstance(value, str)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    return read_json_object(path, max_bytes=MAX_JSON_BYTES, error=BaseModelError, fix="copy the base's file again")


def _render(template: str, special_tokens: Mapping[str, str]) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["namespace"] = _PlainNamespace
    messages = [{"role": message.role, "content": message.content} for message in STOP_PROBE]
    text = environment.from_string(on_one_day(template)).render(
        messages=messages,
        tools=None,
        documents=None,
        add_generation_prompt=False,
        **TEMPLATE_ARGUMENTS,
        **special_tokens,
    )
    if PROBE_ANSWER not in text:
        raise ValueError("it leaves the answer out")
    return text


class GenerationBlocks(Extension):
    """``{% generation %}`` marks what is supervised in some templates; it renders its content."""

    tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _PlainNamespace(Namespace):
    """A template is not trusted: it may keep no underscored names, which reach into Python."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template may not store {name!r}")
        super().__setitem__(name, value)


def _to_json(value: Any, **settings: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **settings)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
