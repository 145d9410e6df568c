"""Tokenizers of the families that Ollama runs, and conversations to render with them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + "
    "((messages[0]['content'] + '\n\n') if loop.index0 == 1 and messages[0]['role'] == 'system' else '') + "
    "message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
ODD_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>\u00a0{{' + message['role'] + '\"\"\"\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    '{% if add_generation_prompt %}{{ \'<|im_start|>\u00a0{{assistant"""\n\' }}{% endif %}'
)
ODD = 'Line one,\n  line {{ .System }} "two" \'three\' <b> & \\n é 中文 🙂 """'
TURNS = ("Question?", "An answer.", ODD, ODD, "Last one?")
SYSTEM = f"Answer in one word.\n{ODD}"


def tokenizers(make: Callable[..., Any], make_sentencepiece: Callable[[str], Any]) -> dict[str, Any]:
    """By family; what makes them is in ``conftest``."""
    made = {
        "qwen2_5": make("qwen", "qwen2_5", eos_token="<|im_end|>"),
        "qwen3": make("qwen", "qwen3", eos_token="<|im_end|>"),
        "llama3": make("llama3", "llama3", eos_token="<|eot_id|>"),
        "gemma3": make("qwen", "gemma3", eos_token="<|im_end|>"),
        "mistral": make_sentencepiece(MISTRAL),
        "odd": make("qwen", "qwen2_5", eos_token="<|im_end|>"),
    }
    made["odd"].chat_template = ODD_CHATML
    return made


def conversations() -> list[list[dict[str, str]]]:
    """One, two and three questions, without and with a system prompt."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(TURNS)]
    plain = [turns[: count + 1] for count in (0, 2, 4)]
    return [*plain, *([{"role": "system", "content": SYSTEM}, *turns] for turns in plain)]


def entries(template: str) -> list[dict[str, Any]]:
    """What ``render.go`` reads, for each conversation: Ollama hands the system prompt over by itself as well."""
    return [
        {
            "Template": template,
            "System": turns[0]["content"] if turns[0]["role"] == "system" else "",
            "Messages": [{"Role": turn["role"], "Content": turn["content"]} for turn in turns],
        }
        for turns in conversations()
    ]


def render_with_go(templates: dict[str, str]) -> dict[str, list[str]]:
    """Each template with each conversation, by Go's text/template."""
    asked = [entry for template in templates.values() for entry in entries(template)]
    command = ["go", "run", str(HERE / "render.go")]
    answer = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    texts = iter(json.loads(answer.stdout))
    return {name: [next(texts) for _ in conversations()] for name in templates}
