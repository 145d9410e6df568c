"""Finds texts that nearly equal an earlier one: texts go in one by one, the most similar earlier one comes out.

Signatures are those of the library `datasketch`. Their index is our own: `datasketch`'s keeps a Python set for each
band of each text, which took 5.6 KB a text and twice the time, with bands that miss more pairs.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from qlora_kit.errors import ConfigError

if TYPE_CHECKING:
    from datasketch import MinHash
    from numpy.typing import NDArray

# A pair at the threshold meets in a band with at least this probability; more similar pairs almost surely do.
RECALL = 0.99
FEWEST_PERMUTATIONS = 16
# A word; or one sign of a script without spaces (kana, Han); or a sign that changes what is said: "3 + 4", "3 - 4".
# A hyphen or an apostrophe between letters, and the punctuation of sentences, only part words.
_NO_SPACES = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+|[+*/\\%&|^~=<>#@$€£]|(?<![^\W\d])-|-(?![^\W\d])")
WORDS_REMEMBERED = 1 << 16
FIRST_CAPACITY = 1 << 10
_ODD = 0x9E3779B97F4A7C15
_MODULUS = 1 << 64


class NearDuplicates:
    """The texts seen so far, by the MinHash signatures of their shingles (runs of words).

    Two texts are near duplicates where the Jaccard similarity of their sets of shingles, estimated from the
    signatures, reaches the threshold. The standard error of an estimate near 0.8 is 0.035 with 128 permutations.
    Case, spacing and the punctuation of sentences do not count. A text shorter than one shingle equals only its like.
    The result is the same in every process. With the defaults a text takes 0.9 KB: measured over 100,000 texts, with
    their sources' names and at the peak, while the index grows, 1.6 KB.

    References: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and Ullman,
    "Mining of Massive Datasets", chapter 3.

    Args:
        threshold: Lowest similarity that counts, above 0 and at most 1.
        permutations: Length of a signature; more are more exact, and take more memory and time.
        shingle_words: Words in a shingle.

    Raises:
        ConfigError: `datasketch` is not installed, or a setting is out of its range.
    """

    def __init__(self, threshold: float = 0.8, permutations: int = 128, shingle_words: int = 3) -> None:
        _check_settings(threshold, permutations, shingle_words)
        self.threshold = threshold
        self._minhash = _new_minhash(permutations)
        self._multipliers = np.array([_ODD * (2 * place + 1) % _MODULUS for place in range(shingle_words)], np.uint64)
        self._index = _BandIndex(permutations, _rows_per_band(threshold, permutations))
        self._sources: list[str] = []

    def __len__(self) -> int:
        """How many texts are kept."""
        return len(self._sources)

    def add(self, text: str, source: str) -> tuple[str, float] | None:
        """Keeps ``text`` unless a kept one nearly equals it.

        Since near duplicates are not kept, texts do not chain: each is compared with texts that stay.

        Args:
            text: What to compare: best the words that differ from row to row, without a prompt that all share.
            source: The row's place, to be named when a later text nearly equals it.

        Returns:
            Source and estimated similarity of the most similar kept text, the first of equally similar ones; None
            where ``text`` is new.
        """
        signature = self._signature(text)
        match = self._match(signature)
        if match is None:
            self._index.append(signature)
            self._sources.append(source)
        return match

    def find(self, text: str) -> tuple[str, float] | None:
        """As ``add``, but ``text`` is never kept: for a row of another split, where a match is leakage."""
        return self._match(self._signature(text))

    def _match(self, signature: NDArray[np.uint32]) -> tuple[str, float] | None:
        rows = self._index.candidates(signature)
        if not rows.size:
            return None
        similarities = self._index.similarities(rows, signature)
        best = int(similarities.argmax())  # the first of equals
        similarity = float(similarities[best])
        return (self._sources[rows[best]], similarity) if similarity >= self.threshold else None

    def _signature(self, text: str) -> NDArray[np.uint32]:
        self._minhash.clear()
        self._minhash.update_batch(shingle_hashes(text, self._multipliers).tolist())
        return self._minhash.digest()


def shingle_hashes(text: str, multipliers: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """32-bit hashes of all shingles of a text.

    A text of one shingle gives both halves of its 64-bit hash, or one short text in 2^32 would be taken for another.

    Args:
        text: Any text; one without words is a single shingle by itself.
        multipliers: One odd number for each word of a shingle.  # (shingle_words,)

    Returns:
        At least two hashes, equal ones not removed.  # (S,)
    """
    words = WORD.findall(unicodedata.normalize("NFKC", text).casefold()) or [" ".join(text.split())]
    hashes = np.array([_word_hash(word) for word in words], np.uint64)  # (W,)
    places = multipliers[: len(hashes)]
    count = len(hashes) - len(places) + 1
    mixed = np.full(count, len(places), np.uint64)  # (S,); the length parts "a b" from the start of "a b c"
    for place, multiplier in enumerate(places):
        mixed += hashes[place : place + count] * multiplier
    low, high = mixed.astype(np.uint32), (mixed >> np.uint64(32)).astype(np.uint32)
    return np.concatenate([low, high]) if count == 1 else high


@lru_cache(maxsize=WORDS_REMEMBERED)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class _BandIndex:
    """Signatures, found again by any band (a run of their values) that two of them share.

    In the table of each band, a slot names the last row whose band falls there, and ``links`` the row before it. No
    band is stored: rows that share a slot by chance are told apart by their signatures.
    """

    def __init__(self, permutations: int, rows_per_band: int) -> None:
        bands = permutations // rows_per_band
        multipliers = [_ODD * (2 * place + 1) % _MODULUS for place in range(rows_per_band)]
        self._multipliers = np.array(multipliers, np.uint64)
        self._bands = np.arange(bands)
        self._count = 0
        self._signatures = np.empty((FIRST_CAPACITY, permutations), np.uint32)
        self._links = np.empty((FIRST_CAPACITY, bands), np.int32)
        self._make_tables(FIRST_CAPACITY.bit_length() - 1)

    def append(self, signature: NDArray[np.uint32]) -> None:
        """Adds the next row."""
        self._reserve()
        row = self._count
        slots = self._slots(signature[None])[0]  # (bands,)
        self._signatures[row] = signature
        self._links[row] = self._heads[self._bands, slots]
        self._heads[self._bands, slots] = row
        self._count += 1

    def candidates(self, signature: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Rows that may share a band with ``signature``, in order: all that do share one, and some by chance."""
        bands = self._bands
        rows = self._heads[bands, self._slots(signature[None])[0]]
        found = []
        while (alive := rows >= 0).any():
            rows, bands = rows[alive], bands[alive]
            found.append(rows)
            rows = self._links[rows, bands]
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.int32)

    def similarities(self, rows: NDArray[np.int32], signature: NDArray[np.uint32]) -> NDArray[np.float64]:
        """The estimated Jaccard similarity of each row: the part of its signature that is the same.  # (rows,)"""
        return (self._signatures[rows] == signature).mean(axis=1)

    def _slots(self, signatures: NDArray[np.uint32]) -> NDArray[np.int64]:
        """The slot of each band of each signature.  # (n, permutations) -> (n, bands)"""
        used = len(self._bands) * len(self._multipliers)
        values = signatures[:, :used].reshape(len(signatures), len(self._bands), len(self._multipliers))
        mixed = (values * self._multipliers).sum(axis=2)  # uint64, modulo 2^64
        return (mixed >> np.uint64(64 - self._slot_bits)).astype(np.int64)

    def _reserve(self) -> None:
        """Makes room for one row more: half as many rows again, twice as many slots."""
        if self._count == len(self._signatures):
            capacity = self._count + self._count // 2
            self._signatures = _longer(self._signatures, capacity)
            self._links = _longer(self._links, capacity)
        if self._count == self._heads.shape[1]:
            self._make_tables(self._slot_bits + 1)

    def _make_tables(self, slot_bits: int) -> None:
        self._slot_bits = slot_bits
        self._heads = np.full((len(self._bands), 1 << slot_bits), -1, np.int32)
        rows = np.arange(self._count, dtype=np.int32)
        slots = self._slots(self._signatures[: self._count])
        for band in self._bands:
            order = np.argsort(slots[:, band], kind="stable")
            ordered = slots[order, band]
            starts = np.append(True, ordered[1:] != ordered[:-1])[: self._count]
            self._links[order, band] = np.where(starts, -1, np.roll(order, 1))
            np.maximum.at(self._heads[band], slots[:, band], rows)


