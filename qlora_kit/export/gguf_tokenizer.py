"""A tokenizer as a GGUF file holds it: a model's folder in; tokens, merges, special ids and chat template out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.base_files import BaseRef
from qlora_kit.data.chat import PROBES, stop_token_ids
from qlora_kit.data.rendering import TEMPLATE_ARGUMENTS, on_one_day, render_texts
from qlora_kit.data.template_file import read_stop_facts
from qlora_kit.errors import BaseModelError, DataError, Fault
from qlora_kit.export.gguf_pretokenizer import pretokenizer_name
from qlora_kit.export.gguf_sentencepiece import BYTE_TOKEN, adds_space_prefix, is_sentencepiece, merge_scores
from qlora_kit.models import load_tokenizer
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""GGUF's kinds of tokens (``TokenType``)."""
_NEVER_MERGED = -1e6
# Where llama.cpp stops by itself, whatever the file says (`special_eog_ids` of `llama-vocab.cpp`).
KNOWN_ENDS = frozenset(
    (
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    )
)  # fmt: skip
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")
_FIX = "export as bnb-4bit or for vLLM, which use tokenizer.json itself"
_COPY_FIX = "copy the tokenizer's files into the folder"


@dataclass(frozen=True)
class GgufVocabulary:
    """What ``tokenizer.*`` of a GGUF file says.

    Attributes:
        model: ``gpt2`` for byte-level merges, ``llama`` for SentencePiece's kind.
        pre: How text is split before the merges.
        tokens: The text of each id, as many as the embedding has rows.
        types: The kind of each.
        scores: By what SentencePiece's kind merges; None for byte-level.
        merges: By what byte-level merges; None for SentencePiece's kind.
        special_ids: By the names of GGUF's keys: ``bos``, ``eos``, ``eot``, ``eom``, ``pad``, ``unk``.
        add_bos: Whether the tokenizer puts its BOS before plain text. Chat templates write their own.
        add_eos: Whether it puts its EOS behind.
        add_space_prefix: Whether text gets a space before it; None for byte-level.
        chat_template: The template, with the arguments set that the kit renders every conversation with.
        stop_ids: Where an answer ends: the template's stop token first, then the model's own.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] | None
    merges: tuple[str, ...] | None
    special_ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None
    chat_template: str
    stop_ids: tuple[int, ...]

    def write_to(self, writer: GGUFWriter) -> None:
        """Add the keys to a file's header."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        add_id = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "eot": writer.add_eot_token_id,
            "eom": writer.add_eom_token_id,
            "pad": writer.add_pad_token_id,
            "unk": writer.add_unk_token_id,
        }
        for name, number in self.special_ids.items():
            add_id[name](number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, config: Mapping[str, Any], rows: int) -> GgufVocabulary:
    """Read the tokenizer of the model in ``folder``.

    Args:
        folder: A checkpoint with its tokenizer's files.
        config: The content of its ``config.json``.
        rows: How many rows the embedding has; ids without a token are named and marked as unused.

    Raises:
        BaseModelError: The tokenizer cannot be loaded, or llama.cpp cannot do what it does.
    """
    # transformers would make an empty Qwen2Tokenizer
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise BaseModelError(
            f"{folder}: there is no tokenizer", expected=f"one of {', '.join(_TOKENIZER_FILES)}", fix=_COPY_FIX
        )
    tokenizer = load_tokenizer(BaseRef(str(folder), folder))
    if not tokenizer.is_fast:
        raise BaseModelError(
            f"{folder}: the tokenizer is written in Python", expected="one with a tokenizer.json", fix=_FIX
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"].get("type") != "BPE":
        raise BaseModelError(
            f"{folder}: the tokenizer is of the kind {shown(str(content['model'].get('type')))}",
            expected="BPE: byte-level, or SentencePiece's kind with byte tokens",
            fix=_FIX,
        )
    _require_plain_added_tokens(content["added_tokens"], folder)
    texts = _texts(tokenizer, rows, folder)
    sentencepiece = is_sentencepiece(content)
    merges = _merges(content["model"]["merges"])
    scores = prefix = None
    if sentencepiece:
        added = {token["content"] for token in content["added_tokens"]}
        by_token = merge_scores(content["model"]["vocab"], merges, added, folder)
        scores = tuple(by_token.get(text, _NEVER_MERGED if text in added else 0.0) for text in texts)
        prefix = adds_space_prefix(content, _rendered_probes(tokenizer), folder)
    stop_ids = _stop_ids(folder, config, tokenizer)
    add_bos, add_eos = _added_around_text(tokenizer, folder)
    return GgufVocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else pretokenizer_name(content, folder),
        tokens=tuple(texts),
        types=tuple(_types(texts, content, tokenizer, sentencepiece=sentencepiece)),
        scores=scores,
        merges=None if sentencepiece else _byte_level_merges(merges, folder),
        special_ids=_special_ids(tokenizer, config, stop_ids, folder),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        chat_template=shipped_template(str(tokenizer.chat_template)),
        stop_ids=stop_ids,
    )


