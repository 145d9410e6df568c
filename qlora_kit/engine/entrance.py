"""Requests become rows: what their adapters mean, the rendered prompt within the base's bounds, the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.adapters.mixing import parse_adapter, shared_system_prompt
from qlora_kit.conversation import Message, control_pattern, turn_faults
from qlora_kit.data.chat import control_tokens, prompt_length_fault, render_prompts
from qlora_kit.engine.loaded import LoadedAdapters, longest_answer
from qlora_kit.engine.requests import Handle, Request
from qlora_kit.engine.row import Parts, Row
from qlora_kit.errors import AdapterError, ConfigError, Fault
from qlora_kit.generation import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids.

    Attributes:
        ids: Of it.
        system: The trained system prompt that was put in front of the conversation; None for none.
    """

    ids: tuple[int, ...]
    system: str | None = None


class Entrance:
    """What requests pass before they wait for the batch."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: LoadedAdapters) -> None:
        self._tokenizer = tokenizer
        self._loaded = loaded
        self._control = control_pattern(control_tokens(tokenizer))
        self._max_length: int = model.config.get_text_config().max_position_embeddings
        self._vocabulary: int = model.get_input_embeddings().weight.shape[0]

    def parts(self, adapter: str | None) -> Parts:
        """What a request's ``adapter`` means; names of the store are loaded.

        Raises:
            AdapterError: It is malformed, names what is not there, or scales what is more than LoRA pairs.
        """
        named = parse_adapter(adapter, self._loaded.names)
        parts = tuple((self._loaded.wanted(name), weight) for name, weight in named)
        through_peft = [part.name for part, weight in parts if part.peft_slot is not None]
        if through_peft and (len(parts) > 1 or parts[0][1] != 1.0):
            raise AdapterError(
                f"{adapter!r}: {through_peft[0]} is more than LoRA pairs (DoRA, biases, saved modules, trained tokens)",
                expected="adapters of LoRA pairs alone, where they are scaled or summed",
                fix=f"ask for {through_peft[0]} by itself",
            )
        return Parts(parts)

    def default_sampling(self, parts: Parts) -> Sampling:
        """Greedy, with the longest answer limit that the adapters' contracts record."""
        limit = longest_answer([part for part, _ in parts.adapters])
        return Sampling() if limit is None else replace(Sampling(), max_new_tokens=limit)

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """What the requests ask, as tokens; conversations are rendered together.

        Raises:
            QloraKitError: An adapter cannot be used, a turn holds a control token, or the chat template refuses a
                conversation.
        """
        faults = [fault for request in requests for fault in self.text_faults(request.conversation)]
        if faults:
            raise ConfigError.of(faults)
        places = [place for place, request in enumerate(requests) if request.conversation]
        found = {place: _system(requests[place], self.parts(requests[place].adapter)) for place in places}
        rendered = self._rendered([requests[place] for place in places], list(found.values()))
        prompts = dict(zip(places, rendered, strict=True))
        return [prompts.get(place, Prompt(request.prompt_ids)) for place, request in enumerate(requests)]

    def text_faults(self, conversation: Sequence[Message]) -> list[Fault]:
        """Turns whose text would end the turn and open another (``<|im_end|>``), or is no text."""
        return turn_faults(conversation, self._control)

    def row(self, request: Request, prompt: Prompt, handle: Handle) -> Row:
        """The row of a request whose prompt is rendered; again, if its adapter was replaced by one trained otherwise.

        Raises:
            AdapterError: Its adapters cannot be used.
            ConfigError: The prompt is too long, or holds ids that the base lacks.
        """
        parts = self.parts(request.adapter)
        system = _system(request, parts)
        if system != prompt.system:
            (prompt,) = self._rendered([request], [system])
        self._require_prompt(prompt.ids)
        return Row(
            handle,
            adapter=request.adapter,
            parts=parts,
            prompt_ids=prompt.ids,
            sampling=self.default_sampling(parts) if request.sampling is None else request.sampling,
            max_length=self._max_length,
        )

    def _rendered(self, requests: Sequence[Request], systems: Sequence[str | None]) -> list[Prompt]:
        if not requests:
            return []
        conversations = [
            [*([] if system is None else [Message("system", system)]), *request.conversation]
            for request, system in zip(requests, systems, strict=True)
        ]
        rendered = render_prompts(conversations, self._tokenizer)
        return [Prompt(tuple(ids), system) for ids, system in zip(rendered, systems, strict=True)]

    def _require_prompt(self, prompt_ids: tuple[int, ...]) -> None:
        fault = prompt_length_fault(len(prompt_ids), self._max_length)
        if fault is not None:
            raise ConfigError.of([fault])
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < self._vocabulary:
            what = f"the prompt holds token ids from {min(prompt_ids)} to {max(prompt_ids)}"
            raise ConfigError(
                what, expected=f"ids from 0 to {self._vocabulary - 1}", fix="use the base's own tokenizer"
            )


def _system(request: Request, parts: Parts) -> str | None:
    """The system prompt that the adapters were trained with, for a conversation that brings none."""
    if not request.conversation or request.conversation[0].role == "system":
        return None
    return shared_system_prompt([part.contract for part, _ in parts.adapters]) or None
