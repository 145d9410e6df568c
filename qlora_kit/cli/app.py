"""The `qlora-kit` command: its verbs, and the one place where the kit's errors become messages and exit codes."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qlora_kit.cli import (
    adapters,
    adoption,
    chat,
    combining,
    data,
    doctor,
    evaluation,
    export,
    generation,
    info,
    init,
    merging,
    plan,
    push,
    report,
    serve,
    training,
)
from qlora_kit.cli.verb import Verb
from qlora_kit.errors import QloraKitError
from qlora_kit.launched import is_main_process


class _Verbs(TyperGroup):
    """The verbs; an interruption inside one is told, which Typer leaves out, and ends with 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Verbs,
    help="QLoRA on one consumer GPU: train task adapters, swap them, merge them, and measure each step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(name="doctor", cls=Verb)(doctor.doctor)
app.command(name="init", cls=Verb)(init.init)
app.command(name="info", cls=Verb)(info.info)
app.command(name="plan", cls=Verb)(plan.plan)
app.command(name="data", cls=Verb)(data.check_data)
app.command(name="train", cls=Verb)(training.train)
app.command(name="report", cls=Verb)(report.report)
app.command(name="eval", cls=Verb)(evaluation.evaluate)
app.command(name="generate", cls=Verb)(generation.generate)
app.command(name="chat", cls=Verb)(chat.chat)
app.command(name="serve", cls=Verb)(serve.serve)
app.command(name="merge", cls=Verb)(merging.merge)
app.command(name="export", cls=Verb)(export.export)
app.command(name="push", cls=Verb)(push.push)
adapters.app.command(name="adopt", cls=Verb)(adoption.adopt_adapter)
adapters.app.command(name="combine", cls=Verb)(combining.combine_adapters)
app.add_typer(adapters.app, name="adapters")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with ``arguments`` (None: the process's own) and end the process.

    Exit codes: 0 done, 1 nobody reads the output any more, 2 the user's mistake, 3 a guard stopped the work, 130/143
    interrupted; a bug keeps its traceback.
    """
    _quiet_libraries()
    try:
        app(args=None if arguments is None else list(arguments), prog_name="qlora-kit")
    except QloraKitError as error:
        if not error.told:
            _print_error(error)
        sys.exit(error.exit_code)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"qlora-kit {version('qlora-kit')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end."),
    ] = False,
) -> None:
    pass


def _print_error(error: QloraKitError) -> None:
    """The faults; alike ones stand together, with what was expected and what to do said once."""
    alike: dict[tuple[str, str], list[str]] = {}
    for fault in error.faults:
        alike.setdefault((fault.expected, fault.fix), []).append(fault.what)
    for number, ((expected, fix), whats) in enumerate(alike.items()):
        if number:
            print(file=sys.stderr)
        lines = [*(f"error: {what}" for what in whats), f"  expected: {expected}", f"  do: {fix}"]
        print("\n".join(lines), file=sys.stderr)


def _quiet_libraries() -> None:
    """Keep the libraries' chatter off the terminal; their errors still raise. QLORA_KIT_LOG=INFO shows all of it.

    Of several processes of one run, the main one warns for all.
    """
    default = "WARNING" if is_main_process() else "ERROR"
    level = os.environ.get("QLORA_KIT_LOG", default).upper()
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    if level == default:
        for library in (
            "transformers",
            "trl",
            "peft",
            "bitsandbytes",
            "accelerate",
            "datasets",
            "torch",
            "huggingface_hub",
        ):
            logging.getLogger(library).setLevel(logging.ERROR)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|bitsandbytes|accelerate|torch)(\..*)?$")
