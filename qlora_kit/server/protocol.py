"""What the HTTP layer needs of an engine, so that it can be tested with one that follows a script."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qlora_kit.engine import Answer, Delta, Request
from qlora_kit.generation import Sampling


@dataclass(frozen=True)
class Load:
    """How busy an engine is.

    Attributes:
        running: Rows in the running batch.
        waiting: Requests that wait for a place.
        alive: Whether it still works.
        kv_bytes: Memory of keys and values, those of known prompts included.
        kv_budget_bytes: What they may take.
    """

    running: int
    waiting: int
    alive: bool = True
    kv_bytes: int = 0
    kv_budget_bytes: int = 0


class RunningAnswer(Protocol):
    """One answer in the making; usable from any thread."""

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""

    def poll(self) -> Delta | None:
        """Its next piece if there is one already; raises when it failed."""

    def cancel(self) -> None:
        """End it within two tokens; returns at once."""

    def result(self) -> Answer:
        """The whole answer; waits for its end, raises when it failed."""


class ServedEngine(Protocol):
    """An engine behind HTTP; every method may be called from any thread."""

    @property
    def base(self) -> str:
        """The base's name for clients, never a path."""

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may be as long."""

    @property
    def vocabulary_tokens(self) -> int:
        """Token ids are below this."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer would make control tokens of."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that is no conversation."""

    def decode(self, token_id: int) -> str:
        """The text of one token."""

    def default_sampling(self, adapter: str | None) -> Sampling:
        """How the adapter's contract says that answers are made."""

    def submit(self, request: Request, *, notify: Callable[[], None]) -> RunningAnswer:
        """Begin an answer; may take as long as reading the prompt, or an adapter. ``notify`` follows each piece."""

    def load(self, name: str) -> None:
        """Load an adapter of the store, or take its new version; running answers finish on the one they began with."""

    def unload(self, name: str) -> None:
        """Let an adapter go, if it is loaded; running answers finish."""

    def load_now(self) -> Load:
        """How busy it is."""
