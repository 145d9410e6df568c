"""The whole job on the embedded base: check data, train two adapters, compare, swap, merge, verify, show the gain.

    make demo

Everything is written under runs/demo, which git ignores; a second run starts afresh.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from qlora_kit.generation import Sampling

if TYPE_CHECKING:
    from qlora_kit.engine import Engine
    from qlora_kit.evaluation import Scorecard

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "demo"
STORE = RUNS / "adapters"
# Translation needs less than the whole run of `make adapters` to show its gain.
TASKS: dict[str, list[str]] = {"sentiment": [], "translation": ["train.max_steps=120"]}
SCORED_ROWS = 100
PROMPTS = (
    "At first it looked dreadful, but in the end it was anything but boring.",
    "The small cats are under the white table.",
)
SHORT = Sampling(max_new_tokens=40)


def main() -> None:
    os.chdir(ROOT)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console = Console(highlight=False)
    began = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)

    console.rule("1  check the data")
    for task in TASKS:
        run(["data", f"configs/{task}.yaml"])

    console.rule("2  train two adapters with QLoRA on the 4-bit base `tiny`")
    for task, overrides in TASKS.items():
        run(["train", f"configs/{task}.yaml", f"output_dir={RUNS / task}", *overrides])
        run(["adapters", "add", str(RUNS / task), "--store", str(STORE)])

    console.rule("3  score the base and the adapters on held-out rows")
    from qlora_kit.cli.evaluation import scorecard_table
    from qlora_kit.engine import Engine
    from qlora_kit.evaluation import evaluate

    engine = Engine("tiny", store=STORE)
    card = evaluate(engine, adapters=list(TASKS), limit=SCORED_ROWS)
    console.print(scorecard_table(card))

    console.rule("4  one base in memory, adapters swapped in and out")
    console.print(answers_table(engine))

    console.rule("5  merge one adapter into the base and verify the written files")
    merged = RUNS / "merged-sentiment"
    run(["merge", "sentiment", "--out", str(merged), "--store", str(STORE)])

    console.rule("what was gained")
    console.print(gains_table(card))
    seconds = time.monotonic() - began
    console.print(
        Panel(
            f"{seconds / 60:.1f} minutes. Merged model: {merged.relative_to(ROOT)} (plain transformers loads it).\n"
            "Your own data: qlora-kit train configs/sentiment.yaml data.train=my.csv data.validation=my-val.csv",
            expand=False,
        )
    )


def run(arguments: list[str]) -> None:
    """One `qlora-kit` command in this process, shown as it would be typed."""
    from qlora_kit.cli import main as qlora_kit

    shown = " ".join(argument.replace(f"{ROOT}{os.sep}", "") for argument in arguments)
    print(f"\n$ qlora-kit {shown}", flush=True)
    try:
        qlora_kit(arguments)
    except SystemExit as end:
        if end.code not in (None, 0):
            sys.exit(end.code)


def answers_table(engine: Engine) -> Table:
    """The same prompts answered by the base and by each adapter, and proof that the base came out of it unchanged."""
    table = Table(show_lines=True)
    for column in ("prompt", "answered by", "answer"):
        table.add_column(column, overflow="fold")
    before = {prompt: engine.ask(prompt, sampling=SHORT).text for prompt in PROMPTS}
    for prompt in PROMPTS:
        table.add_row(Text(prompt), "the base", Text(before[prompt]))
        for adapter in TASKS:
            table.add_row("", Text(adapter), Text(engine.ask(prompt, adapter=adapter, sampling=SHORT).text))
    unchanged = all(engine.ask(prompt, sampling=SHORT).text == text for prompt, text in before.items())
    table.caption = f"after all swaps the base answers {'as before' if unchanged else 'DIFFERENTLY'}"
    return table


def gains_table(card: Scorecard) -> Table:
    """One line for each task: base, adapter, gain, and how many answers ended by themselves."""
    stop_rates = {
        (result.task, result.adapter): result.value for result in card.results if result.metric == "stop_rate"
    }
    table = Table(title=f"held-out {card.split} rows, {SCORED_ROWS} of each task")
    for column in ("task", "metric", "base", "adapter", "gain", "answers that stop"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for gain in card.headline():
        table.add_row(
            gain.task,
            gain.metric,
            "" if gain.base_value is None else f"{gain.base_value:.2f}",
            f"{gain.adapter_value:.2f}",
            "" if gain.gain is None else f"{gain.gain:+.2f}",
            f"{stop_rates[gain.task, gain.adapter]:.0%}",
        )
    return table


if __name__ == "__main__":
    main()
