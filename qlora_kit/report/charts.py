"""What the curves and bars of a report show, before anything is drawn: log lines and lengths in, charts out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from qlora_kit.data.lengths import Lengths
from qlora_kit.report.record import Record

Points = tuple[tuple[float, float], ...]
Style = Literal["faint", "line", "second"]

SMOOTHED_FROM = 20
"""A smoothed curve is drawn where there are at least so many log lines."""
SMOOTHING_SHARE = 0.05
LOG_SCALE_FROM = 50.0
"""Values are drawn on a logarithmic scale where the largest is so many times the smallest."""
MAX_POINTS = 600


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: What it is.
        points: (step, value), in the order of steps.
        style: ``faint`` lies behind; ``second`` is dashed, with a dot at each point.
    """

    label: str
    points: Points
    style: Style = "line"


@dataclass(frozen=True)
class Chart:
    """Curves over the optimizer steps.

    Attributes:
        key: Its file's name without ending.
        title: What it shows.
        series: At least one, each with at least one point.
        marked: A point that is told apart, and its label; None for none.
        note: What the reader has to know, or an empty text.
    """

    key: str
    title: str
    series: tuple[Series, ...]
    marked: tuple[tuple[float, float], str] | None = None
    note: str = ""

    @property
    def values(self) -> list[float]:
        """All values of all curves."""
        return [value for series in self.series for _, value in series.points]

    @property
    def logarithmic(self) -> bool:
        """Whether the values are so far apart that a linear scale would hide the small ones."""
        return min(self.values) > 0 and max(self.values) >= LOG_SCALE_FROM * min(self.values)

    @property
    def description(self) -> str:
        """The chart in words, for those who do not see it."""
        told = (
            f"{series.label}: {number(series.points[0][1])} at step {series.points[0][0]:,.0f}, "
            f"{number(series.points[-1][1])} at step {series.points[-1][0]:,.0f}"
            for series in self.series
            if series.style != "faint" or len(self.series) == 1
        )
        return "; ".join(told)


@dataclass(frozen=True)
class Bars:
    """A histogram: the rows of each range of lengths."""

    key: str
    title: str
    labels: tuple[str, ...]
    values: tuple[int, ...]


def curves(record: Record, metric_names: Sequence[str]) -> tuple[Chart, ...]:
    """Loss, the task's own metric where the run logged it, learning rate and gradient norm; each only if logged."""
    found = [_loss(record)]
    for name in metric_names:
        points = record.logged(f"eval_{name}")
        found.append(Chart(f"eval_{name}", f"Validation {name}", (Series(name, points, "second"),)) if points else None)
    found.append(_plain(record, "learning_rate", "Learning rate"))
    found.append(_plain(record, "grad_norm", "Gradient norm"))
    return tuple(chart for chart in found if chart is not None)


def length_bars(lengths: Lengths) -> Bars:
    """The histogram of the training rows' lengths."""
    labels = tuple(
        f"{found.low:,}" if found.low == found.high else f"{found.low:,}-{found.high:,}" for found in lengths.bins
    )
    return Bars("row_lengths", "Training rows by length (tokens)", labels, tuple(found.rows for found in lengths.bins))


def _loss(record: Record) -> Chart | None:
    training, validation = record.logged("loss"), record.logged("eval_loss")
    series = []
    if training and len(training) >= SMOOTHED_FROM:
        series = [
            Series("training", _thinned(training), "faint"),
            Series("smoothed", _thinned(smoothed(training))),
        ]
    elif training:
        series = [Series("training", training)]
    marked = None
    if validation:
        series.append(Series("validation", validation, "second"))
        kept = next((point for point in validation if point[0] == record.kept_step), None)
        marked = None if kept is None else (kept, f"kept: step {record.kept_step:,}")
    return Chart("loss", "Loss", tuple(series), marked, _note(record, "loss")) if series else None


def _plain(record: Record, name: str, title: str) -> Chart | None:
    points = record.logged(name)
    return Chart(name, title, (Series(title.lower(), _thinned(points)),), note=_note(record, name)) if points else None


def _note(record: Record, name: str) -> str:
    left_out = sum(1 for line in record.history if name in line and line[name] is None)
    return f"{left_out:,} values that are not finite are left out." if left_out else ""


def smoothed(points: Points) -> Points:
    """Each value replaced by the mean of its neighbours, about ``SMOOTHING_SHARE`` of the points, half on each side."""
    reach = max(1, round(len(points) * SMOOTHING_SHARE / 2))
    sums = [0.0, *accumulate(value for _, value in points)]
    result = []
    for index, (step, _) in enumerate(points):
        near = min(reach, index, len(points) - 1 - index)  # as many on each side, so that a slope is not bent
        result.append((step, (sums[index + near + 1] - sums[index - near]) / (2 * near + 1)))
    return tuple(result)


def _thinned(points: Points) -> Points:
    """At most ``MAX_POINTS``: the lowest and the highest of each stretch, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    stretch = math.ceil(len(points) / (MAX_POINTS // 2))
    kept: set[int] = {0, len(points) - 1}
    for start in range(0, len(points), stretch):
        part = range(start, min(start + stretch, len(points)))
        kept |= {min(part, key=lambda index: points[index][1]), max(part, key=lambda index: points[index][1])}
    return tuple(points[index] for index in sorted(kept))


def linear_ticks(low: float, high: float, *, at_most: int = 6) -> list[float]:
    """Round numbers from ``low`` or below to ``high`` or above, evenly spaced by 1, 2 or 5 times a power of ten."""
    span = high - low if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / at_most))
    step = next(factor * power for factor in (1, 2, 5, 10, 20) if span / (factor * power) <= at_most - 1)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` or below to ``high`` or above, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    factors = (1, 2, 5) if last - first <= 1 else (1,)
    ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
    skipped = math.ceil((last - first) / 6)
    ticks = ticks[::skipped] if skipped > 1 else ticks
    below = [tick for tick in ticks if tick <= low * (1 + 1e-9)]
    above = [tick for tick in ticks if tick >= high * (1 - 1e-9)]
    return [tick for tick in ticks if (not below or tick >= below[-1]) and (not above or tick <= above[0])]


def number(value: float) -> str:
    """A value for people: four significant digits, thousands separated."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        text = f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
