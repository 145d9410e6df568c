"""`qlora-kit eval`: the scorecard of the base and adapters on held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import open_engine
from qlora_kit.cli.generation import BaseOption
from qlora_kit.cli.output import JsonOption, counting, print_json, say, stdout_console

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
    say("loading the base")
    engine = open_engine(base, adapter or (), store)
    with counting("scoring") as bar:

        def show(label: str, done: int, total: int) -> None:
            bar.update(bar.task_ids[0], description=escape(label), completed=done, total=total)

        card = run_evaluation(engine, plan, progress=show)
    if json:
        print_json(card.to_json())
    else:
        stdout_console().print(scorecard_table(card))


def scorecard_table(card: Scorecard) -> Table:
    """One line for each task and adapter, one column for each metric."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{card.base}, {card.split} rows (95 % interval)", "table.title"))
    for column in ("task", "adapter", "metric", "value", "interval", "rows"):
        table.add_column(column, justify="right" if column in ("value", "interval", "rows") else "left")
    previous = None
    for result in card.results:
        pair = (result.task, result.adapter)
        if previous is not None and result.task != previous[0]:
            table.add_section()
        first = pair != previous
        name = "the base" if result.adapter is None else result.adapter
        table.add_row(
            Text(result.task if first else ""),
            Text(f"{name} (off its task)" if first and result.off_task else (name if first else "")),
            Text(result.metric),
            f"{result.value:.3f}",
            f"{result.ci95[0]:.3f} - {result.ci95[1]:.3f}",
            f"{result.n:,}",
        )
        previous = pair
    return table
