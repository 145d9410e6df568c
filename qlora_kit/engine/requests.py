"""What goes into the engine and what comes out: requests, the pieces of an answer, and the handle to wait with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from qlora_kit.conversation import Message
from qlora_kit.errors import ConfigError, QloraKitError
from qlora_kit.generation import FinishReason, Sampling, TokenLogprob


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: Without the stop token, and without a stop string.
        adapter: Which adapter gave it, as it was asked for; None for the base.
        finish_reason: ``stop`` when it ended by itself, ``length`` when the limit cut it, ``cancelled``.
        completion_tokens: Tokens generated, without the stop token.
        prompt_tokens: Tokens of the rendered prompt.
        logprobs: One for each generated token, where ``Sampling.logprobs`` asks for them.
    """

    text: str
    adapter: str | None
    finish_reason: FinishReason
    completion_tokens: int
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Request:
    """One thing to answer: a conversation, or a prompt's token ids as they are.

    Attributes:
        conversation: The turns so far, ending with the user's. The adapter's trained system prompt is put before it,
            unless it brings its own.
        prompt_ids: In place of a conversation.
        adapter: A name, a name with a scale (``sentiment:0.5``), or a weighted sum (``a:0.7+b:0.3``); None for the
            base.
        sampling: None takes the adapter's defaults.
    """

    conversation: tuple[Message, ...] = ()
    prompt_ids: tuple[int, ...] = ()
    adapter: str | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        if bool(self.conversation) == bool(self.prompt_ids):
            given = "both a conversation and token ids" if self.conversation else "neither a conversation nor token ids"
            raise ConfigError(f"the request holds {given}", expected="one of the two", fix="give one of the two")


@dataclass(frozen=True)
class Delta:
    """The next piece of an answer.

    Attributes:
        text: What is certain now: whole characters, no part of a stop string. Often empty.
        token_ids: Tokens generated since the last piece.
        logprobs: One for each of them, where they are asked for.
        finish_reason: Set in the last piece alone.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class Driver(Protocol):
    """Who makes progress while a handle waits."""

    @property
    def is_started(self) -> bool:
        """Whether a thread of its own does."""

    def advance(self) -> None:
        """Make one step, where no thread does."""


class Handle:
    """A request under way: iterate over its pieces, or wait for the whole answer. Safe to use from any thread."""

    def __init__(self, driver: Driver, notify: Callable[[], None] | None = None) -> None:
        self._driver = driver
        self._notify = notify
        self._deltas: SimpleQueue[Delta | None] = SimpleQueue()
        self._done = threading.Event()
        self._answer: Answer | None = None
        self._error: QloraKitError | None = None
        self._is_cancelled = False
        self._is_read = False

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        """The next piece; waits for it.

        Raises:
            QloraKitError: The request failed.
        """
        if self._is_read:
            raise StopIteration
        delta = self._next()
        if delta is not None:
            return delta
        self._is_read = True
        if self._error is not None:
            raise self._error
        raise StopIteration

    def poll(self) -> Delta | None:
        """The next piece if there is one already, else None; for callers that ``notify`` wakes.

        Raises:
            QloraKitError: The request failed.
        """
        if self._is_read:
            return None
        try:
            delta = self._deltas.get_nowait()
        except Empty:
            return None
        if delta is None:
            self._is_read = True
            if self._error is not None:
                raise self._error
        return delta

    def cancel(self) -> None:
        """Stop after the step under way; the answer ends with ``cancelled``."""
        self._is_cancelled = True

    def result(self, timeout: float | None = None) -> Answer:
        """The whole answer; waits for it.

        Args:
            timeout: Seconds to wait where the engine's thread runs; None waits for ever.

        Raises:
            QloraKitError: The request failed.
            TimeoutError: It took longer.
        """
        while not self._done.is_set():
            if not self._driver.is_started:
                self._driver.advance()
            elif not self._done.wait(timeout):
                raise TimeoutError(f"no answer within {timeout} seconds")
        if self._error is not None:
            raise self._error
        if self._answer is None:
            raise RuntimeError("a request ended without an answer")
        return self._answer

    @property
    def is_done(self) -> bool:
        """Whether the answer, or the error, is there."""
        return self._done.is_set()

    @property
    def is_cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._is_cancelled

    def _next(self) -> Delta | None:
        while True:
            if self._driver.is_started or self._done.is_set():
                return self._deltas.get()
            try:
                return self._deltas.get_nowait()
            except Empty:
                self._driver.advance()

    # What the engine calls.

    def put(self, delta: Delta) -> None:
        """Add a piece."""
        self._deltas.put(delta)
        self._wake()

    def finish(self, answer: Answer) -> None:
        """End with ``answer``, behind its last piece."""
        self._answer = answer
        self._end()

    def fail(self, error: QloraKitError) -> None:
        """End with ``error``."""
        if not self._done.is_set():
            self._error = error
            self._end()

    def _end(self) -> None:
        self._deltas.put(None)
        self._done.set()
        self._wake()

    def _wake(self) -> None:
        if self._notify is not None:
            self._notify()
