"""How long the rows are: counts of each length in, a histogram and quantiles out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Rows of ``low`` to ``high`` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True)
class Lengths:
    """The lengths of a split's rows, in tokens.

    Attributes:
        median: Half of the rows are no longer.
        p95: 95 % of the rows are no longer.
        longest: The longest row.
        bins: At most ``BINS``, of equal width, from the shortest row to the longest.
    """

    median: int
    p95: int
    longest: int
    bins: tuple[Bin, ...]


def summarise(counts: Mapping[int, int]) -> Lengths | None:
    """The summary of ``counts`` (tokens of a row -> how many rows); None where there is no row."""
    rows = sum(counts.values())
    if not rows:
        return None
    shortest, longest = min(counts), max(counts)
    width = max(1, -(-(longest - shortest + 1) // BINS))
    of_bin: Counter[int] = Counter()
    for length, number in counts.items():
        of_bin[(length - shortest) // width] += number
    bins = tuple(
        Bin(low := shortest + index * width, min(low + width - 1, longest), of_bin[index])
        for index in range((longest - shortest) // width + 1)
    )
    return Lengths(_quantile(counts, rows / 2), _quantile(counts, rows * 0.95), longest, bins)


def _quantile(counts: Mapping[int, int], rows: float) -> int:
    """The least length that ``rows`` rows do not exceed."""
    seen = 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= rows:
            return length
    return max(counts)
