"""`qlora-kit export`: an adapter, a merged model or a base in the format of another program."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.output import JsonOption, counting_bytes, files_table, print_json, say, stdout_console
from qlora_kit.cli.sampling import BaseOption

if TYPE_CHECKING:
    from qlora_kit.export import ExportResult


def export(
    source: Annotated[
        list[str],
        typer.Argument(help="An adapter (store name or folder), a merged folder or a base; for vllm several adapters."),
    ],
    *,
    to: Annotated[str, typer.Option("--to", help="bnb-4bit, gguf, gguf-lora, ollama, vllm or base.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")],
    quant: Annotated[
        str | None,
        typer.Option("--quant", help="nf4, fp4 (bnb-4bit); f32, f16, bf16, q8_0, q4_0, q4_k_m, ... (gguf, ollama)."),
    ] = None,
    base: BaseOption = None,
    onto: Annotated[
        str,
        typer.Option(
            metavar="[dequantized|original|auto]",
            help="What an adapter is merged onto, or served on; auto: what it was trained on.",
        ),
    ] = "auto",
    check: Annotated[bool, typer.Option("--check", help="Compare with llama.cpp, where its binding is there.")] = False,
    separate: Annotated[bool, typer.Option("--separate", help="ollama: base and adapter as two files.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an occupied folder.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Write a model in another program's format, and verify it."""
    say(f"exporting {', '.join(source)} to {to}")
    from qlora_kit.export import export_model
    from qlora_kit.merging.onto import parse_onto

    with _stages() as show:
        result = export_model(
            source,
            to,
            out,
            quant=quant,
            base=base,
            onto=parse_onto(onto),
            check=check,
            separate=separate,
            store=store,
            overwrite=overwrite,
            progress=show,
        )
    if json:
        print_json(result.to_json())
    else:
        _show(result)


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each stage, the one behind the other; a line for one that is not counted."""
    with ExitStack() as bars:
        shown: dict[str, Callable[[int, int], None]] = {}

        def show(stage: str, done_bytes: int, total_bytes: int) -> None:
            if stage not in shown:
                bars.close()
                if not total_bytes:
                    say(stage)
                    return
                shown[stage] = bars.enter_context(counting_bytes(stage))
            shown[stage](done_bytes, total_bytes)

        yield show


def _show(result: ExportResult) -> None:
    sizes = [(file.path, file.bytes) for file in result.files]
    stdout_console().print(files_table(str(result.output_dir), sizes))
    for text in _verified(result.verification or {}):
        stdout_console().print(text, markup=False)
    for remark in result.remarks:
        stdout_console().print(f"- {remark}", markup=False)
    stdout_console().print(f"{result.seconds:.1f} s", markup=False)


def _verified(found: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, one line each."""
    if "four_bit_weights" in found:
        yield f"verified: {found['four_bit_weights']} weights are their 4-bit round trip, the rest is as it was"
        yield from _rounding(found["second_rounding"])
    elif found.get("checked"):
        yield (
            f"verified in llama.cpp: {found['prompts']} texts with equal token ids, the same template and stop tokens; "
            f"logits differ by {found['max_abs_logit_diff']:.2e} at most, top-1 {found['top1_agreement']:.2%}; asked "
            f"for: {found['bound']}"
        )
    elif found.get("tensors") is not None:
        yield "verified: every weight is its 4-bit round trip, rounded once; the rest is as it was"


def _rounding(cost: Mapping[str, Any]) -> Iterator[str]:
    logits, losses = cost["logits"], cost["losses"]
    yield f"against the 16-bit model: KL {logits['kl']:.2e}, top-1 {logits['top1_agreement']:.2%}"
    if losses is not None:
        base = "" if losses["base"] is None else f"base {losses['base']:.4f}, "
        yield (
            f"loss on {losses['rows']} validation rows: {base}unmerged adapter {losses['live']:.4f}, merged "
            f"{losses['merged']:.4f}, in 4 bits again {losses['rounded']:.4f}"
        )
