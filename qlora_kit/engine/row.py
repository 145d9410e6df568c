"""One request on its way through the batch: its tokens, how the next one is chosen, and the text that comes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.engine.loaded import LoadedAdapter
from qlora_kit.engine.requests import Answer, Delta, Handle
from qlora_kit.engine.slots import Key
from qlora_kit.generation import FinishReason, Sampling, TextStream, TokenChoice, TokenLogprob
from qlora_kit.lora_bank import LoraFactors, weighted_sum

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.generation.kv_rows import StoredRow


@dataclass(frozen=True)
class Parts:
    """The adapters of a request, in the versions that it began with.

    Attributes:
        adapters: Each with its weight; none for the base.
    """

    adapters: tuple[tuple[LoadedAdapter, float], ...] = ()

    @property
    def key(self) -> Key:
        """What a slot, and stored keys and values, are known by."""
        return tuple((adapter.name, adapter.version, weight) for adapter, weight in self.adapters)

    @property
    def peft_slot(self) -> str | None:
        """The adapter that goes through PEFT, which stands alone."""
        return self.adapters[0][0].peft_slot if self.adapters else None

    def factors(self) -> LoraFactors:
        """What the slot holds."""
        return weighted_sum(
            [(adapter.factors, weight) for adapter, weight in self.adapters if adapter.factors is not None]
        )


class Row:
    """The state of one request.

    ``length`` counts the tokens whose keys and values are there; ``final_length``, those of the prompt and the longest
    answer.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        adapter: str | None,
        parts: Parts,
        prompt_ids: tuple[int, ...],
        sampling: Sampling,
        max_length: int,
    ) -> None:
        """Hold what was asked for.

        Args:
            handle: Who waits.
            adapter: As the request named it.
            parts: What it means.
            prompt_ids: The rendered prompt.
            sampling: How tokens are chosen.
            max_length: Positions of the base: answers end there.
        """
        self.handle = handle
        self.adapter = adapter
        self.parts = parts
        self.prompt_ids = prompt_ids
        self.sampling = sampling
        self.slot = 0
        self.length = 0
        self.prefix: tuple[StoredRow, int] | None = None
        self.token_ids: list[int] = []
        self._limit = min(sampling.max_new_tokens, max_length - len(prompt_ids))
        self.final_length = len(prompt_ids) + self._limit
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._choice: TokenChoice | None = None
        self._stream: TextStream | None = None

    def begin(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Get ready to choose tokens."""
        self._choice = TokenChoice(self.sampling, self.prompt_ids, device)
        self._stream = TextStream(tokenizer, self.sampling.stop)

    @property
    def all_ids(self) -> tuple[int, ...]:
        """Prompt and answer so far."""
        return (*self.prompt_ids, *self.token_ids)

    def next_token(self, logits: torch.Tensor, likeliest: int) -> tuple[int, tuple[TokenLogprob, ...]]:
        """The row's next token from its logits, (V,), of which ``likeliest`` has the largest."""
        from qlora_kit.generation import token_logprob

        if self._choice is None:
            raise RuntimeError("the row has not begun")
        token = likeliest if self._choice.is_plain else self._choice.next_token(logits)
        top = self.sampling.logprobs
        return token, () if top is None else (token_logprob(logits, token, top),)

    def take(self, token: int, logprobs: tuple[TokenLogprob, ...], *, is_stop: bool) -> FinishReason | None:
        """Add the next token to the answer and tell the handle; what ended it, if anything did."""
        if self._stream is None:
            raise RuntimeError("the row has not begun")
        if is_stop:
            self.end("stop")
            return "stop"
        self.token_ids.append(token)
        self._logprobs.extend(logprobs)
        text = self._stream.push(token)
        if self._stream.stopped:
            return self._ended("stop", text, (token,), logprobs)
        if len(self.token_ids) >= self._limit:
            text += self._stream.finish()
            return self._ended("stop" if self._stream.stopped else "length", text, (token,), logprobs)
        self._text.append(text)
        self.handle.put(Delta(text, (token,), logprobs))
        return None

    def end(self, reason: FinishReason) -> None:
        """End the answer where it is."""
        self._ended(reason, "" if self._stream is None else self._stream.finish(), (), ())

    def _ended(
        self, reason: FinishReason, text: str, token_ids: tuple[int, ...], logprobs: tuple[TokenLogprob, ...]
    ) -> FinishReason:
        self._text.append(text)
        self.handle.put(Delta(text, token_ids, logprobs, reason))
        self.handle.finish(
            Answer(
                text="".join(self._text),
                adapter=self.adapter,
                finish_reason=reason,
                completion_tokens=len(self.token_ids),
                prompt_tokens=len(self.prompt_ids),
                logprobs=tuple(self._logprobs),
            )
        )
        return reason