def _longer(array: NDArray[Any], rows: int) -> NDArray[Any]:
    """``array`` with room for ``rows`` rows."""
    copy = np.empty((rows, array.shape[1]), array.dtype)
    copy[: len(array)] = array
    return copy


def _rows_per_band(threshold: float, permutations: int) -> int:
    """The longest bands with which a pair at the threshold shares one with a probability of ``RECALL``."""
    for rows in range(permutations, 1, -1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= RECALL:
            return rows
    return 1


def _new_minhash(permutations: int) -> MinHash:
    try:
        from datasketch import MinHash
    except ImportError as error:
        raise ConfigError(
            "finding near duplicates needs the library datasketch, which is not installed",
            expected="datasketch 2 beside the kit",
            fix="pip install 'qlora-kit[near-duplicates]', or leave near duplicates in",
        ) from error
    return MinHash(permutations, hashfunc=int, scheme="affine32")


def _check_settings(threshold: float, permutations: int, shingle_words: int) -> None:
    if not 0 < threshold <= 1:
        raise ConfigError(
            f"the threshold of near duplicates is {threshold}",
            expected="a similarity above 0 and at most 1",
            fix="set one such as 0.8",
        )
    if permutations < FEWEST_PERMUTATIONS:
        raise ConfigError(
            f"near duplicates by {permutations} permutations",
            expected=f"at least {FEWEST_PERMUTATIONS}",
            fix="set 128, or more for finer estimates",
        )
    if shingle_words < 1:
        raise ConfigError(
            f"shingles of {shingle_words} words", expected="at least 1 word", fix="set 3, or fewer for short texts"
        )
