"""`qlora-kit eval`: the scorecard of the base and adapters on held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import plan_engine
from qlora_kit.cli.output import JsonOption, counting, print_json, say, stdout_console
from qlora_kit.cli.sampling import BaseOption

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_kit.evaluation import Scorecard


def evaluate(
    *,
    base: BaseOption = None,
    adapter: Annotated[list[str] | None, typer.Option(help="A store name or a folder; repeat for more.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Score on this task; repeat for more.")] = None,
    split: Annotated[Literal["validation", "test"], typer.Option(help="Which rows.")] = "test",
    matrix: Annotated[bool, typer.Option("--matrix", help="Score adapters off their own task too.")] = False,
    limit: Annotated[int | None, typer.Option(help="Only so many rows of each task.")] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run generated code in a limited child process (pass@1).")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Score adapters and the base on held-out rows."""
    from rich.markup import escape

    from qlora_kit.adapters import AdapterStore
    from qlora_kit.evaluation import run_evaluation
    from qlora_kit.evaluation_plan import plan_evaluation

    plan = plan_evaluation(
        AdapterStore(store),
        adapters=adapter or (),
        tasks=task or None,
        split=split,
        matrix=matrix,
        limit=limit,
        allow_code_execution=allow_code_execution,
        configs={},
        include_base=True,
    )
    planned = plan_engine(base, adapter or (), store)
    say("loading the base")
    engine = planned.open()
    with counting("scoring") as bar:

        def show(label: str, done: int, total: int) -> None:
            bar.update(bar.task_ids[0], description=escape(label), completed=done, total=total)

        card = run_evaluation(engine, plan, progress=show)
    if json:
        print_json(card.to_json())
    else:
        stdout_console().print(scorecard_table(card))


def scorecard_table(card: Scorecard) -> Table:
    """A section for each task: who answered, each metric, its value and interval, and how many rows."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{card.base}, {card.split} rows (95 % interval)", "table.title")
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("task, answered by", "metric", "value", "interval", "rows"):
        left = column in ("task, answered by", "metric")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    task: str | None = None
    previous: tuple[str, str | None] | None = None
    for result in card.results:
        if result.task != task:
            task = result.task
            table.add_row(Text(task, "bold"))
        name = "the base" if result.adapter is None else result.adapter
        name += " (off its task)" if result.off_task else ""
        low, high = result.ci95
        table.add_row(
            Text("" if (result.task, result.adapter) == previous else f"  {name}"),
            Text(result.metric),
            f"{result.value:.3f}",
            f"{low:.3f} - {high:.3f}",
            f"{result.n:,}",
        )
        previous = (result.task, result.adapter)
    return table
