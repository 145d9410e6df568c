"""Draws charts as PNG files for slides and papers; matplotlib, an optional library, does it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import ConfigError
from qlora_kit.report.charts import Bars, Chart

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_INCHES = (6.4, 3.8)
DOTS_PER_INCH = 150
_BLUE, _ORANGE = "#1f5fbf", "#b4540a"
_STYLES = {
    "faint": {"color": _BLUE, "alpha": 0.35, "linewidth": 1.0},
    "line": {"color": _BLUE, "linewidth": 1.8},
    "second": {"color": _ORANGE, "linewidth": 1.5, "linestyle": "--", "marker": "o", "markersize": 4},
}


def can_plot() -> bool:
    """Whether the library is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Refuse to begin without the library.

    Raises:
        ConfigError: It is not installed.
    """
    if not can_plot():
        raise ConfigError(
            "PNG plots need matplotlib, which is not installed",
            expected="the extra report",
            fix="pip install 'qlora-kit[report]'; the curves are in report.html without it",
        )


def write_png(chart: Chart | Bars, path: Path) -> None:
    """Draw ``chart`` into the file ``path``; the same chart gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(chart.title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if isinstance(chart, Bars):
        axes.bar(chart.labels, chart.values, color=_BLUE)
        axes.tick_params(axis="x", labelrotation=30)
        axes.set_ylabel("rows")
    else:
        _draw_curves(axes, chart)
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_curves(axes: Axes, chart: Chart) -> None:
    for series in chart.series:
        steps, values = zip(*series.points, strict=True)
        marker = {"marker": "o"} if len(steps) == 1 else {}
        axes.plot(steps, values, label=series.label, **(_STYLES[series.style] | marker))  # type: ignore[arg-type]
    if chart.marked is not None:
        (step, value), label = chart.marked
        ring = {"facecolors": "none", "edgecolors": _ORANGE, "linewidths": 1.6}
        axes.scatter([step], [value], s=110, label=label, zorder=3, **ring)  # type: ignore[arg-type]
    if len(chart.series) > 1:
        axes.legend(frameon=False)
    if chart.logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("step")
