"""`qlora-kit plan`: what a run takes in memory, whether it fits a card, and the settings that do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.data import ConfigArgument, OverridesArgument
from qlora_kit.cli.output import JsonOption, in_units, print_json, stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from qlora_kit.memory import Plan, Suggestion
    from qlora_kit.memory.workload import Workload

BAR_CELLS = 38
_FILES = {
    "adapter": "adapter on disk",
    "checkpoint": "checkpoint on disk",
    "merged": "merged model, 16 bits",
    "gguf_q8_0": "merged model, GGUF Q8_0",
    "bnb_4bit": "merged model, bnb 4 bits",
}


def plan(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help='A size such as 24GiB or a name such as "RTX 4090"; default: the GPU here.'),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Predict a run's peak memory, from the base's config.json alone, and say what fits and what is faster."""
    from qlora_kit.config import load_config
    from qlora_kit.memory import estimate_memory
    from qlora_kit.memory.cards import card_at_hand, find_card

    run = load_config(config, overrides or ())
    found = estimate_memory(run, card_at_hand() if gpu is None else find_card(gpu))
    if json:
        print_json(found.to_json())
    else:
        _show(stdout_console(), run.name, run.model.base, found)


def _show(console: Console, name: str, base: str, plan: Plan) -> None:
    from rich.markup import escape

    from qlora_kit.memory.estimate import MARGIN

    workload, card = plan.workload, plan.card
    console.print(f"[bold]{escape(name)}[/bold]: {escape(base)} on {escape(card.name)}", soft_wrap=True)
    console.print(
        f"{workload.batch_size} x {workload.length:,} tokens, {workload.effective_batch} rows a step, "
        f"{_recomputed(workload)}, {workload.optim}"
    )
    console.print("[bold]predicted, not measured[/bold]; each row as long as max_length\n")
    _show_parts(console, plan)
    free = f"{in_units(card.free_bytes)}{' free' if card.used_bytes else ''}"
    verdict = "[green]fits[/green]" if plan.fits else "[bold red]does not fit[/bold red]"
    console.print(f"{'peak':<28}{in_units(plan.estimate.peak_bytes):>11}")
    console.print(f"{f'margin, {MARGIN:.0%}':<28}{in_units(plan.estimate.margin_bytes):>11}")
    console.print(f"{'needed':<28}{in_units(plan.estimate.needed_bytes):>11}  {verdict} into {free}\n")
    console.print(f"longest max_length with these settings: {_length(plan)}")
    console.print(f"gradient checkpointing: {_checkpointing(plan)}")
    if plan.tokens_per_second is not None:
        console.print(f"ceiling of this card: {plan.tokens_per_second:,.0f} tokens/s; real runs stay below it")
    for suggestion in plan.suggestions:
        _show_suggestion(console, suggestion)
    if plan.smallest is not None:
        _show_smallest(console, plan, plan.smallest)
    _show_files(console, plan)
    for note in plan.estimate.notes:
        console.print(f"note: {note}", markup=False)


def _recomputed(workload: Workload) -> str:
    if not workload.recomputed:
        return "no checkpointing"
    all_layers = workload.recomputed == len(workload.layers)
    return "checkpointing" if all_layers else f"checkpointing of {workload.recomputed} layers"


def _show_parts(console: Console, plan: Plan) -> None:
    """One line a part; the bar is its share of the card, or of the peak where that is more."""
    whole = max(plan.estimate.peak_bytes, plan.card.free_bytes)
    for part, size in plan.estimate.breakdown.items():
        bar = "█" * round(BAR_CELLS * size / whole) or ("▏" if size else "")
        console.print(f"{part:<28}{in_units(size):>11}  {bar}", markup=False)
    for part, size in plan.estimate.on_host.items():
        console.print(f"{part:<28}{in_units(size):>11}", markup=False)


def _length(plan: Plan) -> str:
    longest = plan.longest_max_length
    if not longest:
        return "none fits"
    whole = longest >= plan.workload.architecture.context_length
    return f"{longest:,} tokens{', all that the base takes' if whole else ''}"


def _checkpointing(plan: Plan) -> str:
    """Of how many layers it may be left off, with the other settings as they are."""
    kept, layers = plan.uncheckpointed_layers, len(plan.workload.layers)
    if kept is None:
        return "of all layers, and that is not enough"
    return "can be left off" if kept == layers else f"needed, of {layers - kept} of the {layers} layers"


def _show_smallest(console: Console, plan: Plan, smallest: Suggestion) -> None:
    """Where nothing fits: how little it could take, and what would hold that."""
    from qlora_kit.memory.estimate import estimate

    needed = estimate(smallest.workload).needed_bytes
    console.print(f"\n[bold]nothing fits into {in_units(plan.card.free_bytes)}[/bold]", highlight=False)
    rows = f"rows of {smallest.workload.length:,} tokens need at least {in_units(needed)}, margin counted"
    console.print(rows + (":" if smallest.changes else ", as this config is"), markup=False)
    for line in smallest.yaml_lines if smallest.changes else ():
        console.print(f"  {line}", markup=False)
    card = plan.smallest_card
    larger = "" if card is None else f"{card.name} ({in_units(card.memory_bytes)}) or larger, or "
    console.print(f"even rows of one token need {in_units(plan.least_bytes)}", markup=False)
    console.print(f"what would do: {larger}a smaller base", markup=False)


def _show_suggestion(console: Console, suggestion: Suggestion) -> None:
    speed = suggestion.tokens_per_second
    ceiling = "" if speed is None else f", at most {speed:,.0f} tokens/s"
    console.print(f"\n[bold]{suggestion.why}[/bold]")
    console.print(f"({in_units(suggestion.peak_bytes)}{ceiling}):", markup=False)
    for line in suggestion.yaml_lines:
        console.print(f"  {line}", markup=False)


def _show_files(console: Console, plan: Plan) -> None:
    from qlora_kit.memory.files import file_bytes, merge_memory_bytes

    sizes = file_bytes(plan.workload)
    memory = merge_memory_bytes(plan.workload)
    console.print("\n[bold]afterwards[/bold]")
    for key, words in _FILES.items():
        console.print(f"{words:<28}{in_units(sizes[key]):>11}")
    console.print(f"{'memory to merge, to verify':<28}{in_units(memory['write']):>11}, {in_units(memory['verify'])}")
