"""`qlora-kit adapters`: what is in the store, and how something gets in, out or another name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.contract_file import ADOPTED
from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapter_card import card_json, card_rows
from qlora_kit.cli.output import JsonOption, in_units, print_json, say, stdout_console
from qlora_kit.cli.verb import Verb

if TYPE_CHECKING:
    from qlora_kit.adapters import AdapterCard, AdapterStore

app = typer.Typer(
    help="List, show, add, adopt, combine, rename and delete the adapters of a store.", no_args_is_help=True
)
StoreOption = Annotated[Path, typer.Option("--store", help="The store's folder.")]


@app.command("list", cls=Verb)
def list_adapters(*, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List the store's adapters."""
    if not store.exists():
        say(f"{store}: there is no such folder yet; `adapters add` makes it")
    listing = _store(store).scan()
    if json:
        print_json({"adapters": [card_json(card) for card in listing.cards]})
    else:
        _show_cards(store, listing.cards)
        _tell_origins(listing.cards)
    for problem in listing.problems:
        say(f"left out: {problem}")


@app.command("show", cls=Verb)
def show_adapter(
    adapter: Annotated[str, typer.Argument(help="A store name or a folder.")],
    *,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Show one adapter's contract."""
    details = _store(store).show(adapter)
    if json:
        contract = None if details.contract is None else asdict(details.contract)
        card = card_json(details.card)
        print_json({**card, "contract": contract, "adapters": [card]})
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(details.card.name, "table.title"), box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in card_rows(details).items():
        table.add_row(label, Text(text))
    stdout_console().print(table)


@app.command("add", cls=Verb)
def add_adapter(
    run: Annotated[Path, typer.Argument(help="A finished run folder, or any adapter folder.")],
    *,
    name: Annotated[str | None, typer.Option(help="Name in the store; the folder's by default.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the adapter of that name.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Publish a run's adapter into the store."""
    card = _store(store).add(run, name, replace=replace)
    if card.origin is None:
        say(f"{card.name}: no contract, so every command needs --base; `qlora-kit adapters adopt` writes one")
    _tell(card, f"added to {store}", json=json)


@app.command("rename", cls=Verb)
def rename_adapter(old: str, new: str, *, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Give an adapter another name."""
    _tell(_store(store).rename(old, new), f"renamed from {old}", json=json)


@app.command("delete", cls=Verb)
def delete_adapter(name: str, *, store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Delete an adapter from the store."""
    _store(store).delete(name)
    if json:
        print_json({"deleted": name, "adapters": []})
    else:
        stdout_console().print(f"{name}: deleted from {store}", markup=False)


_COLUMNS = ("name", "task", "base model", "r", "size", "created")
_RIGHT = ("r", "size")
_PLAIN_FROM = 100
"""So many adapters are written as plain lines: rich needs as long for a thousand as reading them."""


def _show_cards(store: Path, cards: Sequence[AdapterCard]) -> None:
    rows = []
    for card in cards:
        day = card.created.partition("T")[0]
        rows.append((card.name, card.task or "", card.base_model or "", str(card.r), in_units(card.bytes), day))
    if len(rows) >= _PLAIN_FROM:
        _show_plain(store, rows)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(store), "table.title"), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right" if column in _RIGHT else "left", overflow="fold")  # names stay whole
    for texts in rows:
        table.add_row(*map(Text, texts))
    stdout_console().print(table)


def _show_plain(store: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """The same columns in lines; a base's name, which may be a long path, is cut."""
    printable = [["".join(c if c.isprintable() else "?" for c in text) for text in row] for row in rows]
    lines = [list(_COLUMNS), *([row[0], row[1], _cut(row[2], 24), *row[3:]] for row in printable)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"{store}: {len(rows)} adapters")
    for line in lines:
        cells = [
            text.rjust(width) if column in _RIGHT else text.ljust(width)
            for text, width, column in zip(line, widths, _COLUMNS, strict=True)
        ]
        print("  ".join(cells).rstrip())


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _tell_origins(cards: Sequence[AdapterCard]) -> None:
    """Which adapters were not trained by this kit."""
    adopted = [card.name for card in cards if card.origin == ADOPTED]
    without = [card.name for card in cards if card.origin is None]
    if adopted:
        stdout_console().print(f"adopted, trained elsewhere: {', '.join(adopted)}", markup=False)
    if without:
        hint = "(`qlora-kit adapters adopt` writes one)"
        stdout_console().print(f"without contract: {', '.join(without)} {hint}", markup=False)


def _store(folder: Path) -> AdapterStore:
    from qlora_kit.adapters import AdapterStore

    return AdapterStore(folder)


def _tell(card: AdapterCard, what: str, *, json: bool) -> None:
    if json:
        print_json({**card_json(card), "adapters": [card_json(card)]})
    else:
        stdout_console().print(f"{card.name}: {what}", markup=False)
