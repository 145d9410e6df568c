"""Streamed text is whole characters, adds up to what the tokenizer decodes at once, and shows nothing of a stop."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from qlora_kit.errors import ConfigError
from qlora_kit.generation import Sampling, TextStream

TEXTS = [
    "Plain words, and a second sentence.",
    "Müller ate crème brûlée — naïvely.",
    "日本語のテキスト and 中文",
    "👩‍👩‍👧 family, 🇫🇷 flag, 👍🏽 skin",
    " leading and trailing ",
    "line\n\n  breaks\t tabs",
]


@pytest.fixture(params=["byte level", "sentencepiece"])
def tokenizer(
    request: pytest.FixtureRequest,
    chatml_tokenizer: PreTrainedTokenizerFast,
    make_sentencepiece_tokenizer: Callable[[str], PreTrainedTokenizerFast],
) -> PreTrainedTokenizerFast:
    return chatml_tokenizer if request.param == "byte level" else make_sentencepiece_tokenizer("{{ messages }}")


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()], stream.stopped


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, _ = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(bool(piece) for piece in pieces) > 3


def test_pieces_come_as_soon_as_they_are_certain(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chatml_tokenizer("a€b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5  # the sign is three tokens of one byte each
    assert streamed(chatml_tokenizer, ids)[0] == ["a", "", "", "€", "b", ""]


def test_bytes_that_never_become_a_character_are_shown_in_the_end(chatml_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = chatml_tokenizer("€", add_special_tokens=False)["input_ids"]
    for broken in (ids[:2], ids[1:] * 30, ids[:2] * 30):
        pieces, _ = streamed(chatml_tokenizer, broken)
        assert set("".join(pieces)) <= {"\ufffd"}
        assert "".join(pieces)


def test_random_tokens_add_up(tokenizer: PreTrainedTokenizerFast) -> None:
    numbers = random.Random(0)
    for _ in range(30):
        words = [numbers.choice(TEXTS) for _ in range(3)]
        ids = [token for text in words for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
        assert "".join(streamed(tokenizer, ids)[0]) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one two END three", ("END",), "one two "),
        ("one two EN", ("END",), "one two EN"),  # it never came
        ("EENEND", ("END",), "EEN"),
        ("aaab", ("aab",), "a"),
        ("one two three", ("three", "two"), "one "),  # the first in the text counts
        ("x\n\ny", ("\n\n",), "x"),
        ("👍 done", ("👍",), ""),
        ("nothing", ("zzz",), "nothing"),
        ("ab", ("ab", "a"), ""),
    ],
)
def test_nothing_of_a_stop_string_is_shown(
    chatml_tokenizer: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...], shown: str
) -> None:
    ids = chatml_tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces, stopped = streamed(chatml_tokenizer, ids, stop)
    assert "".join(pieces) == shown
    assert stopped == (shown != text)
    so_far = ""
    for piece in pieces:
        so_far += piece
        assert shown.startswith(so_far)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", float("nan")),
        ("stop", "text"),
        ("stop", ("",)),
        ("stop", ("x" * 257,)),
        ("stop", ("x",) * 17),
        ("stop", (1,)),
        ("logprobs", -1),
        ("logprobs", 21),
    ],
)
def test_values_out_of_bounds_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is (.|\n)*expected: (.|\n)*do: "):
        Sampling(**{name: value})
