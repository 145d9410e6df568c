"""`qlora-kit merge`: an adapter and its base become one checkpoint, verified from the written files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.output import JsonOption, counting_bytes, in_units, print_json, say, stdout_console
from qlora_kit.cli.sampling import BaseOption
from qlora_kit.errors import ConfigError, OutputError
from qlora_kit.units import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_kit.merging import MergeResult, Verification

MIN_SHARD_BYTES = 10**6
MAX_SHARD_BYTES = 10**12


def merge(
    adapter: Annotated[
        str | None, typer.Argument(help="A store name or a folder; with --base-only it may be left out.")
    ] = None,
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
    base_only: Annotated[
        bool,
        typer.Option(
            "--base-only",
            help="Write no merge but the base that adapters were trained on, in 16 bits, for servers that share it; "
            "ADAPTER says how it is quantized, else NF4 with double quantization.",
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of one weight file: 5GB, 500MB, 2GiB.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify the written files.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an occupied folder.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Merge an adapter into its base and verify the result."""
    from qlora_kit.adapters import AdapterStore

    shard_bytes = _shard_bytes(max_shard_size)
    if adapter is None and not base_only:
        raise ConfigError(
            "merge: no adapter is given",
            expected="ADAPTER, or --base-only to write the trained base alone",
            fix="give the name of an adapter (`qlora-kit adapters list`) or its folder",
        )
    folder = None if adapter is None else AdapterStore(store).get(adapter)
    if out.resolve().parent == store.resolve():
        raise OutputError(
            f"{out}: lies in the adapter store {store}, where a whole model is no adapter",
            expected="a folder outside of it",
            fix=f"give another one with --out, such as merged/{out.name}",
        )
    say("writing the trained base" if base_only else f"merging {folder}")
    from qlora_kit.merging import merge_adapter, write_trained_base
    from qlora_kit.merging.onto import parse_onto, parse_onto_of_base

    with counting_bytes("writing") as show:
        if folder is None or base_only:
            parse_onto_of_base(onto)
            result = write_trained_base(
                out,
                base=base,
                adapter=folder,
                verify=verify,
                overwrite=overwrite,
                max_shard_bytes=shard_bytes,
                progress=show,
            )
        else:
            result = merge_adapter(
                folder,
                out,
                base=base,
                onto=parse_onto(onto),
                verify=verify,
                overwrite=overwrite,
                max_shard_bytes=shard_bytes,
                progress=show,
            )
    if json:
        print_json(result.to_json())
    else:
        stdout_console().print(_table(result))


def _shard_bytes(text: str) -> int:
    size_bytes = parse_size(text)
    if size_bytes is None or not MIN_SHARD_BYTES <= size_bytes <= MAX_SHARD_BYTES:
        raise ConfigError(
            f"--max-shard-size is {text!r}",
            expected="a size from 1MB to 1000GB, such as 5GB, 500MB or 2GiB",
            fix="correct it, or leave it out (5GB)",
        )
    return size_bytes


def _table(result: MergeResult) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(result.output_dir), "table.title"), show_header=False)
    if result.already_there:
        table.add_row(
            "already there", "made of the same inputs, its files as they were; nothing was done (--overwrite: again)"
        )
    if result.adapter is None:
        table.add_row("trained base", Text(f"{result.base}, as 4-bit layers compute with it, in 16 bits"))
    else:
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
    changed = "" if result.adapter is None else f", {result.changed_weights:,} numbers changed"
    table.add_row("weights", f"{in_units(result.weight_bytes)}{changed}")
    table.add_row("time and peak memory", f"{result.seconds:.1f} s, {in_units(result.peak_rss_bytes)}")
    if result.verification is None:
        table.add_row("verification", "not done (--no-verify)")
    else:
        _add_verification(table, result.verification, with_adapter=result.adapter is not None)
    return table


def _add_verification(table: Table, found: Verification, *, with_adapter: bool) -> None:
    logits = found.logits
    reference = "base + adapter" if with_adapter else "base in 4 bits"
    table.add_row("verification", "passed")
    table.add_row(f"top-1 agreement with {reference}", f"{logits.top1_agreement:.2%}")
    table.add_row("logit difference, max / mean", f"{logits.max_abs:.2e} / {logits.mean_abs:.2e}")
    table.add_row("one rounding alone, max / mean", f"{found.noise.max_abs:.2e} / {found.noise.mean_abs:.2e}")
    if found.drift is not None and found.drift != logits:
        table.add_row(
            "drift from what was trained, max / mean", f"{found.drift.max_abs:.2e} / {found.drift.mean_abs:.2e}"
        )
    if not with_adapter:
        return
    if isinstance(found.on_rows, str):
        table.add_row("validation rows", f"not measured: {found.on_rows}")
    else:
        trained = found.on_rows.trained_loss
        text = f"{found.on_rows.loss:.4f}" if trained is None else f"{found.on_rows.loss:.4f}, as trained {trained:.4f}"
        table.add_row(f"loss on {found.on_rows.rows} validation rows", text)
    answers = found.answers
    if answers.reason:
        table.add_row("generated answers", f"not checked: {answers.reason}")
    else:
        text = f"{answers.merged:.4g}, unmerged {answers.live:.4g}"
        table.add_row(f"{answers.metric} of {answers.rows} generated answers", text)
