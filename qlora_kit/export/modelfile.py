"""Ollama's Modelfile: template, system prompt, stop tokens and sampling defaults in, its text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from qlora_kit.errors import BaseModelError
from qlora_kit.export.go_template import TurnTexts, go_template, is_kept
from qlora_kit.safetensors_header import shown

# transformers' own defaults of sampling, which Ollama's differ from.
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_KNOWN = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens",
    "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_from_model_config",
}  # fmt: skip
_MAX_CONTEXT_TOKENS = 8192


@dataclass(frozen=True)
class Modelfile:
    """The text of a Modelfile, and what could not be said in it.

    Attributes:
        text: The file.
        remarks: What a user should know.
    """

    text: str
    remarks: tuple[str, ...]


def write_modelfile(
    texts: TurnTexts,
    *,
    weights: str,
    adapter: str | None,
    system_prompt: str | None,
    stops: Sequence[str],
    generation: Mapping[str, Any],
    context_tokens: int | None,
) -> Modelfile:
    """Write a Modelfile.

    A system prompt with characters that Ollama's parser drops, or with three quotes in a row, goes into the template
    as what stands there when a request brings none.

    Args:
        texts: The chat template's.
        weights: Name of the GGUF file beside the Modelfile.
        adapter: Of a GGUF LoRA beside it; None for none.
        system_prompt: Trained with; None for none.
        stops: Texts of the stop tokens.
        generation: Generation defaults by their ``GenerationConfig`` names.
        context_tokens: The longest context of the model, if known.
    """
    remarks = []
    system = ""
    if system_prompt and texts.system is None:
        remarks.append(f"the chat template takes no system prompt; left out: {system_prompt!r}")
    elif system_prompt and _is_quotable(system_prompt):
        system = f"SYSTEM {_quoted(system_prompt)}\n"
    elif system_prompt:
        texts = texts.with_own_system(system_prompt)
        remarks.append(
            "the system prompt stands in TEMPLATE: SYSTEM cannot hold characters that are not printed or three quotes"
        )
    if texts.strips:
        remarks.append("the chat template strips white space at the ends of a turn, Ollama's cannot: send it stripped")
    parameters = sampling_parameters(generation)
    if context_tokens is not None:
        parameters["num_ctx"] = min(context_tokens, _MAX_CONTEXT_TOKENS)
    left_out = sorted(key for key, value in generation.items() if key not in _KNOWN and value not in (None, False, 1))
    if left_out:
        remarks.append(f"generation defaults without a counterpart in Ollama: {', '.join(left_out)}")
    lines = [f"FROM ./{weights}"]
    if adapter is not None:
        lines.append(f"ADAPTER ./{adapter}")
    lines.append(f"TEMPLATE {_quoted(go_template(texts))}")
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    lines += [f"PARAMETER {key} {value}" for key, value in parameters.items()]
    return Modelfile("\n".join(lines) + "\n" + system, tuple(remarks))


def sampling_parameters(generation: Mapping[str, Any]) -> dict[str, int | float]:
    """Ollama's parameters for ``GenerationConfig`` keys; greedy where nothing says that answers are sampled.

    Each is named, also where it is Ollama's own default: those have changed between its versions.

    Raises:
        BaseModelError: One of them is no number. The files are not the kit's own, and a text could hold further lines.
    """
    found: dict[str, int | float] = {"temperature": 0}
    if generation.get("do_sample"):
        found = {key: _number(generation, key, default) for key, default in _SAMPLING.items()}
        found["min_p"] = _number(generation, "min_p", 0)
    found["repeat_penalty"] = _number(generation, "repetition_penalty", 1.0)
    if found["repeat_penalty"] != 1:
        found["repeat_last_n"] = -1  # transformers looks at the whole text
    if generation.get("max_new_tokens") is not None:
        found["num_predict"] = _number(generation, "max_new_tokens", 0)
    return found


def _number(generation: Mapping[str, Any], key: str, default: int | float) -> int | float:
    value = generation.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not isfinite(value):
        raise BaseModelError(
            f"the model's generation defaults: {key} is {shown(repr(value))}",
            expected="a finite number",
            fix="correct it in generation_config.json (of a merged model, in merge_report.json too)",
        )
    number: int | float = value
    return number


def _is_quotable(text: str) -> bool:
    return '"""' not in text and is_kept(text)


def _quoted(text: str) -> str:
    """A value between triple quotes: it ends at the first line that ends with three quotes."""
    if not _is_quotable(text):
        raise ValueError(f"{text!r} cannot stand in a Modelfile")
    return f'"""{text}"""'
