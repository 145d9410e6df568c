"""Translation rows (English, French), and pretraining passages that show the same grammar in glossaries and prose."""

from __future__ import annotations

import random

from scripts.tiny_corpus.french_grammar import (
    ADJECTIVES,
    BE,
    NOUNS,
    PRONOUNS,
    VERBS,
    Adjective,
    Noun,
    agree,
    clause,
    noun_phrase,
    prepositional,
    prepositions_for,
)
from scripts.tiny_corpus.french_sentences import lexicon, sentence
from scripts.tiny_corpus.holdout import Part, Row

# Every translation in a passage stands behind one of these marks: a new line alone never announces one,
# so that the base does not translate unasked.
_MARKS = (" : ", " = ", " -> ")
_SEPARATORS = (" ; ", "\n", ". ", ", ")


def _listed(rng: random.Random, items: list[tuple[str, str]]) -> str:
    """``items`` as a glossary, in one of several layouts; now and then with the French first."""
    mark, separator = rng.choice(_MARKS), rng.choice(_SEPARATORS)
    if rng.random() < 0.25:
        items = [(french, english) for english, french in items]
    return separator.join(f"{first}{mark}{second}" for first, second in items)


def _adjective_of(rng: random.Random, noun: Noun) -> Adjective | None:
    choices = lexicon("train").adjectives[noun.singular]
    return rng.choice(choices) if choices else None


def _glossary(rng: random.Random) -> str:
    """Noun phrases of any noun."""
    items = []
    for noun in rng.sample(NOUNS, 9):
        adjective = _adjective_of(rng, noun) if rng.random() < 0.7 else None
        plural = rng.random() < 0.4
        determiner = rng.choice(("the", "some", "these", "my") if plural else ("the", "a", "this", "my"))
        items.append(noun_phrase(determiner, noun, adjective, plural=plural)[:2])
    return _listed(rng, items)


def _noun_forms(rng: random.Random) -> str:
    """One noun with each determiner, with and without an adjective."""
    noun = rng.choice(NOUNS)
    items = [(noun.singular, noun.french_singular), (noun.plural, noun.french_plural)]
    for adjective in (None, _adjective_of(rng, noun)):
        forms = [("the", False), ("a", False), ("this", False), ("my", False)]
        forms += [("the", True), ("some", True), ("these", True), ("my", True)]
        kept = sorted(rng.sample(range(8), 5))
        items += [noun_phrase(forms[i][0], noun, adjective, plural=forms[i][1])[:2] for i in kept]
    return _listed(rng, items)


def _adjective_forms(rng: random.Random) -> str:
    """One adjective with nouns of both genders and numbers, before or after them and behind "be"."""
    adjective = rng.choice(ADJECTIVES)
    words = lexicon("train")
    nouns = [noun for noun in NOUNS if adjective in words.adjectives[noun.singular]]
    items = [(adjective.english, ", ".join(dict.fromkeys(adjective.forms)))]
    for noun in rng.sample(nouns, min(6, len(nouns))):
        plural = rng.random() < 0.5
        if rng.random() < 0.4 and adjective.english != "new":
            subject = noun_phrase("the", noun, None, plural=plural)
            items.append(clause([subject], BE, agree(adjective, [subject]), negative=rng.random() < 0.3))
        else:
            determiner = rng.choice(("the", "some", "these") if plural else ("the", "a", "this", "my"))
            items.append(noun_phrase(determiner, noun, adjective, plural=plural)[:2])
    return _listed(rng, items)


