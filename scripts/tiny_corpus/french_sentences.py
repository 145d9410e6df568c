"""English-French sentences drawn from the grammar, every pair of content words in a sentence belonging to one part."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

from scripts.tiny_corpus.french_grammar import (
    ADJECTIVES,
    ANCHORS,
    BE,
    NOUNS,
    PRONOUNS,
    UNSUITED,
    VERBS,
    Adjective,
    Noun,
    Phrase,
    Verb,
    agree,
    as_sentence,
    clause,
    noun_phrase,
    predicate,
    prepositional,
    prepositions_for,
    there_is,
)
from scripts.tiny_corpus.holdout import Part, part_of


class Sentence(NamedTuple):
    """A sentence in both languages; every one of its ``pairs`` (never empty) lies in the same part."""

    english: str
    french: str
    pairs: tuple[str, ...]


class Lexicon(NamedTuple):
    """What one part may pair: by noun its adjectives, verbs and anchors; by verb its object nouns."""

    adjectives: dict[str, tuple[Adjective, ...]]
    intransitive: dict[str, tuple[Verb, ...]]
    transitive: dict[str, tuple[Verb, ...]]
    objects: dict[str, tuple[Noun, ...]]
    anchors: dict[str, tuple[Noun, ...]]
    subjects: tuple[Noun, ...]
    located: tuple[Noun, ...]
    described: tuple[Noun, ...]


@lru_cache(maxsize=3)
def lexicon(part: Part) -> Lexicon:
    """The pairs of words that belong to ``part``; no pair belongs to two parts."""

    def suits(pair: str) -> bool:
        return part_of(pair) == part and pair not in UNSUITED

    adjectives = {
        n.singular: tuple(a for a in ADJECTIVES if n.kind in a.kinds and suits(f"{n.singular}+{a.english}"))
        for n in NOUNS
    }
    verbs = {
        n.singular: tuple(v for v in VERBS if n.kind in v.subjects and suits(f"{n.singular}+{v.base}")) for n in NOUNS
    }
    objects = {
        v.base: tuple(n for n in NOUNS if n.kind in v.objects and suits(f"{v.base}>{n.singular}")) for v in VERBS
    }
    places = tuple(n for n in NOUNS if n.singular in ANCHORS)
    anchors = {
        n.singular: tuple(a for a in places if prepositions_for(n, a) and suits(f"{n.singular}@{a.singular}"))
        for n in NOUNS
    }
    return Lexicon(
        adjectives=adjectives,
        intransitive={name: tuple(v for v in some if not v.objects) for name, some in verbs.items()},
        transitive={name: tuple(v for v in some if objects[v.base]) for name, some in verbs.items()},
        objects=objects,
        anchors=anchors,
        subjects=tuple(n for n in NOUNS if verbs[n.singular]),
        located=tuple(n for n in NOUNS if anchors[n.singular]),
        described=tuple(n for n in NOUNS if adjectives[n.singular]),
    )


# Nouns that "my" would give another meaning ("ma femme" is my wife).
_NEVER_MINE = {"man", "woman", "boy", "girl", "king", "queen"}
_PRONOUNS = tuple(PRONOUNS)
# Of two adjectives of one group, one denies the other ("this black horse is white").
_EXCLUSIVE = (
    {"small", "big"},
    {"old", "young", "new"},
    {"happy", "tired", "sad", "calm", "strong"},
    {"red", "blue", "green", "yellow", "black", "white", "grey"},
)


def _phrase(rng: random.Random, words: Lexicon, noun: Noun, determiners: str = "the the a my this") -> Phrase:
    """A phrase around ``noun``; ``determiners`` are the singular ones to draw from."""
    determiner = rng.choice(determiners.split())
    if determiner == "my" and noun.singular in _NEVER_MINE:
        determiner = "the"
    plural = rng.random() < 0.4
    if plural:
        determiner = {"a": "some", "this": "these"}.get(determiner, determiner)
    choices = words.adjectives[noun.singular]
    adjective = rng.choice(choices) if choices and rng.random() < 0.55 else None
    return noun_phrase(determiner, noun, adjective, plural=plural)


class Place(NamedTuple):
    """A place in both languages, with the pairs that it uses."""

    text: tuple[str, str]
    pairs: tuple[str, ...]


def _place(rng: random.Random, words: Lexicon, noun: Noun) -> Place | None:
    """Where ``noun`` is or acts; None when this part has no such pair."""
    if not words.anchors[noun.singular]:
        return None
    anchor = rng.choice(words.anchors[noun.singular])
    preposition = rng.choice(prepositions_for(noun, anchor))
    choices = words.adjectives[anchor.singular]
    adjective = rng.choice(choices) if choices and rng.random() < 0.35 else None
    plural = preposition in ("near", "behind", "in front of") and rng.random() < 0.25
    determiner = rng.choice(("the", "my", "these") if plural else ("the", "the", "my", "this", "a"))
    phrase = noun_phrase(determiner, anchor, adjective, plural=plural)
    return Place(prepositional(preposition, phrase), (f"{noun.singular}@{anchor.singular}", *phrase.pairs))


def _acts(rng: random.Random, words: Lexicon, noun: Noun) -> Sentence | None:
    """A noun that does something, perhaps somewhere, perhaps with another noun or another verb."""
    verbs = words.intransitive[noun.singular]
    if not verbs:
        return None
    verb, subject, form = rng.choice(verbs), _phrase(rng, words, noun), rng.random()
    negative = rng.random() < 0.3
    pairs = (f"{noun.singular}+{verb.base}", *subject.pairs)
    place = _place(rng, words, noun) if form < 0.4 else None
    if place is not None:
        return Sentence(*clause([subject], verb, place.text, negative=negative), pairs + place.pairs)
    other, last = rng.choice(words.subjects), rng.choice(verbs)
    if form < 0.6 and other is not noun and verb in words.intransitive[other.singular]:
        second = _phrase(rng, words, other)
        pairs += (f"{other.singular}+{verb.base}", *second.pairs)
        return Sentence(*clause([subject, second], verb, negative=negative), pairs)
    if form > 0.8 and last is not verb:
        english, french = predicate(last, 3 if subject.plural else 1, (), negative=not negative)
        contrast = (f"but {english}", f"mais {french}")
        pairs += (f"{noun.singular}+{last.base}",)
        return Sentence(*clause([subject], verb, contrast, negative=negative), pairs)
    return Sentence(*clause([subject], verb, negative=negative), pairs)


def _does(rng: random.Random, words: Lexicon, noun: Noun) -> Sentence | None:
    """A noun or a pronoun that does something to another noun, perhaps somewhere."""
    verbs = words.transitive[noun.singular]
    if not verbs:
        return None
    verb = rng.choice(verbs)
    thing = rng.choice(words.objects[verb.base])
    if thing is noun:
        return None
    negative = rng.random() < 0.3
    # After "ne ... pas" the indefinite article would be "de" or "un"; after "love" it is odd: the definite ones only.
    target = _phrase(rng, words, thing, "the my this" if negative or verb.base == "love" else "the a my this")
    pairs = (f"{verb.base}>{thing.singular}", *target.pairs)
    subjects: str | list[Phrase] = rng.choice(_PRONOUNS)
    if rng.random() < 0.55:
        subject = _phrase(rng, words, noun)
        subjects = [subject]
        pairs += (f"{noun.singular}+{verb.base}", *subject.pairs)
    complements = [(target.english, target.french)]
    place = _place(rng, words, thing) if rng.random() < 0.2 else None
    if place is not None:
        complements.append(place.text)
        pairs += place.pairs
    return Sentence(*clause(subjects, verb, *complements, negative=negative), pairs)


def _is_somewhere(rng: random.Random, words: Lexicon, noun: Noun) -> Sentence | None:
    """Where a noun is ("is under the table"), or what there is somewhere."""
    place = _place(rng, words, noun)
    if place is None:
        return None
    if rng.random() < 0.4:
        thing = _phrase(rng, words, noun, "a")
        return Sentence(*there_is(thing, place.text), place.pairs + thing.pairs)
    subject = _phrase(rng, words, noun, "the the my this")
    return Sentence(*clause([subject], BE, place.text, negative=rng.random() < 0.3), place.pairs + subject.pairs)


def _is(rng: random.Random, words: Lexicon, noun: Noun) -> Sentence | None:
    """What a noun, or two nouns, are like."""
    choices = words.adjectives[noun.singular]
    if not choices:
        return None
    adjective, subjects = rng.choice(choices), [_phrase(rng, words, noun, "the the my this")]
    other = rng.choice(words.described)
    if rng.random() < 0.3 and other is not noun and adjective in words.adjectives[other.singular]:
        subjects.append(_phrase(rng, words, other, "the the my this"))
    pairs = tuple(f"{subject.noun.singular}+{adjective.english}" for subject in subjects)
    inner = tuple(pair for subject in subjects for pair in subject.pairs)
    said = {pair.partition("+")[2] for pair in inner}
    clashing = next((group for group in _EXCLUSIVE if adjective.english in group), {adjective.english})
    if adjective.english == "new" or not said.isdisjoint(clashing):  # after "be", new is "neuf" rather than "nouveau"
        return None
    return Sentence(*clause(subjects, BE, agree(adjective, subjects), negative=rng.random() < 0.3), pairs + inner)


_ABOUT_ANIMATE = (_acts, _acts, _does, _does, _does, _is_somewhere, _is)
_ABOUT_INANIMATE = (_is_somewhere, _is)


def sentence(rng: random.Random, part: Part, noun: Noun | None = None) -> Sentence:
    """Draw one sentence of 4-12 English words whose pairs all belong to ``part``.

    Args:
        rng: The source of chance.
        part: The part.
        noun: Its topic, where the part has a sentence about it within a few tries; otherwise a topic is drawn.
    """
    words = lexicon(part)
    tries = 0
    while True:
        tries += 1
        topic = noun if noun is not None and tries < 8 else rng.choice(words.subjects if tries % 3 else NOUNS)
        found = rng.choice(_ABOUT_ANIMATE if topic.kind in "pa" else _ABOUT_INANIMATE)(rng, words, topic)
        if found is not None and 3 <= found.english.count(" ") <= 11:
            return Sentence(as_sentence(found.english), as_sentence(found.french), found.pairs)
