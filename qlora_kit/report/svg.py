"""Draws charts as SVG; the page's style sheet colours them, so that they follow the reader's light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from qlora_kit.report.charts import Bars, Chart, Points, Series, linear_ticks, log_ticks, number

# Units of the view box: about as many pixels as the picture has on a phone.
WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 38
SWATCH_WIDTH, SWATCH_HEIGHT = 24, 18
STEP_TICKS = 5
LETTER = 8.0  # the widest digit, on a phone
BAR_LABELS = 5


class _Scale:
    """Data to view-box coordinates, from step 0 on; the ticks are where the axes are labelled."""

    def __init__(self, chart: Chart) -> None:
        steps = [step for series in chart.series for step, _ in series.points]
        self._last = max(1.0, *steps)
        ticks = linear_ticks(0, self._last, at_most=STEP_TICKS)
        self.steps = [tick for tick in ticks if tick <= self._last and float(tick).is_integer()]
        self._map = math.log10 if chart.logarithmic else float
        low, high = min(chart.values), max(chart.values)
        self.values = log_ticks(low, high) if chart.logarithmic else linear_ticks(low, high)
        self._low = self._map(self.values[0])
        self._span = self._map(self.values[-1]) - self._low or 1.0  # one value throughout stands at the bottom

    def x(self, step: float) -> float:
        return round(LEFT + step / self._last * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (self._map(value) - self._low) / self._span
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)


def chart_svg(chart: Chart) -> Markup:
    """The chart as an ``<svg>`` element, with its description in words inside."""
    scale = _Scale(chart)
    parts = [*_axes(scale), *(part for series in chart.series for part in _series(series, scale))]
    if chart.marked is not None:
        (step, value), _ = chart.marked
        parts.append(_ring(scale.x(step), scale.y(value)))
    scale_name = ", logarithmic scale" if chart.logarithmic else ""
    return _svg(f"{chart.title} by step{scale_name}", chart.description, parts)


def bars_svg(bars: Bars) -> Markup:
    """The histogram as an ``<svg>`` element."""
    ticks = linear_ticks(0, max(bars.values))
    width = (WIDTH - LEFT - RIGHT) / len(bars.values)
    below = HEIGHT - BOTTOM
    parts = []
    for tick in ticks:
        y = round(below - tick / ticks[-1] * (below - TOP), 2)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(number(tick), LEFT - 6, y + 4, "end")]
    every = math.ceil(len(bars.values) / BAR_LABELS)
    for index, (label, value) in enumerate(zip(bars.labels, bars.values, strict=True)):
        x, height = LEFT + index * width, value / ticks[-1] * (below - TOP)
        bar = '<rect class="bar" x="{}" y="{}" width="{}" height="{}"><title>{} tokens: {} rows</title></rect>'
        sizes = (round(x + width * 0.08, 2), round(below - height, 2), round(width * 0.84, 2), round(height, 2))
        parts.append(Markup(bar).format(*sizes, label, f"{value:,}"))
        if index % every == 0:
            parts.append(_text(label, x + width / 2, below + 16, "middle"))
    parts.append(_text("tokens", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle"))
    told = "; ".join(f"{label} tokens: {value:,} rows" for label, value in zip(bars.labels, bars.values, strict=True))
    return _svg(bars.title, told, parts)


def _svg(title: str, description: str, parts: Sequence[Markup]) -> Markup:
    opening = '<svg viewBox="0 0 {} {}" role="img" aria-label="{}. {}">'
    return Markup(opening).format(WIDTH, HEIGHT, title, description) + Markup("").join(parts) + Markup("</svg>")


def _axes(scale: _Scale) -> list[Markup]:
    parts = []
    for value in scale.values:
        y = scale.y(value)
        parts += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(number(value), LEFT - 6, y + 4, "end")]
    for step in scale.steps:
        x, label = scale.x(step), f"{step:,.0f}"
        at_edge = x + LETTER / 2 * len(label) > WIDTH
        parts.append(_text(label, WIDTH if at_edge else x, HEIGHT - BOTTOM + 16, "end" if at_edge else "middle"))
    parts.append(_text("step", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, "middle"))
    return parts


def _series(series: Series, scale: _Scale) -> list[Markup]:
    parts = []
    if len(series.points) > 1:
        path = " ".join(f"{scale.x(step)},{scale.y(value)}" for step, value in series.points)
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(series.style, path))
    if series.style == "second" or len(series.points) == 1:
        parts += _dots(series.points, series.label, series.style, scale)
    return parts


def _dots(points: Points, label: str, style: str, scale: _Scale) -> list[Markup]:
    dot = Markup('<circle class="{} dot" cx="{}" cy="{}" r="3"><title>{}: {} at step {:,.0f}</title></circle>')
    return [dot.format(style, scale.x(step), scale.y(value), label, number(value), step) for step, value in points]


def legend(chart: Chart) -> list[tuple[Markup, str]]:
    """A little picture and the label of each curve and of the marked point; none where the title says it."""
    if len(chart.series) == 1 and chart.marked is None:
        return []
    middle = SWATCH_WIDTH / 2, SWATCH_HEIGHT / 2
    entries = []
    for series in chart.series:
        parts = [_line(0, middle[1], SWATCH_WIDTH, middle[1], series.style)]
        if series.style == "second":
            parts.append(Markup('<circle class="second dot" cx="{}" cy="{}" r="3"/>').format(*middle))
        entries.append((_swatch(parts), series.label))
    if chart.marked is not None:
        entries.append((_swatch([_ring(*middle)]), chart.marked[1]))
    return entries


def _swatch(parts: Sequence[Markup]) -> Markup:
    opening = '<svg class="swatch" viewBox="0 0 {} {}" aria-hidden="true">'
    return Markup(opening).format(SWATCH_WIDTH, SWATCH_HEIGHT) + Markup("").join(parts) + Markup("</svg>")


def _ring(x: float, y: float) -> Markup:
    return Markup('<circle class="kept" cx="{}" cy="{}" r="7"/>').format(x, y)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> Markup:
    line = '<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}"/>'
    return Markup(line).format(style, *(round(place, 2) for place in (x1, y1, x2, y2)))


def _text(text: str, x: float, y: float, anchor: str) -> Markup:
    element = '<text x="{}" y="{}" text-anchor="{}">{}</text>'
    return Markup(element).format(round(x, 2), round(y, 2), anchor, escape(text))
