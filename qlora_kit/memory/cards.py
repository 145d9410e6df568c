"""Graphics cards: the vendors' figures by name, sizes such as 24GiB, and the card at hand through nvidia-smi."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from qlora_kit.errors import ConfigError
from qlora_kit.suggest import nearest
from qlora_kit.units import parse_size

GIB = 2**30
_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")
SMI_SECONDS = 10
_NO_NAMES = {"nvidia", "geforce", "tesla", "generation", ""}
_VARIANTS = {"ti", "super", "laptop", "d", "nvl", "max", "ada", "pcie"}  # words that make another card of a name


@dataclass(frozen=True)
class Card:
    """One GPU, as its data sheet describes it.

    Attributes:
        name: As vendors and nvidia-smi write it, without the vendor.
        memory_bytes: All of its memory.
        tflops: Dense 16-bit matrix products with fp32 accumulation, 10¹² operations a second; None if not known.
        gigabytes_per_second: Memory bandwidth; None if not known.
        bf16: Whether it computes in bfloat16 and has the flash attention kernel: NVIDIA's from Ampere on.
        used_bytes: What other processes hold, where that was asked.
    """

    name: str
    memory_bytes: int
    tflops: float | None = None
    gigabytes_per_second: float | None = None
    bf16: bool = True
    used_bytes: int = 0

    @property
    def free_bytes(self) -> int:
        """What a new process can have."""
        return self.memory_bytes - self.used_bytes


def _card(name: str, gib: int, tflops: float, bandwidth: float, *, bf16: bool = True) -> Card:
    return Card(name, gib * GIB, tflops, bandwidth, bf16)


# NVIDIA's data sheets and architecture papers (Volta, Turing, Ampere GA100 and GA102, Ada, Hopper, Blackwell): sold
# memory, dense tensor throughput (half of what is given "with sparsity") and bandwidth. The driver keeps a part of the
# memory for itself, more with ECC on.
CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("Tesla T4", 16, 65, 320, bf16=False),
        _card("Tesla V100 16GB", 16, 125, 900, bf16=False),
        _card("Tesla V100 32GB", 32, 125, 900, bf16=False),
        _card("RTX 2080 Ti", 11, 53.8, 616, bf16=False),
        _card("RTX 3060", 12, 25.5, 360),
        _card("RTX 3060 Ti", 8, 32.4, 448),
        _card("RTX 3070", 8, 40.6, 448),
        _card("RTX 3080", 10, 59.5, 760),
        _card("RTX 3080 Ti", 12, 68.2, 912),
        _card("RTX 3090", 24, 71, 936),
        _card("RTX 3090 Ti", 24, 80, 1008),
        _card("RTX 4060", 8, 30.2, 272),
        _card("RTX 4060 Ti 16GB", 16, 44.1, 288),
        _card("RTX 4070", 12, 58.3, 504),
        _card("RTX 4070 Ti", 12, 80.2, 504),
        _card("RTX 4080", 16, 97.5, 717),
        _card("RTX 4080 Super", 16, 104.4, 736),
        _card("RTX 4090", 24, 165.2, 1008),
        _card("RTX 5070", 12, 61.7, 672),
        _card("RTX 5070 Ti", 16, 87.9, 896),
        _card("RTX 5080", 16, 112.6, 960),
        _card("RTX 5090", 32, 209.5, 1792),
        _card("RTX A6000", 48, 154.8, 768),
        _card("RTX 6000 Ada", 48, 364.2, 960),
        _card("L4", 24, 121, 300),
        _card("A10", 24, 125, 600),
        _card("L40S", 48, 362, 864),
        _card("A100 40GB", 40, 312, 1555),
        _card("A100 80GB", 80, 312, 2039),
        _card("H100 PCIe", 80, 756, 2000),
        _card("H100", 80, 989, 3350),
        _card("H200", 141, 989, 4800),
    )
}


def find_card(text: str) -> Card:
    """The card of a name (``RTX 4090``, ``4090``) or of a size (``24GiB``); of a size, only the memory is known.

    Raises:
        ConfigError: Neither.
    """
    size_bytes = parse_size(text)
    if size_bytes is not None:
        return Card(text.strip(), size_bytes)
    card = known_card(text)
    if card is not None:
        return card
    match = nearest(text, CARDS)
    raise ConfigError(
        f"--gpu {text!r} is no size and no card of the table",
        expected=f"a size such as 24GiB, or one of {', '.join(CARDS)}",
        fix="give the card's memory as a size" if match is None else f"did you mean {match!r}? Else give its memory",
    )


def card_at_hand() -> Card:
    """The first GPU that nvidia-smi lists, with what other processes hold of it.

    Raises:
        ConfigError: There is none.
    """
    try:
        told = subprocess.run(_SMI, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
        name, total, used = (part.strip() for part in told.stdout.splitlines()[0].split(","))
        memory_bytes, used_bytes = int(total) * 2**20, int(used) * 2**20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError) as error:
        raise ConfigError(
            "no GPU was named, and nvidia-smi finds none here",
            expected="the card to plan for",
            fix='give --gpu 24GiB, or a name such as --gpu "RTX 4090"',
        ) from error
    known = known_card(name)
    if known is None:
        return Card(name, memory_bytes, used_bytes=used_bytes)
    return Card(name, memory_bytes, known.tflops, known.gigabytes_per_second, known.bf16, used_bytes)


def known_card(text: str) -> Card | None:
    """The card of the table that a driver's or a user's words name (``NVIDIA A100-SXM4-40GB``, ``4090``), or None."""
    words = set(_words(text))
    named = [card for card in CARDS.values() if set(_words(card.name)) <= words]  # the text says more, or the same
    named = [card for card in named if not (words - set(_words(card.name))) & _VARIANTS]
    if named:
        return max(named, key=lambda card: len(_words(card.name)))
    short = [card for card in CARDS.values() if words and words <= set(_words(card.name))]  # the text says less
    return short[0] if len(short) == 1 else _plain(short)


def _plain(cards: list[Card]) -> Card | None:
    """Of several cards, the one whose name the others lengthen: of RTX 3090 and RTX 3090 Ti, the first."""
    shortest = min(cards, key=lambda card: len(_words(card.name)), default=None)
    if shortest is not None and all(set(_words(shortest.name)) <= set(_words(card.name)) for card in cards):
        return shortest
    return None


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", name.lower()) if word not in _NO_NAMES]
