"""Shows tokenised rows as training sees them: ids and labels in, stretches of text with their part in the loss out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from qlora_kit.data.encoding import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Span:
    """A stretch of a row.

    Attributes:
        text: What its tokens decode to.
        supervised: Whether the loss sees it.
        control: Whether it is control tokens (``<|im_end|>``) rather than text.
    """

    text: str
    supervised: bool
    control: bool


def spans(input_ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[Span, ...]:
    """The row in stretches of equal kind; their texts together are the decoded row.

    Args:
        input_ids: Token ids.  # (T,)
        labels: The same ids where supervised, else -100.  # (T,)
        tokenizer: The base's.
    """
    control_ids = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    kinds = [(label != IGNORED_LABEL, token in control_ids) for token, label in zip(input_ids, labels, strict=True)]
    position = 0
    found = []
    for (supervised, control), group in groupby(kinds):
        end = position + len(list(group))
        text = tokenizer.decode(
            list(input_ids[position:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        found.append(Span(text, supervised=supervised, control=control))
        position = end
    return tuple(found)
