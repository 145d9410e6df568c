"""Which part a combination belongs to: the one rule that keeps test rows out of training and pretraining.

Every generated row is built from a *combination* (a sentence skeleton, a pair of words, a chain of operations).
The combination's name alone decides its part, so no list has to be kept and no two generators can disagree.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Row:
    """One generated example.

    Attributes:
        fields: The task's own columns.
        combination: What must not be shared between parts; ``part_of(combination)`` is the row's part.
    """

    fields: dict[str, Any]
    combination: str


def part_of(combination: str) -> Part:
    """The part of a combination: 80 % train (pretraining text uses this part only), 10 % validation, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(combination.encode()).digest()[:4], "big") % 10
    return "train" if bucket < 8 else PARTS[bucket - 7]
