"""What a request's ``adapter`` says: a name, a name with a scale, or a weighted sum, parsed and checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from qlora_kit.adapters.contract import AdapterContract
from qlora_kit.errors import AdapterError

MAX_PARTS = 8
MAX_WEIGHT = 10.0


def parse_adapter(text: str | None, loaded: Collection[str] = ()) -> tuple[tuple[str, float], ...]:
    """Names and weights in ``text`` (``sentiment``, ``sentiment:0.5``, ``a:0.7+b:0.3``); empty for the base.

    Args:
        text: What was asked for.
        loaded: Names of loaded adapters: a folder's name may hold ``:`` and ``+``.

    Raises:
        AdapterError: It is malformed, or too many adapters or too large a weight.
    """
    if text is None:
        return ()
    if text in loaded:
        return ((text, 1.0),)
    parts = [_part(part, text) for part in text.split("+")]
    if len(parts) > MAX_PARTS:
        raise _refused(f"{text!r} names {len(parts)} adapters", f"at most {MAX_PARTS}")
    sums: dict[str, float] = {}
    for name, weight in parts:
        sums[name] = sums.get(name, 0.0) + weight
    return tuple(sums.items())


def shared_system_prompt(contracts: Sequence[AdapterContract | None]) -> str | None:
    """The system prompt that a request's adapters were trained with, where it is one and the same."""
    prompts = {None if contract is None else contract.system_prompt for contract in contracts}
    return prompts.pop() if len(prompts) == 1 else None


def split_weight(text: str) -> tuple[str, float]:
    """The name in ``NAME:WEIGHT`` and its weight: 1 where none is given, NaN where it is no number."""
    name, colon, number = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return name, float(number)
    except ValueError:
        return name, math.nan


def _part(part: str, text: str) -> tuple[str, float]:
    name, weight = split_weight(part.strip())
    if not name:
        raise _refused(f"{text!r} names no adapter", "a name in each part")
    if not abs(weight) <= MAX_WEIGHT:
        number = part.strip().rpartition(":")[2]
        raise _refused(f"{text!r}: {number!r} is no weight", f"a number from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return name, weight


def _refused(what: str, expected: str) -> AdapterError:
    fix = "write sentiment, sentiment:0.5, or a sum such as sentiment:0.7+translation:0.3"
    return AdapterError(what, expected=expected, fix=fix)
