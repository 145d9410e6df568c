"""The copying text repeats what it says, spells no phrase of a task, and its token sequences are true repetitions."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from scripts.tiny_corpus import copying, words

PASSAGES = [copying.passage(random.Random(seed)) for seed in range(3000)]


def test_passages_are_deterministic_and_varied() -> None:
    again = [copying.passage(random.Random(seed)) for seed in range(3000)]
    assert again == PASSAGES
    assert len(set(PASSAGES)) == len(PASSAGES)


def test_most_words_of_a_passage_were_said_before() -> None:
    repeated = total = 0
    for text in PASSAGES:
        tokens = text.split()
        repeated += len(tokens) - len(set(tokens))
        total += len(tokens)
    assert repeated / total > 0.5


def test_no_two_real_words_stand_side_by_side() -> None:
    listed = words.SIZES + words.COLOURS + words.OBJECTS + words.PLACES + words.ANIMALS + words.FOODS + words.NUMBERS
    alternatives = "|".join(listed)
    phrase = re.compile(rf"\b(?:{alternatives}) (?:{alternatives})s?\b")
    assert phrase.search("a red box") is not None
    assert [text for text in PASSAGES if phrase.search(text)] == []


def test_passages_have_the_promised_length() -> None:
    counts = [len(text.split()) for text in PASSAGES]
    assert min(counts) >= 8
    assert max(counts) <= 150
    assert 30 <= sum(counts) / len(counts) <= 80


@pytest.mark.parametrize("length", [2, 17, 64, 256, 513])
def test_repeated_token_ids_repeat(length: int) -> None:
    for seed in range(20):
        ids = copying.repeated_token_ids(random.Random(seed), 2048, length, 5)
        assert len(ids) == length
        assert all(5 <= token < 2048 for token in ids)
        assert ids == copying.repeated_token_ids(random.Random(seed), 2048, length, 5)


def test_at_least_a_third_of_the_bigrams_have_been_seen() -> None:
    seen_again = total = 0
    for seed in range(50):
        ids = copying.repeated_token_ids(random.Random(seed), 2048, 512)
        bigrams = list(itertools.pairwise(ids))
        seen: set[tuple[int, int]] = set()
        for bigram in bigrams:
            seen_again += bigram in seen
            seen.add(bigram)
        total += len(bigrams)
    assert seen_again / total > 1 / 3


def test_repetitions_lie_at_many_distances() -> None:
    distances = set()
    for seed in range(50):
        last: dict[int, int] = {}
        for position, token in enumerate(copying.repeated_token_ids(random.Random(seed), 100_000, 512)):
            if token in last:
                distances.add(position - last[token])
            last[token] = position
    assert min(distances) <= 12
    assert max(distances) >= 200


def test_heldout_copy_is_a_segment_and_its_copy() -> None:
    ids, segment_tokens = copying.heldout_copy_ids(random.Random(3), 2048, 129, 10)
    assert (len(ids), segment_tokens) == (128, 64)
    assert ids[:segment_tokens] == ids[segment_tokens:]
    assert min(ids) >= 10
    assert len(set(ids)) > 48


@pytest.mark.parametrize(("vocab_size", "length", "first_id"), [(10, 8, 10), (10, 8, -1), (10, 1, 0)])
def test_impossible_ranges_are_refused(vocab_size: int, length: int, first_id: int) -> None:
    for build in (copying.repeated_token_ids, copying.heldout_copy_ids):
        with pytest.raises(ValueError, match="expected"):
            build(random.Random(0), vocab_size, length, first_id)
