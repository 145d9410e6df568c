"""Token ids one by one in, text as soon as it is certain out: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character
_MOST_HELD = 16  # tokens; no character is spelt with more, so these bytes will never be one


class TextStream:
    """The text of one answer as its tokens arrive."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Begin an answer.

        Args:
            tokenizer: Decodes the tokens.
            stop: Texts that end it.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._context = 0  # where the tokens begin that the newest are decoded behind
        self._decoded = 0  # tokens whose text is out, or held only for the stop strings
        self._held = ""  # text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` makes certain; ``stopped`` is true once a stop string is whole."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        return self._released(self._new_text(last=False))

    def finish(self) -> str:
        """The rest of the text, at the end of the answer."""
        if self.stopped:
            return ""
        text = self._released(self._new_text(last=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _new_text(self, *, last: bool) -> str:
        """Text of the tokens not decoded yet, behind a few that are: some decoders treat the first token specially."""
        before = self._decode(self._ids[self._context : self._decoded])
        both = self._decode(self._ids[self._context :])
        waiting = len(self._ids) - self._decoded
        if not last and both.endswith(_UNFINISHED) and waiting < _MOST_HELD:
            return ""
        if not last and len(both) <= len(before) and waiting < _MOST_HELD:
            return ""
        self._context, self._decoded = self._decoded, len(self._ids)
        return both[len(before) :]

    def _released(self, text: str) -> str:
        """What of the held text and ``text`` is certain not to belong to a stop string."""
        text = self._held + text
        found = [(place, stop) for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[0]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of ``text`` are the first of ``stop``."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
