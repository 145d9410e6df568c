"""`qlora-kit merge`: an adapter and its base become one checkpoint, verified from the written files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.generation import BaseOption
from qlora_kit.cli.output import JsonOption, counting, in_units, print_json, say, stdout_console

if TYPE_CHECKING:
    from qlora_kit.merging import MergeResult


def merge(
    adapter: Annotated[str, typer.Argument(help="A store name or a folder.")],
    *,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    base: BaseOption = None,
    onto: Annotated[
        str,
        typer.Option(
            metavar="[dequantized|original|auto]",
            help="The weights to add the adapter to; auto: those it was trained on, unless its validation rows show "
            "that the original ones are better.",
        ),
    ] = "auto",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify the written files.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an occupied folder.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Merge an adapter into its base and verify the result."""
    from qlora_kit.adapters import AdapterStore

    folder = AdapterStore(store).get(adapter)
    say(f"merging {folder}")
    from qlora_kit.merging import merge_adapter
    from qlora_kit.merging.onto import parse_onto

    asked = parse_onto(onto)
    with counting("writing", unit="bytes") as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.update(bar.task_ids[0], completed=done_bytes, total=total_bytes)

        result = merge_adapter(folder, out, base=base, onto=asked, verify=verify, overwrite=overwrite, progress=show)
    if json:
        print_json(result.to_json())
    else:
        _show(result)


def _show(result: MergeResult) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(result.output_dir), "table.title"), show_header=False)
    table.add_row("merged onto", Text(f"{result.base}, {result.onto}"))
    if result.choice is not None:
        table.add_row("chosen", Text(result.choice.reason))
        for name, cost in result.choice.candidates.items():
            live = cost.against_live
            text = f"{cost.loss:.4f}, KL {live.kl:.2e}, top-1 {live.top1_agreement:.2%}"
            table.add_row(f"validation loss onto {name}, against the live adapter", text)
        if result.choice.live_loss is not None:
            table.add_row("validation loss of the live adapter", f"{result.choice.live_loss:.4f}")
    if result.base_match == "nf4_codes":
        table.add_row("base", "the 16-bit model of the 4-bit files that were trained on, by its 4-bit codes")
    table.add_row("weights", f"{in_units(result.weight_bytes)}, {result.changed_weights:,} numbers changed")
    table.add_row("time and peak memory", f"{result.seconds:.1f} s, {in_units(result.peak_rss_bytes)}")
    verification = result.verification
    if verification is None:
        table.add_row("verification", "not done (--no-verify)")
    else:
        logits = verification.logits
        table.add_row("verification", "passed")
        table.add_row("top-1 agreement with base + adapter", f"{logits.top1_agreement:.2%}")
        table.add_row("logit difference, max / mean", f"{logits.max_abs:.2e} / {logits.mean_abs:.2e}")
        if verification.drift is not None:
            drift = verification.drift
            table.add_row("drift from what was trained, max / mean", f"{drift.max_abs:.2e} / {drift.mean_abs:.2e}")
    stdout_console().print(table)
