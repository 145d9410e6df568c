"""What is shown of a training run on stderr: one line that moves in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_kit.training import TrainingProgress

RECENT_STEPS = 20
TENTHS = 10
SILENT_SECONDS = 30.0
GAP = "  "
LEAST_BAR_CELLS, MOST_BAR_CELLS = 6, 30


class Pace:
    """How fast a run is: fed with its progress, it tells the speed of the last steps and the time left."""

    def __init__(self) -> None:
        self._recent: deque[TrainingProgress] = deque(maxlen=RECENT_STEPS + 1)
        self._first: TrainingProgress | None = None

    def add(self, progress: TrainingProgress) -> None:
        """Take in where the run stands; news of the same step count once."""
        if self._first is None:
            self._first = progress
        if not self._recent or progress.step > self._recent[-1].step:
            self._recent.append(progress)

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last ``RECENT_STEPS`` steps; None before the first."""
        first, last = self._recent[0], self._recent[-1]
        seconds = last.seconds - first.seconds
        return (last.tokens - first.tokens) / seconds if seconds > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At the mean time of a step of this process, evaluations included; None before the first."""
        if self._first is None or self._recent[-1].step == self._first.step:
            return None
        last = self._recent[-1]
        a_step = (last.seconds - self._first.seconds) / (last.step - self._first.step)
        return a_step * (last.total_steps - last.step)


@contextmanager
def training_display(console: Console) -> Iterator[Callable[[TrainingProgress], None]]:
    """A function to show each progress with.

    Args:
        console: Where to; in a terminal one line is drawn again and again, elsewhere plain lines are written.
    """
    if console.is_terminal and not console.is_dumb_terminal:
        with _moving_line(console) as show:
            yield show
        return
    lines = PlainLines(lambda text: console.print(text, markup=False, soft_wrap=True))
    try:
        yield lines.show
    finally:
        lines.end()


@contextmanager
def _moving_line(console: Console) -> Iterator[Callable[[TrainingProgress], None]]:
    from rich.live import Live
    from rich.text import Text

    pace = Pace()
    with Live(console=console, refresh_per_second=4) as live:

        def show(progress: TrainingProgress) -> None:
            pace.add(progress)
            live.update(Text(progress_line(progress, pace, width=console.width - 1), no_wrap=True, overflow="crop"))

        yield show


class PlainLines:
    """Writes a line after each tenth of the steps, after ``SILENT_SECONDS`` without one, and at the end."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._pace = Pace()
        self._latest: TrainingProgress | None = None
        self._written: TrainingProgress | None = None

    def show(self, progress: TrainingProgress) -> None:
        """Take in where the run stands, and write a line if one is due."""
        self._pace.add(progress)
        self._latest = progress
        if self._written is None:  # the begin, of which nothing is known yet
            self._written = progress
        before = self._written
        next_tenth = _tenths(progress) > _tenths(before) and progress.step < progress.total_steps
        if next_tenth or progress.seconds - before.seconds >= SILENT_SECONDS:
            self._line(progress)

    def end(self) -> None:
        """Write where the run stood last, unless that was told."""
        if self._latest is not None and (self._written is None or _news(self._latest) != _news(self._written)):
            self._line(self._latest)

    def _line(self, progress: TrainingProgress) -> None:
        self._written = progress
        self._write(f"step {_step(progress)} ({_percent(progress)}){GAP}{GAP.join(_facts(progress, self._pace))}")


def progress_line(progress: TrainingProgress, pace: Pace, *, width: int) -> str:
    """One line of at most ``width`` columns; a bar takes what is left, and the last facts go where nothing is."""
    facts = _facts(progress, pace)
    while facts and len(GAP.join([_step(progress), *facts])) > width:
        facts.pop()
    told = GAP.join([_step(progress), *facts])
    cells = min(MOST_BAR_CELLS, width - len(told) - len(GAP))
    if cells < LEAST_BAR_CELLS:
        return told
    done = cells * progress.step // max(progress.total_steps, 1)
    return f"{'━' * done}{'╌' * (cells - done)}{GAP}{told}"


def _facts(progress: TrainingProgress, pace: Pace) -> list[str]:
    """What is known, the most important first."""
    left, speed = pace.seconds_left, pace.tokens_per_second
    facts = [
        None if not left else f"{_clock(left)} left",
        None if progress.loss is None else f"loss {progress.loss:#.3g}",
        None if progress.eval_loss is None else f"val {progress.eval_loss:#.3g}",
        None if speed is None else f"{_thousands(speed)} tok/s",
        None if progress.learning_rate is None else f"lr {_short_power(progress.learning_rate)}",
        _memory(progress.peak_bytes),
    ]
    return [fact for fact in facts if fact is not None]


def _news(progress: TrainingProgress) -> tuple[int, float | None, float | None]:
    return progress.step, progress.loss, progress.eval_loss


def _tenths(progress: TrainingProgress) -> int:
    return progress.step * TENTHS // max(progress.total_steps, 1)


def _percent(progress: TrainingProgress) -> str:
    return f"{progress.step / max(progress.total_steps, 1):.0%}"


def _step(progress: TrainingProgress) -> str:
    return f"{progress.step}/{progress.total_steps}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _thousands(value: float) -> str:
    return f"{value:.0f}" if value < 1000 else f"{value / 1000:.1f}k"


def _short_power(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _memory(count_bytes: int) -> str:
    gibibytes = count_bytes / 2**30
    return f"{gibibytes:.1f} GiB" if gibibytes >= 1 else f"{count_bytes / 2**20:.0f} MiB"
