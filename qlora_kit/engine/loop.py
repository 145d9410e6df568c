"""Who makes the scheduler's steps: a thread of its own once it is started, else the callers that wait for answers."""

from __future__ import annotations

import threading

from qlora_kit.engine.row import Row
from qlora_kit.engine.scheduler import Scheduler
from qlora_kit.errors import Interrupted

_IDLE_SECONDS = 0.01
_CLOSED = "the engine was closed before the request was answered"


class EngineLoop:
    """Drives a scheduler; the handles of its requests ask it to go on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._thread: threading.Thread | None = None
        self._work = threading.Event()
        self._ended: str | None = None  # why no request may join now

    @property
    def is_started(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def enter(self, row: Row) -> None:
        """Let a request join the batch.

        Raises:
            Interrupted: The loop is being closed, or its thread has failed.
        """
        if (ended := self._ended) is not None:
            raise _refusal(ended)
        self._scheduler.submit(row)
        if (ended := self._ended) is not None:  # meanwhile: this request was not there yet to be failed with the others
            self._scheduler.fail_all(_refusal(ended))
        self._work.set()

    def advance(self) -> None:
        """One step of the batch, where no thread makes them: one token for each request under way."""
        if not self._scheduler.step() and not self.is_started:
            self._work.wait(_IDLE_SECONDS)  # another thread holds the request that is waited for

    def start(self) -> None:
        """Let a thread make the steps from now on."""
        if not self.is_started:
            self._ended = None
            self._thread = threading.Thread(target=self._run, name="qlora-kit-engine", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread after the step under way; requests that are not done fail. ``start`` begins again."""
        self._ended = _CLOSED
        self._work.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._scheduler.fail_all(_refusal(_CLOSED))
        self._ended = None

    def _run(self) -> None:
        try:
            while self._ended is None:
                self._work.clear()
                if not self._scheduler.step():
                    self._work.wait()
        except BaseException as error:
            self._ended = f"the engine stopped: {type(error).__name__}: {error}"
            self._scheduler.fail_all(_refusal(self._ended))
            raise


def _refusal(what: str) -> Interrupted:
    return Interrupted(what, expected="a running engine", fix="start it again, and send the request again")
