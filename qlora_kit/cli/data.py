"""`qlora-kit data`: check the data of a config, show what training would see, and count it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.output import JsonOption, counted, in_time, print_json, stdout_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from qlora_kit.data.lengths import Lengths
    from qlora_kit.data.preview import Span
    from qlora_kit.data_check import DataCheck

ConfigArgument = Annotated[Path, typer.Argument(help="The run's YAML.", metavar="CONFIG")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="Keys to change: train.learning_rate=1e-4", metavar="[KEY=VALUE]...")
]

SHOWN_PROBLEMS = 20
BAR_CELLS = 30
COUNTS = ("rows", "kept", "dropped", "truncated", "duplicates", "leaked", "supervised_tokens", "total_tokens")


def check_data(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    preview: Annotated[
        int, typer.Option("--preview", min=0, max=1000, help="Show so many training rows as the model sees them.")
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Check every row of a config's data, and count rows and tokens, without loading a model."""
    from qlora_kit.config import load_config
    from qlora_kit.data_check import check

    run = load_config(config, overrides or ())
    found = check(run, preview=preview)
    if json:
        print_json(found.to_json())
    else:
        _show(config, found, max_length=run.train.max_length)
    found.data.require_usable()


def _show(config: Path, found: DataCheck, *, max_length: int) -> None:
    from qlora_kit.data.ledger import locate

    console = stdout_console()
    if found.data.ledger.rows.total():
        _show_counts(console, config, found)
    for split, lengths in found.lengths.items():
        _show_lengths(console, split, lengths, max_length=max_length)
        if split == "train":
            _show_histogram(console, lengths)
    stops = found.stops
    console.print(
        f"stop token: {stops.token} ({stops.token_id}), supervised at the end of {stops.supervised_rows:,} rows",
        markup=False,
    )
    if found.estimate is not None:
        console.print(_estimate_line(found), markup=False, soft_wrap=True)
    for number, row in enumerate(found.previews, start=1):
        console.rule(f"training row {number}", align="left")
        console.print(preview_text(row), soft_wrap=True)
    if found.previews:
        console.rule()
        console.print("«...» is supervised; control tokens are underlined", markup=False)
    told = set(found.data.stopping)  # the error at the end tells these
    problems = [problem for problem in found.data.report.problems if problem not in told]
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"{locate(problem.file, problem.line)}: {problem.reason}", markup=False, soft_wrap=True)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(problems) - SHOWN_PROBLEMS:,} more problems; --json lists them all")
    for note in (*found.data.report.notes, *stops.notes):
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _show_counts(console: Console, config: Path, found: DataCheck) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    ledger = found.data.ledger
    splits = [split for split in ("train", "validation", "test") if ledger.rows[split]]
    title = f"{config}{'' if not found.data.from_cache else ' (tokenised before, nothing has changed)'}"
    console.print(Text(title, "table.title"), soft_wrap=True)  # a title of the table would be broken to its width
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for split in splits:
        table.add_column(split, justify="right")
    reports = [ledger.report(split) for split in splits]
    for name in COUNTS:
        table.add_row(name.replace("_", " "), *(f"{vars(report)[name]:,}" for report in reports))
    console.print(table)
    if len(found.data.parts) > 1:
        for part in found.data.parts:
            console.print(f"  {part.task}: {part.seen:,} of {part.rows:,} rows in an epoch (weight {part.weight:g})")


def _show_lengths(console: Console, split: str, lengths: Lengths, *, max_length: int) -> None:
    console.print(
        f"{split} rows: half are at most {lengths.median:,} tokens long, 95 % at most {lengths.p95:,}, the longest "
        f"{lengths.longest:,} (max_length {max_length:,})",
        markup=False,
        soft_wrap=True,
    )


def _show_histogram(console: Console, lengths: Lengths) -> None:
    """One line a bin, the bar as long as its share of the largest one."""
    largest = max(found.rows for found in lengths.bins)
    width = len(f"{lengths.longest:,}")
    for found in lengths.bins:
        cells = round(BAR_CELLS * found.rows / largest)
        bar = "█" * max(cells, 1 if found.rows else 0)
        size = f"{found.low:>{width},} - {found.high:>{width},}"
        console.print(" ".join(part for part in (f"  {size}", bar, f"{found.rows:,}") if part), markup=False)


def _estimate_line(found: DataCheck) -> str:
    estimate = found.estimate
    if estimate is None:
        return ""
    text = f"training: {counted(estimate.steps, 'step')}, {estimate.tokens:,} tokens through the model"
    if estimate.seconds is None or estimate.tokens_per_second is None:
        return f"{text}; its time is known once a run on this base and device was measured"
    speed = f"{estimate.tokens_per_second:,.0f} tokens/s"
    return f"{text}, about {in_time(estimate.seconds)} at the {speed} of the last run"


def preview_text(row: tuple[Span, ...]) -> Text:
    """One row for people: what is supervised in «» and green, control tokens underlined, line breaks visible."""
    from rich.text import Text

    text = Text()
    supervised = False
    for span in row:
        if span.supervised != supervised:
            text.append("«" if span.supervised else "»", style="bold green")
            supervised = span.supervised
        style = "bold green" if span.supervised else "dim"
        text.append(span.text.replace("\n", "⏎\n"), style=f"{style} underline" if span.control else style)
    if supervised:
        text.append("»", style="bold green")
    return text
