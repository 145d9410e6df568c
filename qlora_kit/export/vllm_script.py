"""The launch script and the README of a vLLM export: a base and its adapters in, texts out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from qlora_kit.config.serving_targets import vllm_max_rank
from qlora_kit.export.source import AnswerDefaults

PATTERNS_SINCE = (0, 33)
"""The vLLM that was read to follow rank_pattern and alpha_pattern; one of early 2025 left them out in silence."""


@dataclass(frozen=True)
class ServedBase:
    """The base that is served.

    Attributes:
        model: A folder beside the script, any folder, or a Hub id.
        revision: Of a Hub id.
        name: What requests call it.
    """

    model: str
    revision: str | None
    name: str


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is served.

    Attributes:
        name: What requests call it.
        folder: Beside the script.
        rank: Its highest rank.
        has_patterns: Whether layers have ranks or scales of their own.
        answers: How it was trained to answer.
    """

    name: str
    folder: str
    rank: int
    has_patterns: bool
    answers: AnswerDefaults


def serve_script(base: ServedBase, adapters: Sequence[ServedAdapter]) -> str:
    """A shell script that serves the base and each adapter under its own model name, on this machine alone."""
    arguments = [
        ["vllm", "serve", base.model],
        ["--served-model-name", base.name],
        ["--enable-lora", "--max-loras", str(len(adapters))],
        ["--max-lora-rank", str(vllm_max_rank(max(adapter.rank for adapter in adapters)))],
        ["--lora-modules", *(f"{adapter.name}={adapter.folder}" for adapter in adapters)],
        ["--host", "127.0.0.1", "--port", "8000"],
    ]
    if base.revision is not None:
        arguments.insert(1, ["--revision", base.revision, "--tokenizer-revision", base.revision])
    lines = [" ".join(map(shlex.quote, line)) for line in arguments]
    check = _version_check() if any(adapter.has_patterns for adapter in adapters) else ""
    command = " \\\n  ".join(lines)
    return (
        "#!/bin/sh\n"
        "# Serves the base and its adapters by vLLM, OpenAI-compatible. Further options are passed on: --port 9000\n"
        f'set -eu\ncd "$(dirname "$0")"\n{check}exec {command} \\\n  "$@"\n'
    )


def read_me(base: ServedBase, adapters: Sequence[ServedAdapter], notes: Sequence[str]) -> str:
    """What is in the folder, and how to ask: vLLM sends no adapter's system prompt by itself."""
    first = adapters[0]
    listed = "\n".join(f"- `{adapter.name}`{_about(adapter.answers)}" for adapter in adapters)
    request = json.dumps(_request(first), ensure_ascii=False, indent=2)
    remarks = "\n".join(f"- {note}" for note in notes)
    return (
        f"# {base.name} and its adapters for vLLM\n\n`./serve.sh` serves these model names on port 8000:\n\n"
        f"- `{base.name}`: the base\n{listed}\n\n"
        "vLLM sends no system prompt of its own and samples as the base's `generation_config.json` says. Send what the "
        f"adapter was trained with, as in this request to `/v1/chat/completions`:\n\n```json\n{request}\n```\n\n"
        f"{remarks}\n\n`export_report.json` holds every number.\n"
    )


def _version_check() -> str:
    need = f"{PATTERNS_SINCE[0]}.{PATTERNS_SINCE[1]}"
    program = (
        "import importlib.metadata as m, sys; "
        f'sys.exit(tuple(map(int, m.version("vllm").split(".")[:2])) < {PATTERNS_SINCE})'
    )
    message = f"an adapter has ranks or scales of its own for some layers, which needs vLLM {need} or newer"
    return f"python3 -c {shlex.quote(program)} || {{ echo {shlex.quote(message)} >&2; exit 2; }}\n"


def _about(answers: AnswerDefaults) -> str:
    parts = []
    if answers.task is not None:
        parts.append(f"task {answers.task}")
    if answers.system_prompt is not None:
        parts.append(f"system prompt {json.dumps(answers.system_prompt, ensure_ascii=False)}")
    if answers.stop_token_ids:
        parts.append(f"stop token ids {', '.join(map(str, answers.stop_token_ids))}")
    return f": {'; '.join(parts)}" if parts else ""


def _request(adapter: ServedAdapter) -> dict[str, object]:
    answers = adapter.answers
    messages = [{"role": "user", "content": "..."}]
    if answers.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": answers.system_prompt})
    request: dict[str, object] = {"model": adapter.name, "messages": messages}
    if not answers.generation.get("do_sample"):
        request["temperature"] = 0
    for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if answers.generation.get("do_sample") and answers.generation.get(key) is not None:
            request[key] = answers.generation[key]
    if answers.generation.get("max_new_tokens") is not None:
        request["max_tokens"] = answers.generation["max_new_tokens"]
    if answers.stop_token_ids:
        request["stop_token_ids"] = list(answers.stop_token_ids)
    return request
