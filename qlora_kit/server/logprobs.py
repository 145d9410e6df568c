"""Log probabilities of an answer's tokens in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qlora_kit.generation import TokenLogprob
from qlora_kit.server.response_schema import ChatLogprobs, CompletionLogprobs, TokenLogprobs, TopLogprob

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LEAST = -9999.0  # in the place of minus infinity, which JSON has no word for


def chat_logprobs(tokens: Sequence[TokenLogprob], decode: Callable[[int], str]) -> ChatLogprobs:
    """The chat API's: each token with its alternatives."""
    content = [
        TokenLogprobs(
            **_entry(item.token_id, item.logprob, decode).model_dump(),
            top_logprobs=[_entry(token_id, logprob, decode) for token_id, logprob in item.top],
        )
        for item in tokens
    ]
    return ChatLogprobs(content=content)


def completion_logprobs(
    tokens: Sequence[TokenLogprob], decode: Callable[[int], str], *, offset: int
) -> CompletionLogprobs:
    """The older API's: one list for each figure; ``offset`` is where the first token's text begins."""
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for item in tokens:
        text = decode(item.token_id)
        found.tokens.append(text)
        found.token_logprobs.append(max(item.logprob, _LEAST))
        found.top_logprobs.append({decode(token_id): max(logprob, _LEAST) for token_id, logprob in item.top})
        found.text_offset.append(offset)
        offset += len(text)
    return found


def _entry(token_id: int, logprob: float, decode: Callable[[int], str]) -> TopLogprob:
    text = decode(token_id)
    # A token may be a part of a character; its bytes are then not those of the text that stands for it.
    return TopLogprob(token=text, logprob=max(logprob, _LEAST), bytes=None if _BROKEN in text else list(text.encode()))
