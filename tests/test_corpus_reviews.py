"""The generated reviews: held-out skeletons, labels that only composition decides, passages without held-out text."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest

from scripts.tiny_corpus import reviews
from scripts.tiny_corpus.holdout import PARTS, Part, Row, part_of

LABELS = ("positive", "negative", "neutral")


def words_of(row: Row) -> set[str]:
    return set(re.findall(r"[a-z]+|[?,.]", row.fields["text"].lower()))


@pytest.fixture(scope="module")
def parts() -> dict[Part, list[Row]]:
    return {part: reviews.rows(part, 3000 if part == "train" else 600, seed=0) for part in PARTS}


@pytest.fixture(scope="module")
def passages() -> list[str]:
    rng = random.Random(7)
    return [reviews.passage(rng) for _ in range(3000)]


def word_counts(rows: list[Row]) -> dict[str, Counter[str]]:
    """In how many rows of each label each word stands."""
    counts: dict[str, Counter[str]] = {label: Counter() for label in LABELS}
    for row in rows:
        counts[row.fields["label"]].update(words_of(row))
    return counts


def test_rows_are_deterministic_distinct_and_balanced(parts: dict[Part, list[Row]]) -> None:
    for part, rows in parts.items():
        assert rows == reviews.rows(part, len(rows), seed=0)
        assert rows[:50] != reviews.rows(part, 50, seed=1)
        assert len({row.fields["text"] for row in rows}) == len(rows)
        assert Counter(row.fields["label"] for row in rows) == dict.fromkeys(LABELS, len(rows) // 3)
        assert all(set(row.fields) == {"text", "label"} for row in rows)
        assert all(10 <= len(row.fields["text"].split()) <= 35 for row in rows)


def test_eight_thousand_rows_can_be_drawn() -> None:
    rows = reviews.rows("train", 8000, seed=3)
    assert len({row.fields["text"] for row in rows}) == 8000
    assert len({row.combination for row in rows}) > 4000


def test_no_skeleton_is_shared_between_parts(parts: dict[Part, list[Row]]) -> None:
    skeletons = {part: {row.combination for row in rows} for part, rows in parts.items()}
    for part in PARTS:
        assert all(part_of(skeleton) == part for skeleton in skeletons[part])
        assert not any(skeletons[part] & skeletons[other] for other in PARTS if other != part)


def test_every_piece_of_a_test_skeleton_and_every_test_word_occurs_in_train(parts: dict[Part, list[Row]]) -> None:
    known_pieces = {piece for row in parts["train"] for piece in row.combination.split("|")}
    known_words = {word for row in parts["train"] for word in words_of(row)}
    for row in parts["test"]:
        assert set(row.combination.split("|")) <= known_pieces
        assert words_of(row) <= known_words


def test_naive_bayes_on_single_words_fails(parts: dict[Part, list[Row]]) -> None:
    counts = word_counts(parts["train"])
    rows_per_label = len(parts["train"]) // 3

    def guess(row: Row) -> str:
        scores = {
            label: sum(math.log((counts[label][word] + 1) / (rows_per_label + 2)) for word in words_of(row))
            for label in LABELS
        }
        return max(scores, key=lambda label: scores[label])

    correct = sum(guess(row) == row.fields["label"] for row in parts["test"])
    assert correct / len(parts["test"]) <= 0.60


def test_no_single_word_rule_tells_the_labels_apart(parts: dict[Part, list[Row]]) -> None:
    counts = word_counts(parts["train"])
    rows_per_label = len(parts["train"]) // 3
    for word in set().union(*counts.values()):
        with_word = max(LABELS, key=lambda label: counts[label][word])
        without_word = min(LABELS, key=lambda label: counts[label][word])
        correct = counts[with_word][word] + rows_per_label - counts[without_word][word]
        assert correct / (3 * rows_per_label) <= 0.50, word


def test_adjectives_occur_equally_often_with_every_label(parts: dict[Part, list[Row]]) -> None:
    counts = word_counts(parts["train"])
    for adjectives in (reviews.GOOD, reviews.BAD):
        totals = [sum(counts[label][word] for word in adjectives) for label in LABELS]
        assert max(totals) / min(totals) < 1.2


@pytest.mark.parametrize(
    ("kind", "sign"),
    [("plain", 1), ("truly", 1), ("both", 1), ("half", 1), ("not", -1), ("far", -1), ("anything", -1), ("neither", -1)],
)
def test_single_clause_labels_follow_the_grammar(kind: str, sign: int) -> None:
    """For a one-clause review the label is readable from its adjectives and its negation alone."""
    found = 0
    for row in reviews.rows("train", 6000, seed=5):
        if "|" in row.combination or not row.combination.endswith(f"/{kind}"):
            continue
        words = words_of(row)
        good, bad = bool(words & set(reviews.GOOD)), bool(words & set(reviews.BAD))
        value = 0 if good and bad else sign * (1 if good else -1)
        assert row.fields["label"] == {1: "positive", -1: "negative", 0: "neutral"}[value], row
        found += 1
    assert found >= 5


def test_label_of_two_clauses_comes_from_the_stressed_one() -> None:
    """Plain adjectives on both sides of a contrast: the side that the connector stresses decides."""
    stressed_last = {"but": r", but (.*?)\.", "still": r"Still, (.*?)\.", "however": r"However, (.*?)\."}
    stressed_last |= {"although": r"although [^.]*?, (.*?)\.", "even_though": r"([^.]*), even though"}
    stressed_last |= {"though": r"([^.]*), though"}
    found: Counter[str] = Counter()
    for row in reviews.rows("train", 6000, seed=6):
        pieces = row.combination.split("|")
        if len(pieces) != 3 or pieces[1] not in stressed_last or not pieces[2].endswith(("/plain", "/very", "/really")):
            continue
        match = re.search(stressed_last[pieces[1]], row.fields["text"].replace("Although", "although"))
        assert match is not None, row
        stressed = set(match.group(1).split())
        expected = "positive" if stressed & set(reviews.GOOD) else "negative"
        assert row.fields["label"] == expected, row
        found[pieces[1]] += 1
    assert set(found) == set(stressed_last)


def test_passages_hold_no_held_out_review_and_no_label(parts: dict[Part, list[Row]], passages: list[str]) -> None:
    held_out = [row.fields["text"] for part in ("validation", "test") for row in parts[part]]
    everything = "\n".join(passages)
    assert not [text for text in held_out if text in everything]
    assert not re.search(r"positive|negative|neutral|<\|", everything)


def test_passages_are_deterministic_varied_and_short(passages: list[str]) -> None:
    rng = random.Random(7)
    assert [reviews.passage(rng) for _ in range(20)] == passages[:20]
    assert len(set(passages)) == len(passages)
    assert all(40 <= len(passage.split()) <= 150 for passage in passages)
    assert len({word for passage in passages for word in re.findall(r"[a-z]+", passage.lower())}) <= 320
