"""How a byte-level tokenizer splits text before its merges, by the name under which llama.cpp does the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import shown

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_GPT2 = "gpt-2's own split"
_SINGLE_DIGITS = "each digit by itself"
# The steps of a split, and whether a word that is a token needs no merges -> `tokenizer.ggml.pre`; the patterns are
# those of `llama-vocab.cpp` as it quotes them from the models' tokenizer.json.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",), False): "smaug-bpe",
    ((rf"{_TEKKEN_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), True): "tekken",
    ((_GPT2,), False): "gpt-2",
    ((_SINGLE_DIGITS, _GPT2), False): "smollm",
}
_FIX = "export as bnb-4bit or for vLLM, or convert with llama.cpp's own script and compare the token ids"


def pretokenizer_name(content: Mapping[str, Any], folder: Path) -> str:
    """llama.cpp's name of the split.

    Args:
        content: The tokenizer as ``tokenizer.json`` describes it.
        folder: Where it comes from, for messages.

    Raises:
        BaseModelError: llama.cpp has no such split, or text is normalised otherwise than by NFC.
    """
    normalizer = content.get("normalizer")
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise BaseModelError(
            f"{folder}: the tokenizer normalises text by {shown(str(normalizer.get('type')))}",
            expected="NFC or nothing: llama.cpp does not normalise text of such a vocabulary",
            fix=_FIX,
        )
    steps = _steps(content.get("pre_tokenizer"))
    ignore_merges = bool(content["model"].get("ignore_merges"))
    name = None if steps is None else _NAMES.get((steps, ignore_merges))
    if name is None:
        text = "an unknown way" if steps is None else shown(" then ".join(steps))
        raise BaseModelError(
            f"{folder}: the tokenizer splits text by {text} (ignore_merges {str(ignore_merges).lower()})",
            expected="a split that llama.cpp has, as " + ", ".join(sorted(_NAMES.values())),
            fix=_FIX,
        )
    return name


def _steps(pre_tokenizer: Any) -> tuple[str, ...] | None:
    """What is done one after the other; None where it cannot be said in the words of ``_NAMES``."""
    if not isinstance(pre_tokenizer, Mapping):
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    steps: list[str] = []
    for part in parts:
        kind = part["type"]
        if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"] and "Regex" in part["pattern"]:
            steps.append(part["pattern"]["Regex"])
        elif kind == "Digits" and part["individual_digits"]:
            steps.append(_SINGLE_DIGITS)
        elif kind == "ByteLevel" and not part["add_prefix_space"] and part is parts[-1]:
            steps += [_GPT2] if part["use_regex"] else []
        else:
            return None
    return tuple(steps) if parts and parts[-1]["type"] == "ByteLevel" else None
