"""`qlora-kit train`: train one adapter, with progress on stderr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.data import ConfigArgument, OverridesArgument
from qlora_kit.cli.output import JsonOption, counted, in_units, print_json, say, stderr_console, stdout_console
from qlora_kit.cli.training_progress import training_display
from qlora_kit.launched import is_main_process

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult


def train(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    *,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an occupied run folder.")] = False,
    allow_changed: Annotated[
        str,
        typer.Option("--allow-changed", metavar="NAME[,NAME]", help="With --resume: settings that may have changed."),
    ] = "",
    json: JsonOption = False,
) -> None:
    """Train an adapter with QLoRA and leave it in its run folder."""
    from qlora_kit.config import load_config

    run = load_config(config, overrides or ())
    allowed = tuple(name.strip() for name in allow_changed.split(",") if name.strip())
    if not is_main_process():  # of a run of several; the main one speaks for all
        from qlora_kit.training import train as train_adapter

        train_adapter(run, resume=resume, overwrite=overwrite, allow_changed=allowed)
        return
    say(f"{run.name}: loading {run.model.base} and checking the data")
    from qlora_kit.training import train as train_adapter

    with training_display(stderr_console()) as show:
        result = train_adapter(run, resume=resume, overwrite=overwrite, allow_changed=allowed, progress=show)
    plots = _plots(Path(result.output_dir))
    if json:
        print_json(result.to_json())
        return
    validation = "" if result.eval_loss is None else f", validation loss {result.eval_loss:.4f}"
    if result.task_metric is not None:
        validation += f", {run.train.metric_for_best_model} {result.task_metric:.4f}"
    if result.stopped_early:
        validation += f" (stopped early; the adapter of step {result.kept_step} is kept)"
    if result.stop_rate is not None:
        validation += f", {result.stop_rate:.0%} of the answers to validation prompts end by themselves"
    stdout_console().print(
        f"{result.output_dir}: {_course(result)}{validation}, peak memory {in_units(result.peak_bytes)}\n"
        f"{counted(result.rows, 'training row')}; {counted(result.dropped_rows, 'row')} dropped, cut or double"
        f"{f', listed in {result.output_dir}/ledger.jsonl' if result.dropped_rows else ''}\n"
        f"see it: {result.output_dir}/report.html{plots}\n"
        f"publish it: qlora-kit adapters add {result.output_dir}",
        markup=False,
        soft_wrap=True,
    )


def _course(result: TrainResult) -> str:
    """Steps, time, speed and loss; of a run that had nothing left to do, that it was finished."""
    steps = counted(result.steps, "step")
    if result.resumed_from is not None and Path(result.resumed_from).name == f"checkpoint-{result.steps}":
        return f"was already finished, {steps}; nothing was trained"
    return f"{steps} in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s, loss {result.train_loss:.4f}"


def _plots(folder: Path) -> str:
    """Write the curves as PNG files where matplotlib is installed; what to say of them."""
    from qlora_kit.report import can_plot, write_plots

    if not can_plot():
        return ""
    return f" and {counted(len(write_plots(folder)), 'PNG file')} beside it"
