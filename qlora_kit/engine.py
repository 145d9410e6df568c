"""The engine: one base model loaded once, adapters swapped in and out of it, conversations in and answers out.

engine = Engine("tiny")
engine.load("sentiment")
print(engine.ask("The soup was far from bad.", adapter="sentiment").text)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.adapter_loading import attach_adapter, base_modules, require_fit
from qlora_kit.adapters import AdapterContract, AdapterFiles, AdapterStore, read_adapter
from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.base_files import BaseRef, resolve_base
from qlora_kit.config import QuantizationSection
from qlora_kit.data.chat import render_prompts, stop_token_ids
from qlora_kit.errors import AdapterError
from qlora_kit.formats import Message
from qlora_kit.generation import FinishReason, Sampling, generate
from qlora_kit.models import base_facts, base_quantization, load_base_model, load_tokenizer, quantization_facts

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: Without the stop token.
        adapter: Which adapter gave it; None for the base.
        finish_reason: ``stop`` when it ended by itself, ``length`` when the limit cut it.
        completion_tokens: Tokens generated, without the stop token.
        prompt_tokens: Tokens of the rendered prompt.
    """

    text: str
    adapter: str | None
    finish_reason: FinishReason
    completion_tokens: int
    prompt_tokens: int


class Engine:
    """A base model in memory and the adapters loaded beside it; the base's weights are never written to."""

    def __init__(
        self,
        base: str = "tiny",
        *,
        revision: str | None = None,
        quantization: QuantizationSection | None = None,
        store: Path = DEFAULT_STORE,
        device: torch.device | None = None,
    ) -> None:
        """Load the base and its tokenizer.

        Args:
            base: ``tiny``, a folder, or a Hub id.
            revision: Commit, tag or branch of a Hub id.
            quantization: How to load it; None for NF4 with double quantization, as adapters are trained by default.
                The files of a base that is quantized already rule; what is asked for by name must agree with them.
            store: Where adapter names are looked up.
            device: None for the GPU where there is one.

        Raises:
            BaseModelError: The base cannot be found or loaded, or is quantized already in another way.
        """
        self.ref: BaseRef = resolve_base(base, revision)
        self.quantization = base_quantization(self.ref, QuantizationSection() if quantization is None else quantization)
        self.tokenizer = load_tokenizer(self.ref)
        self.stop_token_ids = stop_token_ids(self.tokenizer)
        self.store = AdapterStore(store)
        self.model: PreTrainedModel = load_base_model(self.ref, self.quantization, device=device)
        self._base = base_modules(self.model)
        self._facts = base_facts(self.ref, self.tokenizer, quantization_facts(self.quantization, self.model))
        self._peft: PeftModel | None = None
        # PEFT's own name of each adapter: some names (train, keys, lora) clash with attributes of its modules.
        self._slots: dict[str, str] = {}
        self._attempts = 0
        self._folders: dict[str, Path] = {}
        self._contracts: dict[str, AdapterContract | None] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return tuple(self._folders)

    def contract(self, adapter: str) -> AdapterContract | None:
        """The contract of a loaded adapter; None for one trained elsewhere."""
        return self._contracts[self._loaded(adapter)]

    def load(self, name_or_folder: str) -> str:
        """Load an adapter from the store or a folder and return the name to use it by; loading it again does nothing.

        The files are checked before PEFT sees them, and the contract against this base.

        Raises:
            AdapterError: No such adapter, unsound files, another base, or the name is taken by another folder.
        """
        folder = self.store.get(name_or_folder)
        name = folder.name
        if name in self._folders:
            if self._folders[name] == folder.resolve():
                return name
            raise AdapterError(
                f"{folder}: an adapter named {name!r} is loaded already, from {self._folders[name]}",
                expected="one name for each loaded adapter",
                fix="rename one of the two folders",
            )
        adapter = read_adapter(lambda: self.store.get(name_or_folder), self._require_fit)
        # A name that failed is not used again: PEFT may keep some of its settings.
        slot = f"slot-{self._attempts}"
        self._attempts += 1
        self._peft = attach_adapter(self.model, self._peft, adapter, slot=slot)
        self._slots[name] = slot
        self._folders[name] = folder.resolve()
        self._contracts[name] = adapter.contract
        return name

    def _require_fit(self, files: AdapterFiles, contract: AdapterContract | None) -> None:
        require_fit(files, self._base)
        if contract is not None:
            contract.require_match(self._facts)

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """The model with ``adapter`` active inside the ``with`` block; None for the base alone."""
        if adapter is not None:
            self._loaded(adapter)
        if self._peft is None:
            yield self.model
        elif adapter is None:
            with self._peft.disable_adapter():
                yield self.model
        else:
            self._peft.set_adapter(self._slots[adapter])
            yield self.model

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        adapter: str | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 16,
    ) -> list[Answer]:
        """Answer each conversation with one adapter or the base.

        Args:
            conversations: The turns so far, each ending with the user's.
            adapter: Name of a loaded adapter; None for the base.
            sampling: None takes the adapter's defaults.
            batch_size: Conversations at once.
        """
        sampling = self.default_sampling(adapter) if sampling is None else sampling
        prompts = render_prompts([self._with_system(turns, adapter) for turns in conversations], self.tokenizer)
        with self.using(adapter) as model:
            completions = generate(
                model,
                prompts,
                sampling=sampling,
                stop_token_ids=self.stop_token_ids,
                pad_token_id=self.tokenizer.pad_token_id,
                batch_size=batch_size,
            )
        return [
            Answer(
                text=self.tokenizer.decode(completion.token_ids, skip_special_tokens=False),
                adapter=adapter,
                finish_reason=completion.finish_reason,
                completion_tokens=len(completion.token_ids),
                prompt_tokens=len(prompt),
            )
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def ask(self, prompt: str, *, adapter: str | None = None, sampling: Sampling | None = None) -> Answer:
        """Answer one user prompt."""
        return self.generate([[Message("user", prompt)]], adapter=adapter, sampling=sampling)[0]

    def default_sampling(self, adapter: str | None = None) -> Sampling:
        """Greedy, with the answer limit that the adapter's contract records."""
        contract = None if adapter is None else self.contract(adapter)
        limit = None if contract is None else contract.generation.get("max_new_tokens")
        return Sampling() if limit is None else replace(Sampling(), max_new_tokens=limit)

    def _with_system(self, turns: Sequence[Message], adapter: str | None) -> list[Message]:
        """The conversation with the adapter's trained system prompt, unless it brings its own."""
        contract = None if adapter is None else self.contract(adapter)
        if contract is None or not contract.system_prompt or turns[0].role == "system":
            return list(turns)
        return [Message("system", contract.system_prompt), *turns]

    def _loaded(self, adapter: str) -> str:
        if adapter not in self._folders:
            raise AdapterError(
                f"the adapter {adapter!r} is not loaded",
                expected=f"one of {', '.join(self._folders) or '(none is loaded)'}",
                fix=f"call load({adapter!r}) first",
            )
        return adapter
