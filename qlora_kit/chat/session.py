"""One conversation: the turns so far, which adapter answers, and answers that are streamed and may be stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.conversation import Message
from qlora_kit.engine import Request
from qlora_kit.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from qlora_kit.engine import Answer, Engine, Handle
    from qlora_kit.generation import Sampling

BASE = "base"


class ChatSession:
    """The state of a chat; a turn enters the history when its answer has ended or was stopped."""

    def __init__(self, engine: Engine, *, sampling: Sampling, fixed_limit: bool = False) -> None:
        """Begin an empty conversation with the base.

        Args:
            engine: A started engine.
            sampling: How answers are sampled.
            fixed_limit: Whether ``sampling.max_new_tokens`` holds for every adapter; else each one's own limit does.
        """
        self.engine = engine
        self.adapter: str | None = None
        self.turns: list[Message] = []
        self.last: Answer | None = None
        self._system: str | None = None
        self._sampling = sampling
        self._fixed_limit = fixed_limit

    def use(self, adapter: str | None) -> str:
        """Answer with ``adapter`` from now on (None: the base), loaded here, and return the name to show.

        Raises:
            AdapterError: It cannot be loaded; the one that answered before still does.
        """
        self.adapter = None if adapter is None else self.engine.load_choice(adapter)
        return self.name

    @property
    def system(self) -> str | None:
        """The system prompt that answers are given under; None for the adapter's own.

        Raises:
            ConfigError: A new one holds a control token, or is no text; the one before still holds.
        """
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        faults = [] if text is None else self.engine.text_faults([Message("system", text)])
        if faults:
            raise ConfigError.of(faults)
        self._system = text

    @property
    def name(self) -> str:
        """Of what answers: the adapter's name, or ``base``."""
        return BASE if self.adapter is None else self.adapter

    def answer(self, text: str) -> Iterator[str]:
        """Answer ``text`` piece by piece; closing the iterator stops the answer and keeps what came of it.

        Raises:
            QloraKitError: The answer cannot be given; the conversation is as it was.
        """
        question = Message("user", text)
        handle = self.engine.submit(self._request([*self.turns, question], self.adapter))
        pieces: list[str] = []
        ended = False
        try:
            for delta in handle:
                pieces.append(delta.text)
                yield delta.text
            ended = True
        except (KeyboardInterrupt, GeneratorExit):
            handle.cancel()
            ended = bool(pieces)
            raise
        finally:
            if ended:
                self.turns += [question, Message("assistant", "".join(pieces))]
                self.last = handle.result()

    def compare(self, adapters: Sequence[str]) -> list[tuple[str, Iterator[str]]]:
        """The last question answered by each, all in one batch; the conversation stays as it is.

        Args:
            adapters: Names; ``base`` is the base.

        Raises:
            ConfigError: Nothing was asked yet.
            AdapterError: One of them cannot be loaded; nothing is answered.
        """
        asked = [index for index, turn in enumerate(self.turns) if turn.role == "user"]
        if not asked:
            raise ConfigError("nothing was asked yet", expected="a question to compare on", fix="ask it, then /compare")
        names = [None if name == BASE else self.engine.load_choice(name) for name in adapters]
        turns = self.turns[: asked[-1] + 1]
        handles = [self.engine.submit(self._request(turns, name)) for name in names]
        return [(BASE if name is None else name, _texts(handle)) for name, handle in zip(names, handles, strict=True)]

    def undo(self) -> None:
        """Forget the last question and its answer.

        Raises:
            ConfigError: There is none.
        """
        if not self.turns:
            raise ConfigError("the conversation is empty", expected="a question to forget", fix="ask one")
        del self.turns[-2:]

    def save(self, path: Path) -> int:
        """Write the conversation at the end of a JSONL file, a row of the format ``messages``; returns its line.

        Raises:
            ConfigError: The conversation is empty, or the file is not named as JSONL.
            OutputError: The file cannot be written.
        """
        if not self.turns:
            raise ConfigError("the conversation is empty", expected="a question and its answer", fix="ask one first")
        if path.suffix != ".jsonl":
            raise ConfigError(f"/save {path}", expected="a file that ends with .jsonl", fix=f"/save {path}.jsonl")
        system = [] if self.system is None else [Message("system", self.system)]
        messages = [{"role": turn.role, "content": turn.content} for turn in [*system, *self.turns]]
        row = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        try:
            with path.open("a+b") as file:
                file.seek(0)
                before = file.read()
                file.write((b"" if before.endswith(b"\n") or not before else b"\n") + row.encode())
        except OSError as error:
            raise OutputError(
                f"{path}: {error.strerror}", expected="a file that can be written to", fix="choose another one"
            ) from None
        return len(before.splitlines()) + 1

    def _request(self, turns: Sequence[Message], adapter: str | None) -> Request:
        system = [] if self.system is None else [Message("system", self.system)]
        sampling = self._sampling
        if not self._fixed_limit:
            sampling = replace(sampling, max_new_tokens=self.engine.default_sampling(adapter).max_new_tokens)
        return Request(conversation=(*system, *turns), adapter=adapter, sampling=sampling)


def _texts(handle: Handle) -> Iterator[str]:
    """The pieces of an answer; closing the iterator stops it."""
    try:
        for delta in handle:
            yield delta.text
    finally:
        handle.cancel()
