"""Writes ``report.html`` and the PNG plots into a run folder, from that folder's own files alone."""

from __future__ import annotations

from pathlib import Path

from qlora_kit.atomic import atomic_file
from qlora_kit.metrics import METRICS
from qlora_kit.report.charts import Bars, Chart, curves, length_bars
from qlora_kit.report.page import page
from qlora_kit.report.png import require_matplotlib, write_png
from qlora_kit.report.record import Run, read_run

REPORT_FILE = "report.html"
PLOT_FILES = tuple(
    f"{name}.png"
    for name in ("loss", "learning_rate", "grad_norm", "row_lengths", *(f"eval_{name}" for name in METRICS))
)
"""The plots that a run may have; those of metrics only where they were measured in training."""


def write_report(folder: Path) -> Path:
    """Write ``folder/report.html``, one page that needs no other file; the same run gives the same bytes.

    Raises:
        AdapterError: ``folder`` is no finished run.
        OutputError: It cannot be written to.
    """
    text = page(run := read_run(folder), _charts(run))
    with atomic_file(folder / REPORT_FILE) as path:
        path.write_text(text, encoding="utf-8")
    return folder / REPORT_FILE


def write_plots(folder: Path) -> list[Path]:
    """Write the report's charts as PNG files into ``folder``.

    Raises:
        AdapterError: ``folder`` is no finished run.
        ConfigError: matplotlib is not installed.
        OutputError: The folder cannot be written to.
    """
    require_matplotlib()
    written = []
    for chart in _charts(read_run(folder)):
        with atomic_file(folder / f"{chart.key}.png") as path:
            write_png(chart, path)
        written.append(folder / f"{chart.key}.png")
    return written


def _charts(run: Run) -> tuple[Chart | Bars, ...]:
    train = run.record.data.get("train")
    bars = () if train is None or train.lengths is None else (length_bars(train.lengths),)
    return (*curves(run.record, run.contract.metric_names), *bars)
