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


def lookup_passage(rng: random.Random) -> str:
    """Facts of the train part, then questions about them, each answered by its value before any key is said again."""
    drawn = facts.draw_facts(rng, rng.choice(list(facts.RELATIONS)), "train")
    sentences = [facts.tell(rng, drawn)]
    for fact in rng.sample(drawn, len(drawn)):
        thought = rng.choice(THOUGHTS).format(n=rng.choice(FIRST_NAMES), v=fact.value)
        sentences.append(f"{fact.question(rng)} {thought}")
    return " ".join(sentences)


def verdict_passage(rng: random.Random) -> str:
    """Reviews of the train part, each followed by the face that its writer made."""
    sentences = []
    for _ in range(REVIEWS_A_PASSAGE):
        value = rng.choice((1, -1, 0))
        if rng.random() < SHORT_SHARE:
            text = f"It was {reviews.draw_predicate(rng, value, after_be=True)[1]}."
        else:
            text = reviews.draw_review(rng, part="train", value=value).text
        sentences.append(f"{text} {rng.choice(FIRST_NAMES)} {FACES[value]}.")
    return " ".join(sentences)
