"""How long light commands take as whole processes: `qlora-kit --help`, `plan`, and `adapters list` with 1,000 adapters.

    python benchmarks/startup.py [--quick] [--json FILE]

The reference beside them is `python -c pass`, the interpreter alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = 1_000


def seconds(command: list[str], runs: int) -> float:
    """Median wall time of ``command`` over ``runs``, after one run that is not counted."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def fill_store(store: Path) -> None:
    """``ADAPTERS`` copies of a shipped adapter."""
    source = ROOT / "adapters" / "sentiment"
    for number in range(ADAPTERS):
        folder = store / f"adapter-{number:04}"
        folder.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copy(path, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3 runs instead of 15")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    runs = 3 if arguments.quick else 15
    kit = str(Path(sys.executable).with_name("qlora-kit"))
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        store = Path(folder)
        fill_store(store)
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "qlora-kit --help": [kit, "--help"],
            "qlora-kit plan": [kit, "plan", str(ROOT / "configs" / "sentiment.yaml"), "--gpu", "24GiB", "--json"],
            f"qlora-kit adapters list ({ADAPTERS:,} adapters)": [kit, "adapters", "list", "--store", str(store)],
        }
        figures = {name: round(seconds(command, runs), 4) for name, command in commands.items()}
    table = Table(title=f"median wall seconds of {runs} runs")
    table.add_column("command")
    table.add_column("seconds", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"runs": runs, "seconds": figures}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
