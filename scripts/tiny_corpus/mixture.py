"""The pretraining text of `tiny`: passages of all domains in fixed shares, the chat tokens as plain separators.

The text is a function of the chunk number alone, so a test can make any part of it again.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from scripts.tiny_corpus import copying, facts, french, functions, practice, reviews, stories

END_OF_TEXT = "<|endoftext|>"
BLOCK_START = "<|im_start|>"
BLOCK_END = "<|im_end|>"
DOCUMENTS_A_CHUNK = 1_000

Shares = dict[str, tuple[float, Callable[[random.Random], str]]]
# Share of the documents by domain. Look-up, two languages and code need the most practice.
DOMAINS: Shares = {
    "facts": (0.19, facts.passage),
    "french": (0.22, french.passage),
    "functions": (0.19, functions.passage),
    "reviews": (0.22, reviews.passage),
    "stories": (0.09, stories.passage),
    "copying": (0.09, copying.passage),
}
# The last stage: practice, and some of everything so that nothing is forgotten.
PRACTICE: Shares = {
    "lookup": (0.36, practice.lookup_passage),
    "verdict": (0.36, practice.verdict_passage),
    "french": (0.08, french.passage),
    "functions": (0.08, functions.passage),
    "reviews": (0.03, reviews.passage),
    "stories": (0.04, stories.passage),
    "copying": (0.05, copying.passage),
}
# Practice across separators: what one block asks, another one before it told.
BLOCK_PRACTICE: dict[str, tuple[float, Callable[[random.Random], list[str]]]] = {
    "lookup": (0.75, practice.lookup_blocks),
    "verdict": (0.25, practice.verdict_blocks),
}
BLOCK_PRACTICE_SHARE = 0.7
# Words that stand after a block's start; what follows has nothing to do with them. The chat roles are among them, so
# that no token of the chat template stays untrained.
HEADINGS = ("note", "text", "page", "list", "letter", "user", "assistant", "system")
BLOCKS_SHARE = 0.5


def clean_passage(rng: random.Random, make: Callable[[random.Random], str]) -> str:
    """One passage that names no held-out phrase of the question-answering data."""
    while True:
        text = make(rng)
        if not facts.held_out_in(text):
            return text


def document(rng: random.Random, shares: Shares) -> str:
    """One document of one domain: a bare passage, or one to three passages in blocks, and the end-of-text token."""
    make = rng.choices([make for _, make in shares.values()], [share for share, _ in shares.values()])[0]
    if rng.random() >= BLOCKS_SHARE:
        return clean_passage(rng, make) + END_OF_TEXT
    blocks = (
        f"{BLOCK_START}{rng.choice(HEADINGS)}\n{clean_passage(rng, make)}{BLOCK_END}\n"
        for _ in range(rng.randint(1, 3))
    )
    return "".join(blocks) + END_OF_TEXT


def documents(chunk: int) -> list[str]:
    """The ``DOCUMENTS_A_CHUNK`` documents of one chunk of the text of the first stages."""
    rng = random.Random(f"tiny pretraining text, chunk {chunk}")
    return [document(rng, DOMAINS) for _ in range(DOCUMENTS_A_CHUNK)]


def practice_documents(chunk: int) -> list[str]:
    """The documents of one chunk of the text of the last stage."""
    rng = random.Random(f"tiny practice text, chunk {chunk}")
    return [document(rng, PRACTICE) for _ in range(DOCUMENTS_A_CHUNK)]


def block_practice_documents(chunk: int) -> list[str]:
    """The documents of one chunk of the last cycle: practice across blocks, and documents of the cycle before."""
    rng = random.Random(f"tiny block practice text, chunk {chunk}")
    return [
        practised_blocks(rng) if rng.random() < BLOCK_PRACTICE_SHARE else document(rng, PRACTICE)
        for _ in range(DOCUMENTS_A_CHUNK)
    ]


def practised_blocks(rng: random.Random) -> str:
    """One document whose paragraphs belong together although separators stand between them."""
    shares = BLOCK_PRACTICE.values()
    make = rng.choices([make for _, make in shares], [share for share, _ in shares])[0]
    while True:
        paragraphs = make(rng)
        if not facts.held_out_in(" ".join(paragraphs)):
            break
    return "".join(f"{BLOCK_START}{rng.choice(HEADINGS)}\n{text}{BLOCK_END}\n" for text in paragraphs) + END_OF_TEXT
