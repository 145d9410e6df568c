"""`qlora-kit init`: a new folder in which every other verb works, also without a clone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.cli.output import JsonOption, print_json, stdout_console


def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder.", metavar="DIR")], *, json: JsonOption = False
) -> None:
    """Lay the configs, each task's data and a store with the shipped adapters into a new folder."""
    from qlora_kit.starter import lay_out

    starter = lay_out(folder)
    if json:
        print_json(
            {
                "folder": str(starter.folder),
                "configs": list(starter.configs),
                "datasets": list(starter.datasets),
                "adapters": list(starter.adapters),
            }
        )
        return
    console = stdout_console()
    console.print(f"{starter.folder}", markup=False, style="bold")
    for kind, names in (
        ("configs", starter.configs),
        ("datasets", starter.datasets),
        ("adapters", starter.adapters or ("none yet",)),
    ):
        console.print(f"  {kind:<9} {', '.join(name.removeprefix('configs/') for name in names)}", markup=False)
    console.print(f"\ncd {starter.folder}\nqlora-kit train configs/sentiment.yaml", markup=False)
