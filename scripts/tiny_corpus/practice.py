"""Passages for the last stage of pretraining: dense practice in the two skills that plain prose teaches slowest.

Looking a value up by what a question asks, where nothing said before can be copied on; and weighing negation and
contrast in a review. Neither is in a task's format: what somebody thought of follows a question, a face a review.
"""

from __future__ import annotations

import random

from scripts.tiny_corpus import facts, reviews
from scripts.tiny_corpus.words import FIRST_NAMES

FACES = {1: "smiled", -1: "frowned", 0: "shrugged"}
THOUGHTS = ("{n} thought of {v}.", "{n} pointed at {v}.", "{n} wrote : {v}.")
REVIEWS_A_PASSAGE = 6
SHORT_SHARE = 0.5


def lookups(rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """Facts of the train part, and questions about them with what somebody thought of: the value, before any key."""
    drawn = facts.draw_facts(rng, rng.choice(list(facts.RELATIONS)), "train")
    asked = [
        (fact.question(rng), rng.choice(THOUGHTS).format(n=rng.choice(FIRST_NAMES), v=fact.value))
        for fact in rng.sample(drawn, len(drawn))
    ]
    return facts.tell(rng, drawn), asked


def lookup_passage(rng: random.Random) -> str:
    """Facts, questions and thoughts in one paragraph."""
    text, asked = lookups(rng)
    return " ".join((text, *(f"{question} {thought}" for question, thought in asked)))


def lookup_blocks(rng: random.Random) -> list[str]:
    """The same in paragraphs of their own: the text with the first question, then thought and question in turn."""
    text, asked = lookups(rng)
    paragraphs = [text]
    for question, thought in asked:
        if rng.random() < 0.5:
            paragraphs[-1] += f"\n\n{question}"
        else:
            paragraphs.append(question)
        paragraphs.append(thought)
    return paragraphs


def verdicts(rng: random.Random) -> list[tuple[str, str]]:
    """Reviews of the train part, and the face that each writer made."""
    pairs = []
    for _ in range(REVIEWS_A_PASSAGE):
        value = rng.choice((1, -1, 0))
        if rng.random() < SHORT_SHARE:
            text = f"It was {reviews.draw_predicate(rng, value, after_be=True)[1]}."
        else:
            text = reviews.draw_review(rng, part="train", value=value).text
        pairs.append((text, f"{rng.choice(FIRST_NAMES)} {FACES[value]}."))
    return pairs


def verdict_passage(rng: random.Random) -> str:
    """Reviews and faces in one paragraph."""
    return " ".join(f"{text} {face}" for text, face in verdicts(rng))


def verdict_blocks(rng: random.Random) -> list[str]:
    """Reviews and faces in paragraphs of their own."""
    return [paragraph for pair in verdicts(rng) for paragraph in pair]
