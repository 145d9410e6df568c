"""Vocabularies of the SentencePiece kind (Llama 2, Mistral): merges by rank in, scores for llama.cpp to merge by out.

llama.cpp joins the two neighbours whose text together is the token of the highest score (``llm_tokenizer_spm``). That
is what a list of merges does if it holds every split of a token, and no other token's splits between them; then minus
the rank is a score. SentencePiece's own models are such, once converted (``generate_merges`` of transformers).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import shown

SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_FIX = "export as bnb-4bit or for vLLM, which use tokenizer.json itself"


def is_sentencepiece(content: Mapping[str, Any]) -> bool:
    """Whether characters without a token are spelt in byte tokens, which is how this kind is told from byte-level."""
    return bool(content["model"].get("byte_fallback"))


def merge_scores(
    vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Set[str], folder: Path
) -> dict[str, float]:
    """The score of each token that merges make.

    Args:
        vocabulary: Tokens of the model with their ids.
        merges: Pairs in the order of their ranks.
        added: Tokens that are found in a text before anything is merged.
        folder: Where they come from, for messages.

    Raises:
        BaseModelError: A score cannot say in which order these merges are done.
    """
    _require_bytes(vocabulary, folder)
    scores: dict[str, float] = {}
    groups = 0
    last = None
    for rank, (left, right) in enumerate(merges):
        token = left + right
        if token != last:
            groups, last = groups + 1, token
        scores.setdefault(token, -float(rank))
    splits = {
        (token[:cut], token[cut:])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    }
    splits, listed = (
        {(left, right) for left, right in pairs if not {left, right, left + right} & added}
        for pairs in (splits, merges)
    )
    missing, foreign = splits - listed, listed - splits
    if missing or foreign or groups != len(scores):
        odd = min(missing or foreign, default=None)
        reason = (
            "the merges of one token stand apart" if odd is None else f"{len(missing)} splits of tokens are missing"
        )
        example = "" if odd is None else f", {shown(' + '.join(odd))} among them"
        raise BaseModelError(
            f"{folder}: llama.cpp would merge text in another order than this tokenizer: {reason}{example}",
            expected="merges that list every split of each token, as those converted from SentencePiece do",
            fix=_FIX,
        )
    return scores


def adds_space_prefix(content: Mapping[str, Any], texts: Iterable[str], folder: Path) -> bool:
    """Whether text gets a space before it, behind each control token too: ``tokenizer.ggml.add_space_prefix``.

    llama.cpp knows always and never. Tokenizers know two more rules, which come to the same for conversations whose
    template begins with a control token (``first``), or has no space behind one (``always``).

    Args:
        content: The tokenizer as ``tokenizer.json`` describes it.
        texts: Rendered conversations, to see which of these holds.
        folder: Where it comes from, for messages.

    Raises:
        BaseModelError: Neither always nor never gives this tokenizer's tokens.
    """
    rule = _prefix_rule(content)
    added = sorted((token["content"] for token in content["added_tokens"]), key=len, reverse=True)
    stretches = [re.split("|".join(map(re.escape, added)), text) for text in texts]
    if rule in ("prepend", "never"):
        return rule == "prepend"
    if rule == "first" and not any(parts[0] for parts in stretches):
        return False
    if rule == "always" and not any(part.startswith((" ", SPACE)) for parts in stretches for part in parts):
        return True
    raise BaseModelError(
        f"{folder}: the tokenizer puts a space before text by the rule {shown(str(rule))}",
        expected="a rule that llama.cpp has: before each stretch between control tokens, or never",
        fix=_FIX,
    )


def _prefix_rule(content: Mapping[str, Any]) -> str | None:
    normalizer, pre_tokenizer = content.get("normalizer"), content.get("pre_tokenizer")
    if pre_tokenizer is None and normalizer is not None:
        steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
        rest = [step for step in steps if step != replace]
        if len(rest) == len(steps):
            return None
        return {(): "never", (("Prepend", SPACE),): "prepend"}.get(
            tuple((step["type"], step.get("prepend")) for step in rest)
        )
    if normalizer is not None or pre_tokenizer is None or pre_tokenizer["type"] != "Metaspace":
        return None
    if pre_tokenizer["replacement"] != SPACE or pre_tokenizer["split"]:
        return None
    scheme: str = pre_tokenizer["prepend_scheme"]
    return scheme


def _require_bytes(vocabulary: Mapping[str, int], folder: Path) -> None:
    missing = [byte for byte in range(256) if f"<0x{byte:02X}>" not in vocabulary]
    if missing:
        raise BaseModelError(
            f"{folder}: the tokenizer has no token for {len(missing)} of the 256 bytes, as <0x{missing[0]:02X}>",
            expected="a token for each byte, in which llama.cpp spells characters that have no token",
            fix=_FIX,
        )
