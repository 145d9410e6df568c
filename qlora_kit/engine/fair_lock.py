"""A lock that is handed on in turn: a loop that takes it again and again lets everyone else in between."""

from __future__ import annotations

import threading
from types import TracebackType


class FairLock:
    """A lock for ``with``, which the thread that holds it may enter again."""

    def __init__(self) -> None:
        self._gate = threading.Lock()  # held by whoever is next
        self._inner = threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner != me:
            with self._gate:
                self._inner.acquire()
            self._owner = me
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._inner.release()
