"""The kit's engine as the HTTP layer wants it: names without paths, and the few facts that requests are checked by."""

from __future__ import annotations

from collections.abc import Callable

from qlora_kit.data.chat import control_tokens
from qlora_kit.engine import Engine, Handle, Request
from qlora_kit.generation import Sampling
from qlora_kit.server.protocol import Load
from qlora_kit.server.served_models import public_name

RESIDENT_BYTES = 4 * 1024**3
"""Adapters of the store that stay in host memory; of a larger store, the rest comes and goes with the requests."""


class EngineBackend:
    """An engine behind HTTP."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.base = public_name(engine.ref.id)
        self.context_tokens: int = engine.model.config.max_position_embeddings
        self.vocabulary_tokens: int = engine.model.config.vocab_size
        self.control_tokens = control_tokens(engine.tokenizer)
        self._resident: dict[str, int] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text, control tokens and all, behind the tokenizer's own first token if it has one."""
        return tuple(self._engine.tokenizer(text)["input_ids"])

    def decode(self, token_id: int) -> str:
        """The text of one token."""
        text: str = self._engine.tokenizer.decode([token_id])
        return text

    def default_sampling(self, adapter: str | None) -> Sampling:
        """As the adapter's contract says."""
        return self._engine.default_sampling(adapter)

    def submit(self, request: Request, *, notify: Callable[[], None]) -> Handle:
        """Begin an answer."""
        return self._engine.submit(request, notify=notify)

    def load(self, name: str) -> None:
        """Load an adapter of the store, or the version that took its place.

        Adapters beyond ``RESIDENT_BYTES`` are checked and let go: the engine loads them again for a request, and keeps
        those that were asked for last.
        """
        if name in self._engine.adapters:
            self._engine.reload(name)
            return
        self._engine.load(name)
        self._resident[name] = self._engine.store.show(name).card.bytes
        if sum(self._resident.values()) > RESIDENT_BYTES:
            self.unload(name)

    def unload(self, name: str) -> None:
        """Let an adapter go."""
        self._resident.pop(name, None)
        if name in self._engine.adapters:
            self._engine.unload(name)

    def load_now(self) -> Load:
        """How busy the engine is."""
        stats = self._engine.stats()
        return Load(
            stats.running,
            stats.waiting,
            alive=self._engine.is_started,
            kv_bytes=stats.kv_bytes + stats.prefix_bytes,
            kv_budget_bytes=stats.kv_budget_bytes,
        )