def shipped_template(template: str) -> str:
    """The template with the arguments set that the kit gives to every template; other programs give others, or none.

    So Qwen3's prompt ends with the empty thought that answers were trained behind, and no prompt depends on the day.
    """
    settings = {name: value for name, value in TEMPLATE_ARGUMENTS.items() if name in template}
    literals = {name: "false" if value is False else f'"{value}"' for name, value in settings.items()}
    prefix = "".join(f"{{%- set {name} = {literal} -%}}" for name, literal in literals.items())
    return prefix + on_one_day(template)


def _require_plain_added_tokens(added: Iterable[Mapping[str, Any]], folder: Path) -> None:
    faults = [
        Fault(
            f"{folder}: the added token {shown(token['content'])} has {key} set",
            "added tokens that match their text and nothing around it, as in llama.cpp",
            _FIX,
        )
        for token in added
        for key in ("lstrip", "rstrip", "single_word")
        if token[key]
    ]
    if faults:
        raise BaseModelError.of(faults, at_most=5)


def _texts(tokenizer: PreTrainedTokenizerBase, rows: int, folder: Path) -> list[str]:
    """The text of each id; ids without one get a name that no token has."""
    by_id = {number: text for text, number in tokenizer.get_vocab().items() if text}
    largest = max(by_id)
    if largest >= rows:
        raise BaseModelError(
            f"{folder}: the tokenizer has the token {largest}, the model {rows} rows",
            expected="a row of the embedding for each token",
            fix="check that tokenizer and weights belong together; a merge of resized tokens brings its own tokenizer",
        )
    known = set(by_id.values())
    for number in range(rows):
        if number not in by_id:
            name = f"[PAD{number}]"
            while name in known:
                name += "_"
            by_id[number] = name
    return [by_id[number] for number in range(rows)]


def _types(
    texts: Sequence[str], content: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, sentencepiece: bool
) -> list[int]:
    """A control token is one that the tokenizer calls special: another added one may be part of an answer."""
    kinds = {token["content"]: CONTROL if token["special"] else USER_DEFINED for token in content["added_tokens"]}
    if sentencepiece and content["model"].get("unk_token") is not None:
        kinds[content["model"]["unk_token"]] = UNKNOWN
    used = tokenizer.get_vocab()

    def kind(text: str) -> int:
        if text not in used:
            return UNUSED
        return kinds.get(text, BYTE if sentencepiece and BYTE_TOKEN.fullmatch(text) else NORMAL)

    return [kind(text) for text in texts]


def _merges(listed: Iterable[Any]) -> list[tuple[str, str]]:
    """``tokenizer.json`` lists pairs, or texts with a space between."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in listed)
    return [(left, right) for left, right in pairs]


def _byte_level_merges(merges: Iterable[tuple[str, str]], folder: Path) -> tuple[str, ...]:
    lines = tuple(f"{left} {right}" for left, right in merges)
    odd = next((line for line in lines if line.count(" ") != 1), None)
    if odd is not None:
        raise BaseModelError(
            f"{folder}: the merge {shown(odd)} holds a space",
            expected="merges of a byte-level vocabulary, which writes a space as a letter",
            fix=_FIX,
        )
    return lines


def _rendered_probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    texts = []
    for for_generation, messages in PROBES:
        try:
            texts += render_texts([messages], tokenizer, for_generation=for_generation)
        except DataError:  # the template takes no system turn
            continue
    return texts


def _stop_ids(folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    return tuple(dict.fromkeys((*stop_token_ids(tokenizer), *read_stop_facts(folder, config).generation_ids)))


def _added_around_text(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS behind a plain text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, behind in ((False, False), (True, False), (False, True), (True, True)):
        if full == (bos if before else []) + plain + (eos if behind else []):
            return before, behind
    raise BaseModelError(
        f"{folder}: the tokenizer puts other tokens around a text than its BOS and EOS",
        expected="BOS before it, EOS behind it, or neither",
        fix=_FIX,
    )


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, config: Mapping[str, Any], stop_ids: Sequence[int], folder: Path
) -> dict[str, int]:
    """Ids by GGUF's names. What is left out, llama.cpp would guess: 11 for BOS and EOS of a byte-level vocabulary."""
    further = [number for number in stop_ids[1:] if tokenizer.convert_ids_to_tokens(number) not in KNOWN_ENDS]
    if len(further) > 1:
        names = ", ".join(shown(str(tokenizer.convert_ids_to_tokens(number))) for number in further)
        raise BaseModelError(
            f"{folder}: generation stops at {names}, which llama.cpp does not know as ends",
            expected="at most one such token beside the one that ends a turn: a GGUF file has no place for more",
            fix="leave those that no answer ends with out of eos_token_id in generation_config.json",
        )
    pad = tokenizer.pad_token_id
    bos = next(
        number
        for number in (tokenizer.bos_token_id, config.get("bos_token_id"), pad, stop_ids[0])
        if type(number) is int
    )
    ids = {"bos": bos, "eos": stop_ids[0], "eot": stop_ids[0]}
    if further:
        ids["eom"] = further[0]
    if pad is not None:
        ids["pad"] = pad
    if tokenizer.unk_token_id is not None:
        ids["unk"] = tokenizer.unk_token_id
    return ids