def _verb_forms(rng: random.Random) -> str:
    """One verb with each pronoun, denied or not, with an object where it takes one."""
    verb, words = rng.choice(VERBS), lexicon("train")
    items: list[tuple[str, str]] = []
    objects: list[tuple[str, str]]
    for pronoun in PRONOUNS:
        objects = []
        if verb.objects:
            thing = rng.choice(words.objects[verb.base])
            objects = [noun_phrase("the", thing, None, plural=rng.random() < 0.4)[:2]]
        items.append(clause(pronoun, verb, *objects, negative=rng.random() < 0.4))
    nouns = [noun for noun in NOUNS if noun.kind in "pa" and verb in words.transitive[noun.singular]]
    nouns += [noun for noun in NOUNS if noun.kind in "pa" and verb in words.intransitive[noun.singular]]
    for noun in rng.sample(nouns, min(2, len(nouns))):
        for plural in (False, True):
            subject = noun_phrase("the", noun, None, plural=plural)
            objects = []
            if verb.objects:
                objects = [noun_phrase("the", rng.choice(words.objects[verb.base]), None, plural=False)[:2]]
            items.append(clause([subject], verb, *objects, negative=rng.random() < 0.4))
    return _listed(rng, items)


def _places(rng: random.Random) -> str:
    """Places with their prepositions and contractions."""
    words, items = lexicon("train"), []
    for noun in rng.sample(words.located, 8):
        anchor = rng.choice(words.anchors[noun.singular])
        preposition = rng.choice(prepositions_for(noun, anchor))
        plural = preposition in ("near", "behind", "in front of") and rng.random() < 0.3
        adjective = _adjective_of(rng, anchor) if rng.random() < 0.4 else None
        determiner = rng.choice(("the", "the", "my", "these") if plural else ("the", "the", "a", "my", "this"))
        items.append(prepositional(preposition, noun_phrase(determiner, anchor, adjective, plural=plural)))
    return _listed(rng, items)


def _sentences(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """``count`` sentences, mostly about two topics."""
    topics = rng.sample(NOUNS, 2)
    return [sentence(rng, "train", rng.choice((*topics, None)))[:2] for _ in range(count)]


def _sentence_by_sentence(rng: random.Random) -> str:
    """Sentences, each with its French behind a mark or in brackets."""
    pairs = _sentences(rng, 6)
    if rng.random() < 0.35:
        return " ".join(f"{english[:-1]} ({french[:-1]})." for english, french in pairs)
    mark, separator = rng.choice(_MARKS), rng.choice(("\n", " "))
    if rng.random() < 0.25:
        pairs = [(french, english) for english, french in pairs]
    return separator.join(f"{first}{mark}{second}" for first, second in pairs)


def _prose(rng: random.Random) -> str:
    """Prose in one of the two languages."""
    language = rng.randrange(2)
    return " ".join(pair[language] for pair in _sentences(rng, rng.randint(8, 12)))


def _prose_in_both(rng: random.Random) -> str:
    """A paragraph, a mark, and the same paragraph in the other language."""
    pairs = _sentences(rng, rng.randint(3, 5))
    first = int(rng.random() < 0.25)
    texts = [" ".join(pair[language] for pair in pairs) for language in (first, 1 - first)]
    return rng.choice((" = ", "\n= ", "\n-> ")).join(texts)


_FORMS = (_glossary, _noun_forms, _adjective_forms, _verb_forms, _places, _sentence_by_sentence, _prose, _prose_in_both)
_WEIGHTS = (12, 10, 10, 8, 6, 30, 12, 12)


def passage(rng: random.Random) -> str:
    """One pretraining passage of about 40-150 words that uses train pairs only."""
    return rng.choices(_FORMS, _WEIGHTS)[0](rng)


def rows(part: Part, count: int, seed: int) -> list[Row]:
    """``count`` rows of ``part`` with fields ``english`` and ``french``, no English sentence twice.

    Raises:
        ValueError: The part has not that many sentences.
    """
    rng = random.Random(f"french {part} {seed}")
    found: dict[str, Row] = {}
    for _ in range(40 * count + 1000):
        if len(found) == count:
            break
        drawn = sentence(rng, part)
        found.setdefault(
            drawn.english, Row({"english": drawn.english, "french": drawn.french}, combination=drawn.pairs[0])
        )
    if len(found) < count:
        raise ValueError(f"{part}: {len(found)} distinct sentences found, {count} wanted; ask for fewer rows")
    return list(found.values())
