"""`qlora-kit report`: write a finished run's report again, from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.cli.output import JsonOption, print_json, stdout_console


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.", metavar="RUN")],
    *,
    png: Annotated[bool, typer.Option("--png", help="Also write each plot as a PNG file (extra: report).")] = False,
    json: JsonOption = False,
) -> None:
    """Write RUN/report.html from the files of the run, and its plots as PNG files if asked for."""
    from qlora_kit.report import write_plots, write_report

    plots = write_plots(run) if png else []
    page = write_report(run)
    if json:
        print_json({"report": str(page), "plots": [str(path) for path in plots]})
        return
    for path in (page, *plots):
        stdout_console().print(str(path), markup=False, soft_wrap=True)
