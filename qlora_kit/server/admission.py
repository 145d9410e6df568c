"""How many answers may run and wait at once: a count, and the refusal of what is beyond it."""

from __future__ import annotations

import math

from qlora_kit.server.errors import ApiError

_WEIGHT_OF_LAST = 0.1
_LONGEST_WAIT_SECONDS = 60


class Admission:
    """Counts answers from their admission until the engine has let go of them; used from the event loop only."""

    def __init__(self, *, capacity: int, at_once: int) -> None:
        self.capacity = capacity
        self.in_flight = 0
        self._at_once = at_once
        self._usual_seconds = 1.0

    def admit(self, answers: int) -> None:
        """Take on so many answers.

        Raises:
            ApiError: Too many are running and waiting (429, with the time after which a place should be free), or one
                request asks for more than there will ever be room for (400).
        """
        if answers > self.capacity:
            raise ApiError(400, f"The request asks for {answers} answers; {self.capacity} can run or wait.", param="n")
        if self.in_flight + answers > self.capacity:
            batches = math.ceil(max(1, self.in_flight - self._at_once) / self._at_once)
            wait = min(_LONGEST_WAIT_SECONDS, max(1, math.ceil(batches * self._usual_seconds)))
            raise ApiError(
                429,
                f"{self.in_flight} answers are running or waiting already; try again in {wait} s.",
                code="queue_full",
                headers={"retry-after": str(wait)},
            )
        self.in_flight += answers

    def release(self, seconds: float) -> None:
        """One answer has ended, after so many seconds."""
        self.in_flight -= 1
        self._usual_seconds += _WEIGHT_OF_LAST * (seconds - self._usual_seconds)
