"""Question answering generator: hold-out by answer phrase, one right answer a row, look-up needed, no leaks."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from scripts.tiny_corpus import facts
from scripts.tiny_corpus.holdout import PARTS, Part, Row, part_of

COUNTS: dict[Part, int] = {"train": 8000, "validation": 400, "test": 400}


@pytest.fixture(scope="module")
def parts() -> dict[Part, list[Row]]:
    return {part: facts.rows(part, count, seed=1) for part, count in COUNTS.items()}


@pytest.fixture(scope="module")
def passages() -> list[str]:
    rng = random.Random(5)
    return [facts.passage(rng) for _ in range(3000)]


def all_phrases_in(text: str) -> set[str]:
    """Every known phrase in a text by plain substring search: slow, independent of ``held_out_in``."""
    known = (phrase for kind in facts.PHRASES for part in PARTS for phrase in facts.phrases(kind, part))
    return {phrase for phrase in known if phrase.lower() in text.lower()}


def test_rows_are_distinct_and_of_their_part(parts: dict[Part, list[Row]]) -> None:
    for part, rows in parts.items():
        assert len(rows) == COUNTS[part]
        assert len({(row.fields["context"], row.fields["question"]) for row in rows}) == len(rows)
        assert all(part_of(row.combination) == part for row in rows)
        assert all(row.combination == row.fields["answer"] for row in rows)


def test_same_seed_same_rows_other_seed_other_rows() -> None:
    assert facts.rows("test", 50, seed=3) == facts.rows("test", 50, seed=3)
    assert facts.rows("test", 50, seed=3) != facts.rows("test", 50, seed=4)
    assert facts.passage(random.Random(1)) == facts.passage(random.Random(1))


def test_answer_stands_once_in_the_context_and_not_in_the_question(parts: dict[Part, list[Row]]) -> None:
    for row in (row for rows in parts.values() for row in rows):
        context, question, answer = row.fields["context"], row.fields["question"], row.fields["answer"]
        found = re.findall(rf"\b{answer}\b", context, flags=re.IGNORECASE)
        assert len(found) == 1, row
        assert answer.lower() not in question.lower()
        assert 2 <= len(answer.split()) <= 4
        assert 3 <= context.count(".") <= 6
        assert len(context.split()) <= 70


def test_every_phrase_of_a_context_belongs_to_the_part(parts: dict[Part, list[Row]]) -> None:
    for part, rows in parts.items():
        for row in rows[:60]:
            found = all_phrases_in(row.fields["context"])
            assert len(found) >= 3
            assert {part_of(phrase) for phrase in found} == {part}


def test_train_rows_hold_no_held_out_phrase(parts: dict[Part, list[Row]]) -> None:
    assert all(not facts.held_out_in(row.fields["context"]) for row in parts["train"])
    train = {row.fields["answer"] for row in parts["train"]}
    test = {row.fields["answer"] for row in parts["test"]}
    validation = {row.fields["answer"] for row in parts["validation"]}
    assert not train & test and not train & validation and not test & validation


def test_the_question_key_decides(parts: dict[Part, list[Row]]) -> None:
    """Each context has another phrase of the answer's kind, and neither first nor last place gives the answer away."""
    kind_of = {phrase: kind for kind in facts.PHRASES for phrase in facts.phrases(kind, "test")}
    places: Counter[str] = Counter()
    for row in parts["test"]:
        context, answer = row.fields["context"].lower(), row.fields["answer"]
        alike = sorted(
            (p for p, kind in kind_of.items() if kind == kind_of[answer] and re.search(rf"\b{p.lower()}\b", context)),
            key=lambda phrase: context.index(phrase.lower()),
        )
        assert len(alike) >= 2, row
        places["first"] += alike[0] == answer
        places["last"] += alike[-1] == answer
    assert max(places.values()) / len(parts["test"]) < 0.5


def test_the_answer_stands_in_the_sentence_of_the_key(parts: dict[Part, list[Row]]) -> None:
    """The names and things of the question stand in the answer's sentence, and mostly in no other."""
    alone = 0
    for row in parts["test"]:
        sentences = row.fields["context"].lower().rstrip(".").split(". ")
        names = [name.lower() for name in facts.FIRST_NAMES if re.search(rf"\b{name}\b", row.fields["question"])]
        things = re.findall(r"\bthe (?!home|owner|work)(\w+)", row.fields["question"])
        keys = names or things
        assert keys, row
        with_keys = [text for text in sentences if all(re.search(rf"\b{key}\b", text) for key in keys)]
        assert sum(row.fields["answer"].lower() in text for text in with_keys) == 1, row
        alone += len(with_keys) == 1
    assert 0.7 < alone / len(parts["test"]) < 0.98


def test_train_covers_every_word_and_every_relation(parts: dict[Part, list[Row]]) -> None:
    train = Counter(re.findall(r"\w+", " ".join(v for row in parts["train"] for v in row.fields.values()).lower()))
    for row in parts["validation"] + parts["test"]:
        for word in re.findall(r"\w+", " ".join(row.fields.values())):
            assert train[word.lower()] >= 20, word
    assert len(train) <= 300
    assert len(facts.RELATIONS) >= 15


def test_each_part_has_enough_answers() -> None:
    for part in PARTS:
        for kind in facts.PHRASES:
            assert len(facts.phrases(kind, part)) >= 10, (part, kind)


def test_passages_hold_no_held_out_phrase(passages: list[str]) -> None:
    assert [facts.held_out_in(text) for text in passages if facts.held_out_in(text)] == []
    joined = "\n".join(passages).lower()
    assert [phrase for phrase in facts.phrases("object", "test") if phrase in joined] == []


def test_held_out_in_finds_a_planted_phrase() -> None:
    for kind in facts.PHRASES:
        phrase = facts.phrases(kind, "test")[0]
        assert facts.held_out_in(f"There it was: the {phrase.capitalize()}, and no other.") == [phrase.lower()]
        assert facts.held_out_in(f"There it was: {facts.phrases(kind, 'train')[0]}.") == []


def test_passages_never_answer_by_a_bare_phrase(passages: list[str]) -> None:
    """After each question mark comes a sentence with more than the phrase, or speech; never the phrase and a stop."""
    bare = {phrase.lower() for kind in facts.PHRASES for phrase in facts.phrases(kind, "train")}
    answers = [match.lower() for text in passages for match in re.findall(r"\?\W*([^.?\n]*)", text)]
    assert len(answers) > 3000
    assert not [answer for answer in answers if re.sub(r"^(the|a|an) ", "", answer) in bare]


def test_passages_are_of_the_promised_size_and_plain(passages: list[str]) -> None:
    lengths = sorted(len(text.split()) for text in passages)
    assert lengths[len(lengths) // 20] >= 30
    assert lengths[-1] <= 170
    joined = "\n".join(passages).lower()
    assert not re.search(r"\b(positive|negative|neutral)\b|<\|", joined)
