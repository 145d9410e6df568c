"""A clean stop: SIGINT or SIGTERM is noted, the trainer asks for it, and an error tells how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qlora_kit.errors import Interrupted
from qlora_kit.training.run_facts import StopRequested

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


class StopOnSignal:
    """Notes SIGINT or SIGTERM; the trainer stops before its next micro-batch, an answer before its next token."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def wanted(self) -> bool:
        """Whether one of them came."""
        return self.received is not None

    def raise_if_wanted(self) -> None:
        """Leave what is going on.

        Raises:
            StopRequested: One of them came.
        """
        if self.received is not None:
            raise StopRequested

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals inside the block; a second one ends the process at once as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._receive) for number in EXIT_CODES}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for caught in EXIT_CODES:
            signal.signal(caught, signal.SIG_DFL if caught != signal.SIGINT else signal.default_int_handler)

    def in_training(self, *, step: int, steps: int, saved: bool) -> Interrupted:
        """The error of a run that stopped after ``step`` of ``steps``; ``saved``: that step has its checkpoint."""
        fix = "go on from the checkpoint of this step with --resume" if saved else "start again: no step was done yet"
        return self._error(f"after step {step} of {steps}", expected="the run to end by itself", fix=fix)

    def after_the_last_step(self, folder: Path) -> Interrupted:
        """The error of a run whose adapter is complete in ``folder``, and whose answers were not waited for."""
        return self._error(
            "after the last step, while the trained adapter was answering",
            expected="its stop rate and sample answers, too",
            fix=f"nothing is lost: the adapter in {folder} is complete; qlora-kit eval measures the stop rate",
        )

    def _error(self, when: str, *, expected: str, fix: str) -> Interrupted:
        name = "a signal to another process" if self.received is None else self.received.name
        error = Interrupted(f"stopped by {name} {when}", expected=expected, fix=fix)
        if self.received is not None:
            error.exit_code = EXIT_CODES[self.received]
        return error
