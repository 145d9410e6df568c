"""Text and token sequences that teach copying from the context: each says something arbitrary and says it again later.

Nothing here belongs to a task. Real words never stand side by side without a made-up word or punctuation between
them, so that no passage can spell a phrase that a task keeps for its test rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from scripts.tiny_corpus.words import ANIMALS, COLOURS, FIRST_NAMES, FOODS, NUMBERS, OBJECTS, PLACES, SIZES

REAL_WORDS = OBJECTS + ANIMALS + FOODS + PLACES + COLOURS + SIZES
KNOWN_WORDS = frozenset(REAL_WORDS + NUMBERS)
THINGS = OBJECTS + ANIMALS
SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
ENDINGS = ("", "", "l", "n", "r", "s")
SEPARATORS = (" = ", " : ", " -> ", " is ")
ENTRY_BREAKS = (" ; ", "\n", " , ", ". ")
ITEM_BREAKS = (", ", " / ", " | ", " - ")
MIN_SEGMENT_TOKENS = 8
MAX_SEGMENT_TOKENS = 48


def _made_up_word(rng: random.Random) -> str:
    syllable_count = 2 if rng.random() < 0.75 else 3
    word = "".join(rng.choices(SYLLABLES, k=syllable_count)) + rng.choice(ENDINGS)
    return _made_up_word(rng) if word in KNOWN_WORDS or word.removesuffix("s") in KNOWN_WORDS else word


def _made_up_words(rng: random.Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words[_made_up_word(rng)] = None
    return list(words)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 4)))


def _mixed_items(rng: random.Random, count: int) -> list[str]:
    """Real words, made-up words and numbers; a made-up word stands between any two real ones."""
    items = []
    for index in range(count):
        if index % 2:
            items.append(rng.choice(REAL_WORDS) if rng.random() < 0.7 else _number(rng))
        else:
            items.append(_made_up_word(rng))
    return items


def _value(rng: random.Random) -> str:
    """A value of one to three words: a number, a made-up name, or a phrase with a made-up adjective."""
    kind = rng.randrange(4)
    if kind == 0:
        return _number(rng)
    if kind == 1:
        return _made_up_word(rng)
    if kind == 2:
        return f"the {_made_up_word(rng)} {rng.choice(THINGS)}"
    return f"{_made_up_word(rng)} {_made_up_word(rng)}"


def _keys(rng: random.Random, count: int) -> list[str]:
    kind = rng.randrange(3)
    if kind == 0:
        return rng.sample(FIRST_NAMES, count)
    if kind == 1:
        return rng.sample(REAL_WORDS, count)
    return _made_up_words(rng, count)


def _repeated_sequence(rng: random.Random) -> str:
    """A sequence of words said two to four times, sometimes with something else between."""
    items = _mixed_items(rng, rng.randint(7, 20))
    line = " ".join(items) if rng.random() < 0.6 else rng.choice(ITEM_BREAKS).join(items)
    times = 2 if len(items) > 14 else rng.randint(2, 4)
    middle = rng.choice(("\n", " . ", "\nand again\n", " ; again : ", f"\n{' '.join(_mixed_items(rng, 5))}\n"))
    return middle.join([line] * times)


def _key_value_list(rng: random.Random) -> str:
    """A list of keys and values, then the same pairs looked up in another order."""
    keys = _keys(rng, rng.randint(4, 8))
    separator = rng.choice(SEPARATORS)
    entries = [f"{key}{separator}{_value(rng)}" for key in keys]
    entry_break = rng.choice(ENTRY_BREAKS)
    lookups = rng.choices(entries, k=rng.randint(5, 10))
    return entry_break.join(entries) + rng.choice((" ;; ", "\n\n", " . look again : ")) + entry_break.join(lookups)


def _told_again(rng: random.Random) -> str:
    """Statements about people and arbitrary values, then the same statements with their order changed."""
    names = rng.sample(FIRST_NAMES, rng.randint(3, 5)) if rng.random() < 0.6 else _made_up_words(rng, 4)
    first_form, second_form = rng.sample(
        ("{name} has {value}.", "{name} says {value}.", "{value} goes with {name}.", "with {name} goes {value}."), 2
    )
    pairs = [(name, _value(rng)) for name in names]
    told = " ".join(first_form.format(name=name, value=value) for name, value in pairs)
    again = " ".join(
        second_form.format(name=name, value=value) for name, value in rng.choices(pairs, k=rng.randint(4, 7))
    )
    return f"{told}\n{again}"


def _quoted_lines(rng: random.Random) -> str:
    """Numbered or named lines, of which some are quoted word for word."""
    lines = [" ".join(_mixed_items(rng, rng.randint(4, 9))) for _ in range(rng.randint(3, 5))]
    labels = [f"line {index + 1}" for index in range(len(lines))]
    if rng.random() < 0.5:
        labels = rng.sample(FIRST_NAMES, len(lines))
    written = "\n".join(f"{label} : {line}" for label, line in zip(labels, lines, strict=True))
    quotes = [
        f'{rng.choice(("as", "again"))} {labels[index]} said : "{lines[index]}"'
        for index in rng.choices(range(len(lines)), k=rng.randint(3, 5))
    ]
    return written + "\n" + "\n".join(quotes)


def _growing_list(rng: random.Random) -> str:
    """A list that is said again from its start with one more item each time."""
    items = _mixed_items(rng, rng.randint(6, 11))
    separator = rng.choice(ITEM_BREAKS)
    first_count = rng.randint(2, 4)
    return "\n".join(separator.join(items[:count]) for count in range(first_count, len(items) + 1, rng.randint(1, 2)))


FORMS: tuple[Callable[[random.Random], str], ...] = (
    _repeated_sequence,
    _key_value_list,
    _key_value_list,
    _told_again,
    _quoted_lines,
    _growing_list,
)


def passage(rng: random.Random) -> str:
    """One plain text of about 20-130 words in which what is arbitrary at first is said again later.

    Args:
        rng: The only source of chance.
    """
    return rng.choice(FORMS)(rng)


def _check_range(vocab_size: int, length: int, first_id: int) -> None:
    if not 0 <= first_id < vocab_size:
        raise ValueError(f"first_id {first_id} is outside the vocabulary; expected 0 <= first_id < {vocab_size}")
    if length < 2:
        raise ValueError(f"length {length} leaves no room for a repetition; expected at least 2")


def _random_ids(rng: random.Random, vocab_size: int, count: int, first_id: int) -> list[int]:
    return rng.choices(range(first_id, vocab_size), k=count)


def periodic_token_ids(rng: random.Random, vocab_size: int, length: int, first_id: int = 0) -> list[int]:
    """One random segment of 8 to 48 ids, said again until ``length`` is full: the plainest exercise in looking back.

    Raises:
        ValueError: If ``first_id`` is outside the vocabulary or ``length`` is below 2.
    """
    _check_range(vocab_size, length, first_id)
    segment = _random_ids(rng, vocab_size, rng.randint(MIN_SEGMENT_TOKENS, MAX_SEGMENT_TOKENS), first_id)
    return (segment * (length // len(segment) + 1))[:length]


def repeated_token_ids(rng: random.Random, vocab_size: int, length: int, first_id: int = 0) -> list[int]:
    """Random token segments, each said two or three times at varying distance (the induction task, token by token).

    Segments of 8-48 ids come in groups of one to four; a group's copies are shuffled, so that a repetition follows
    at once or after several other segments. Only the cut at the end can leave a segment unrepeated.

    Args:
        rng: The only source of chance.
        vocab_size: Ids are drawn from ``first_id`` (inclusive) to ``vocab_size`` (exclusive).
        length: The number of ids, in tokens.
        first_id: The lowest id drawn.

    Raises:
        ValueError: If ``first_id`` is outside the vocabulary or ``length`` is below 2.
    """
    _check_range(vocab_size, length, first_id)
    ids: list[int] = []
    while len(ids) < length:
        # A short sequence must still hold at least one whole repetition.
        longest = max(1, min(MAX_SEGMENT_TOKENS, length // 2))
        shortest = min(MIN_SEGMENT_TOKENS, longest)
        copies: list[list[int]] = []
        for _ in range(rng.randint(1, 4)):
            segment = _random_ids(rng, vocab_size, rng.randint(shortest, longest), first_id)
            copies += [segment] * rng.randint(2, 3)
        rng.shuffle(copies)
        for segment in copies:
            ids += segment
    return ids[:length]


def heldout_copy_ids(rng: random.Random, vocab_size: int, length: int, first_id: int = 0) -> tuple[list[int], int]:
    """A random segment followed by itself, for the held-out copy loss.

    Args:
        rng: The only source of chance.
        vocab_size: Ids are drawn from ``first_id`` (inclusive) to ``vocab_size`` (exclusive).
        length: The most ids of both halves together, in tokens; an odd length loses one.
        first_id: The lowest id drawn.

    Returns:
        The ids (``2 * n`` of them) and ``n``: ``ids[n:]`` is the copy. A model that copies predicts ``ids[n + 1:]``.

    Raises:
        ValueError: If ``first_id`` is outside the vocabulary or ``length`` is below 2.
    """
    _check_range(vocab_size, length, first_id)
    segment = _random_ids(rng, vocab_size, length // 2, first_id)
    return segment + segment, len(segment)
