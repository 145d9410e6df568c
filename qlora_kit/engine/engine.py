"""The engine: one base loaded once, adapters beside it, conversations in and answers out, batched across adapters.

engine = Engine("tiny")
engine.load("sentiment")
print(engine.ask("The soup was far from bad.", adapter="sentiment").text)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from qlora_kit.adapter_loading import base_modules, require_fit
from qlora_kit.adapters import AdapterContract, AdapterFiles, AdapterSnapshot, AdapterStore
from qlora_kit.adapters.mixing import parse_adapter
from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.base_files import BaseRef, resolve_base
from qlora_kit.config import QuantizationSection
from qlora_kit.conversation import Message
from qlora_kit.data.chat import stop_token_ids
from qlora_kit.engine.entrance import Entrance
from qlora_kit.engine.failures import out_of_memory
from qlora_kit.engine.loaded import LoadedAdapters
from qlora_kit.engine.loop import EngineLoop
from qlora_kit.engine.requests import Answer, Handle, Request
from qlora_kit.engine.row import Parts
from qlora_kit.engine.scheduler import Scheduler
from qlora_kit.engine.stats import EngineStats
from qlora_kit.errors import AdapterError, ConfigError, Fault, QloraKitError
from qlora_kit.generation import Sampling
from qlora_kit.models import base_facts, base_quantization, load_base_model, load_tokenizer, quantization_facts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Engine:
    """A base model in memory and the adapters loaded beside it; the base's weights are never written to.

    Without ``start`` the callers' own threads do the work while they wait. After it a thread of the engine does, and
    requests of all callers share its batches.
    """

    def __init__(
        self,
        base: str = "tiny",
        *,
        revision: str | None = None,
        quantization: QuantizationSection | None = None,
        store: Path = DEFAULT_STORE,
        device: torch.device | None = None,
        max_batch: int = 32,
        slots: int = 16,
        kv_bytes: int | None = None,
        compile_backend: str | None = None,
    ) -> None:
        """Load the base and its tokenizer.

        Args:
            base: ``tiny``, a folder, or a Hub id.
            revision: Commit, tag or branch of a Hub id.
            quantization: How to load it; None for NF4 with double quantization, as adapters are trained by default.
                The files of a base that is quantized already rule; what is asked for by name must agree with them.
            store: Where adapter names are looked up.
            device: None for the GPU where there is one.
            max_batch: Requests in the batch at most.
            slots: Adapters in device memory at most; the others are in host memory, or only registered in the store.
            kv_bytes: Memory for keys and values at most, those of known prompts included; None for a share of what is
                free behind the base: 0.7 of a GPU's memory, or half of the host's. A request joins the batch when
                it fits with its longest answer.
            compile_backend: Backend of ``torch.compile`` (``inductor``) for decode steps of the rows that share a
                batch; each new size of the batch is compiled when it is first met. None for none.

        Raises:
            BaseModelError: The base cannot be found or loaded, or is quantized already in another way.
            ConfigError: ``max_batch``, ``slots`` or ``kv_bytes`` is out of bounds, or there is no such backend.
        """
        for name, value in (("max_batch", max_batch), ("slots", slots)):
            if not 1 <= value <= 4096:
                raise ConfigError(f"{name} is {value}", expected="1 to 4096", fix=f"choose another {name}")
        self.ref: BaseRef = resolve_base(base, revision)
        self.quantization = base_quantization(self.ref, QuantizationSection() if quantization is None else quantization)
        self.tokenizer = load_tokenizer(self.ref)
        self.stop_token_ids = stop_token_ids(self.tokenizer)
        self.store = AdapterStore(store)
        self.model: PreTrainedModel = load_base_model(self.ref, self.quantization, device=device)
        self._base = base_modules(self.model)
        self._facts = base_facts(self.ref, self.tokenizer, quantization_facts(self.quantization, self.model))
        self._scheduler = Scheduler(
            self.model,
            self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            max_batch=max_batch,
            slots=slots,
            kv_bytes=kv_bytes,
            compile_backend=compile_backend,
        )
        self._loaded = LoadedAdapters(self.store, self._require_fit, attach=self._attach, drop=self._scheduler.drop)
        self._entrance = Entrance(self.model, self.tokenizer, self._loaded)
        self._loop = EngineLoop(self._scheduler)

    # --- adapters ---

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self._loaded.names

    def available(self) -> tuple[str, ...]:
        """Names that a request may give: the loaded adapters and those of the store, by name."""
        return tuple(sorted({*self._loaded.names, *self.store.names()}))

    def contract(self, adapter: str) -> AdapterContract | None:
        """The contract of a loaded adapter; None for one trained elsewhere.

        Raises:
            AdapterError: It is not loaded.
        """
        return self._loaded.get(adapter).contract

    def folder(self, adapter: str) -> Path:
        """Where a loaded adapter was read.

        Raises:
            AdapterError: It is not loaded.
        """
        return self._loaded.get(adapter).folder

    def load(self, name_or_folder: str) -> str:
        """Load an adapter from the store or a folder and return the name to use it by; loading it again does nothing.

        The files are checked before anything is made of them, and the contract against this base. Requests load what
        they name from the store by themselves; what is loaded here stays.

        Raises:
            AdapterError: No such adapter, unsound files, another base, or the name is taken by another folder.
        """
        return self._loaded.load(name_or_folder).name

    def load_choice(self, text: str) -> str:
        """Load all that ``text`` names, as ``Request.adapter`` does but folders too, and return what requests say.

        Raises:
            AdapterError: As ``load``, or ``text`` is malformed.
        """
        parts = [(self.load(name), weight) for name, weight in parse_adapter(text, self._loaded.names)]
        return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else "+".join(f"{name}:{by!r}" for name, by in parts)

    def parts_of(self, adapter: str | None) -> tuple[str, ...]:
        """Names of the adapters in what a request says.

        Raises:
            AdapterError: It is malformed.
        """
        return tuple(name for name, _ in parse_adapter(adapter, self._loaded.names))

    def reload(self, name: str) -> None:
        """Read a loaded adapter again; requests under way finish on the version that they began with.

        Raises:
            AdapterError: It is not loaded, or its files cannot be used; the loaded version then stays.
        """
        self._loaded.reload(name)

    def unload(self, name: str) -> None:
        """Forget a loaded adapter; requests under way finish on it.

        Raises:
            AdapterError: It is not loaded.
        """
        self._loaded.unload(name)

    def _require_fit(self, files: AdapterFiles, contract: AdapterContract | None) -> None:
        require_fit(files, self._base)
        if contract is not None:
            contract.require_match(self._facts)

    def _attach(self, adapter: AdapterSnapshot) -> str:
        with self._scheduler.lock:
            try:
                return self._scheduler.peft.attach(adapter)
            except out_of_memory() as error:
                raise AdapterError(
                    f"{adapter.files.folder}: memory ran out while it was put on the base: {error}",
                    expected="room for it beside the base",
                    fix="unload other adapters that are more than LoRA pairs, or give the engine less kv_bytes",
                ) from error

    @contextmanager
    def using(self, adapter: str | None) -> Iterator[PreTrainedModel]:
        """The model with ``adapter`` active inside the ``with`` block, for one's own passes; None for the base alone.

        Requests, and other threads that load adapters, wait meanwhile.
        """
        parts = () if adapter is None else ((self._loaded.get(adapter), 1.0),)
        with self._loaded.changing, self._scheduler.lock:  # in this order everywhere
            self._scheduler.use(Parts(parts))
            try:
                yield self.model
            finally:
                self._scheduler.use(Parts())

    # --- answers ---

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        adapter: str | Sequence[str | None] | None = None,
        sampling: Sampling | None = None,
        batch_size: int = 16,
    ) -> list[Answer]:
        """Answer each conversation; they share batches whatever adapters they name.

        Args:
            conversations: The turns so far, each ending with the user's.
            adapter: For all of them, or one for each: a name, a scaled one, or a sum (``Request``); None for the base.
            sampling: None takes each adapter's defaults.
            batch_size: Conversations at once, where the engine's thread does not run.

        Raises:
            ConfigError: ``batch_size`` is less than 1.
            QloraKitError: One of them cannot be answered; the others are given up.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", expected="1 or more", fix="choose another batch_size")
        names = [adapter] * len(conversations) if adapter is None or isinstance(adapter, str) else list(adapter)
        if len(names) != len(conversations):
            what = f"{len(names)} adapters are given for {len(conversations)} conversations"
            raise ConfigError(what, expected="one for each, or one for all", fix="give as many adapters")
        requests = [
            Request(tuple(turns), adapter=name, sampling=sampling)
            for turns, name in zip(conversations, names, strict=True)
        ]
        handles = self._submit_all(requests)
        try:
            while not self.is_started and not all(handle.is_done for handle in handles):
                self._scheduler.step(batch_size)
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def ask(self, prompt: str, *, adapter: str | None = None, sampling: Sampling | None = None) -> Answer:
        """Answer one user prompt."""
        return self.generate([[Message("user", prompt)]], adapter=adapter, sampling=sampling)[0]

    def submit(self, request: Request, *, notify: Callable[[], None] | None = None) -> Handle:
        """Let a request join the batch; never raises, what is wrong with it comes out of the handle.

        An adapter of the store that is not loaded is read here, so call it from a thread that may wait for the disk.

        Args:
            request: What to answer.
            notify: Called after each piece, and at the end, from the thread that does the work, which holds the model
                meanwhile: it must not wait, and must not load adapters.
        """
        handle = Handle(self._loop, notify)
        try:
            (prompt,) = self._entrance.prompts([request])
            self._loop.enter(self._entrance.row(request, prompt, handle))
        except QloraKitError as error:
            handle.fail(error)
        return handle

    def text_faults(self, conversation: Sequence[Message]) -> list[Fault]:
        """What a request with this conversation would be refused for, so far as its texts say."""
        return self._entrance.text_faults(conversation)

    def default_sampling(self, adapter: str | None = None) -> Sampling:
        """Greedy, with the answer limit that the adapter's contract records.

        Raises:
            AdapterError: It is neither loaded nor in the store.
        """
        return self._entrance.default_sampling(self._entrance.parts(adapter))

    def _submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """Handles of requests that are rendered together; raises what is wrong with one of them."""
        prompts = self._entrance.prompts(requests)
        handles = [Handle(self._loop) for _ in requests]
        try:
            for request, prompt, handle in zip(requests, prompts, handles, strict=True):
                self._loop.enter(self._entrance.row(request, prompt, handle))
        except QloraKitError:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    # --- the loop ---

    @property
    def is_started(self) -> bool:
        """Whether the engine's thread runs."""
        return self._loop.is_started

    def advance(self) -> None:
        """One step of the batch, where no thread makes them: one token for each request under way."""
        self._loop.advance()

    def start(self) -> Engine:
        """Let a thread of the engine do the work from now on."""
        self._loop.start()
        return self

    def close(self) -> None:
        """End the thread after the step under way; requests that are not done fail. ``start`` begins again."""
        self._loop.close()

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> EngineStats:
        """What the engine does now, and what it did since it was made."""
        scheduler = self._scheduler
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            slots_used=scheduler.slots_used,
            adapters_loaded=len(self._loaded.names),
            requests_done=scheduler.requests_done,
            tokens_generated=scheduler.tokens_generated,
            prompt_tokens=scheduler.prompt_tokens,
            prompt_tokens_reused=scheduler.prompt_tokens_reused,
            prefix_bytes=scheduler.prefixes.bytes,
            kv_bytes=scheduler.kv_bytes,
            kv_budget_bytes=scheduler.kv_budget_bytes,
            bank_bytes=scheduler.bank.bytes,
        )
