"""`qlora-kit adapters combine`: several adapters of one base become one, measured on each one's task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapter_card import card_json
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.output import JsonOption, print_json, say, stdout_console

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_kit.combining import Combination


def combine_adapters(
    parts: Annotated[list[str], typer.Argument(metavar="NAME:WEIGHT", help="Store names or folders.")],
    *,
    name: Annotated[str, typer.Option(help="Name of the combination in the store.")],
    method: Annotated[
        str,
        typer.Option(
            metavar="[cat|svd|linear|ties|dare_ties]",
            help="cat: exactly the weighted sum, ranks added up; svd: the nearest to it of --rank; linear, ties and "
            "dare_ties: not the sum, of one rank only.",
        ),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(help="Of svd; the largest of the parts' if not given.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of values that ties and dare_ties keep; 0.5 if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the values that dare_ties drops; 0 if not given.")] = None,
    base: Annotated[str | None, typer.Option(help="To score on, if the contracts' own lies elsewhere now.")] = None,
    score: Annotated[
        bool, typer.Option("--score/--no-score", help="Load the base and score parts and combination on each task.")
    ] = True,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the adapter of that name.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Combine adapters of one base into one, by weights."""
    from typing import cast

    from qlora_kit.adapters import AdapterStore
    from qlora_kit.combining.combine import combine_adapters as combine
    from qlora_kit.combining.combine import to_json
    from qlora_kit.combining.layers import Method
    from qlora_kit.combining.planning import Wishes, parse_part

    wishes = Wishes(cast(Method, method), rank=rank, density=density, seed=seed)  # the plan checks it
    found = combine(
        [parse_part(text) for text in parts],
        AdapterStore(store),
        wishes,
        name=name,
        base=base,
        replace_old=replace,
        score=score,
        progress=say,
    )
    for note in found.notes:
        say(f"note: {note}")
    if json:
        print_json({**card_json(found.card), "adapters": [card_json(found.card)], **to_json(found)})
        return
    if found.scores:
        stdout_console().print(_table(found))
    low, high = found.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    stdout_console().print(f"{found.card.name}: {found.layers} layers, {ranks}; {_distance(found)}", markup=False)
    stdout_console().print(f"{found.card.name}: combined into {store}", markup=False)


def _table(found: Combination) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(found.card.name, "table.title"), box=SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "adapter", "loss", "metric", "value", "stops"):
        table.add_column(column, justify="right" if column in ("loss", "value", "stops") else "left")
    previous = None
    for score in found.scores:
        if previous not in (None, score.rows_of):
            table.add_section()
        previous = score.rows_of
        stops = "" if score.stop_rate is None else f"{score.stop_rate:.0%}"
        row = (score.task, score.adapter, f"{score.loss:.4f}", score.metric, f"{score.value:.4g}", stops)
        table.add_row(*map(Text, row))
    return table


def _distance(found: Combination) -> str:
    if found.largest_difference < 1e-5:
        return "the weighted sum of its parts"
    return f"{found.difference:.1%} off the weighted sum of its parts"
