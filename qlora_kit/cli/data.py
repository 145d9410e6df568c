"""`qlora-kit data`: check the data files of a config and count what training would see."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.output import JsonOption, print_json, stdout_console

if TYPE_CHECKING:
    from qlora_kit.data.ledger import DataReport

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML.", metavar="CONFIG")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Keys to change: train.learning_rate=1e-4", metavar="[KEY=VALUE]...")
]


SHOWN_PROBLEMS = 20


def check_data(config: ConfigArgument, overrides: OverridesArgument = None, *, json: JsonOption = False) -> None:
    """Check every row of a config's data, and count rows and tokens, without loading a model."""
    from qlora_kit.config import load_config
    from qlora_kit.data_check import check

    data = check(load_config(config, overrides or ()))
    report = data.report
    if json:
        print_json(report.to_json())
    else:
        _show(config, report)
    data.require_usable()


def _show(config: Path, report: DataReport) -> None:
    from rich.table import Table

    from qlora_kit.data.ledger import locate

    console = stdout_console()
    table = Table(title=f"data of {config}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name in ("rows", "kept", "dropped", "truncated", "duplicates", "leaked"):
        table.add_row(name, f"{getattr(report, name):,}")
    table.add_row("supervised tokens", f"{report.supervised_tokens:,}")
    table.add_row("all tokens", f"{report.total_tokens:,}")
    console.print(table)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.print(f"{locate(problem.file, problem.line)}: {problem.reason}", markup=False, soft_wrap=True)
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(report.problems) - SHOWN_PROBLEMS:,} more problems; --json lists them all")
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
