"""`qlora-kit doctor`: what the machine and the libraries are fit for, and with `--train` the proof on each device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.output import JsonOption, print_json, say, stdout_console

if TYPE_CHECKING:
    from qlora_kit.doctor import Diagnosis

_STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red", "-": "dim"}


def doctor(
    *,
    train: Annotated[
        bool, typer.Option("--train", help="Also train three small steps and merge on each device, and compare.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check Python, libraries, GPU, memory and disk; `--train` proves training and merging on each device."""
    from qlora_kit.doctor import diagnose

    diagnosis = diagnose(train=train, progress=say)
    if json:
        print_json(diagnosis.to_json())
    else:
        _show(diagnosis)
    if diagnosis.exit_code:
        raise typer.Exit(diagnosis.exit_code)


def _show(diagnosis: Diagnosis) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=32)
    table.add_column(overflow="fold")
    for check in diagnosis.checks:
        detail = Text(check.detail)
        if check.ok is False and check.fix is not None:
            detail.append(f"\ndo: {check.fix}", style="bold")
        table.add_row(Text(check.mark, _STYLES[check.mark]), Text(check.name), detail)
    console = stdout_console()
    console.print(table)
    console.print()
    console.print(diagnosis.summary, markup=False, soft_wrap=True)
