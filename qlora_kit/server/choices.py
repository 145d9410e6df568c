"""The answers of one request: begun in a thread, their pieces handed to the event loop as the engine makes them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from qlora_kit.engine import Answer, Delta, Request
from qlora_kit.errors import QloraKitError
from qlora_kit.server.admission import Admission
from qlora_kit.server.errors import ApiError, told_to_client
from qlora_kit.server.protocol import RunningAnswer, ServedEngine

Event = tuple[int, Delta | Answer]
Result = TypeVar("Result")
_THREADS = 8


class Disconnected(Exception):
    """The client has gone; nobody reads an answer any more."""


class Workers:
    """Runs answers: the engine, the count of answers in flight, and threads for what would hold up the event loop."""

    def __init__(self, engine: ServedEngine, admission: Admission) -> None:
        self.engine = engine
        self.admission = admission
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="request")
        self.cut = 0  # answers whose client was waiting when the server stopped

    def start(self, requests: Sequence[Request], *, pieces: bool, deadline: float) -> Choices:
        """Begin one answer for each of ``requests``; called in the event loop.

        Args:
            requests: At least one.
            pieces: Whether each piece of an answer is an event of its own, or only the whole answer.
            deadline: When they must have ended, on the event loop's clock.

        Raises:
            ApiError: There is no room for them.
        """
        self.admission.admit(len(requests))
        return Choices(self, requests, pieces=pieces, deadline=deadline)


class Choices:
    """Answers in the making, one for each request to the engine, until all have ended or ``cancel`` is called."""

    def __init__(self, workers: Workers, requests: Sequence[Request], *, pieces: bool, deadline: float) -> None:
        self._workers = workers
        self._pieces = pieces
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._events: asyncio.Queue[tuple[int, Delta | Answer | BaseException]] = asyncio.Queue()
        self._unread = len(requests)  # answers whose end has not been taken from the queue, and is waited for
        self._cancelled = False
        self._running: list[RunningAnswer | None] = [None] * len(requests)
        self._has_ended = [False] * len(requests)
        self._is_woken = [False] * len(requests)
        for index, request in enumerate(requests):
            begin = partial(workers.engine.submit, request, notify=partial(self._notify, index))
            begun = partial(self._call_in_loop, self._begun, index)
            workers.threads.submit(begin).add_done_callback(begun)

    async def next_event(self) -> Event | None:
        """The next piece or whole answer, with the index of its request; None when all have ended.

        Raises:
            ApiError: An answer failed, or the time is up.
        """
        if not self._unread:
            return None
        try:
            async with asyncio.timeout_at(self._deadline):
                index, event = await self._events.get()
        except TimeoutError:
            self._give_up()
            raise _out_of_time() from None
        if isinstance(event, BaseException):
            self._give_up()
            if (told := told_to_client(event)) is not None:
                raise told from event
            raise event
        self._unread -= isinstance(event, Answer)
        return index, event

    async def collect(self) -> list[Answer]:
        """Every whole answer, in the order of the requests."""
        answers: dict[int, Answer] = {}
        while (event := await self.next_event()) is not None:
            index, content = event
            if isinstance(content, Answer):
                answers[index] = content
        return [answers[index] for index in sorted(answers)]

    @property
    def ended(self) -> bool:
        """Whether nobody waits any more: the end of every answer has been taken, or one failed."""
        return not self._unread

    def cancel(self) -> None:
        """End every answer within two tokens; those that have ended stay as they are."""
        self._cancelled = True
        for running in self._running:
            if running is not None:
                running.cancel()

    def cut(self) -> None:
        """Cancel because the server stops, although the client waits."""
        self._workers.cut += self._unread
        self._give_up()

    def _give_up(self) -> None:
        self._unread = 0
        self.cancel()

    def _notify(self, index: int) -> None:
        """In the engine's thread, after each piece: wake the event loop, once for all pieces that it has not seen."""
        running = self._running[index]
        if running is None or self._is_woken[index] or not (self._pieces or running.is_done):
            return
        self._is_woken[index] = True
        self._call_in_loop(self._take, index)

    def _call_in_loop(self, function: Any, *arguments: Any) -> None:
        if not self._loop.is_closed():  # a client may wait until the server has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _begun(self, index: int, future: Future[RunningAnswer]) -> None:
        error = future.exception()
        if error is not None:
            self._end(index, error)
            return
        running = self._running[index] = future.result()
        if self._cancelled:
            running.cancel()
        self._take(index)

    def _take(self, index: int) -> None:
        """In the event loop: take what the engine has made since the last time."""
        running = self._running[index]
        if running is None or self._has_ended[index]:
            return
        self._is_woken[index] = False  # before looking, so that nothing made meanwhile is missed
        is_done = running.is_done
        try:
            while (delta := running.poll()) is not None:
                if self._pieces:
                    self._events.put_nowait((index, delta))
            if is_done:
                self._end(index, running.result())
        except QloraKitError as error:
            self._end(index, error)

    def _end(self, index: int, end: Answer | BaseException) -> None:
        """Only now has the engine let go of the answer, so only now there is room for another."""
        self._has_ended[index] = True
        self._workers.admission.release(time.monotonic() - self._started)
        self._events.put_nowait((index, end))


async def while_connected(request: HttpRequest, work: Coroutine[Any, Any, Result], choices: Choices) -> Result:
    """The result of ``work``, which waits for ``choices``; they are cancelled when the client goes before it is there.

    Args:
        request: The client's request, whose body has been read.
        work: What waits.
        choices: What it waits for.

    Raises:
        Disconnected: The client has gone.
        ApiError: An answer failed, or the time is up.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            choices.cancel()
            raise Disconnected
        return task.result()
    except asyncio.CancelledError:
        choices.cut()
        raise
    finally:
        task.cancel()
        gone.cancel()


async def _disconnect(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _out_of_time() -> ApiError:
    message = "The answer took longer than this server allows; ask for fewer tokens, or try later."
    return ApiError(408, message, code="deadline")
