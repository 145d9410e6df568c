"""`qlora-kit push`: a merged model, an adapter or an export to the Hub, with a model card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.output import JsonOption, files_table, print_json, say, stdout_console

if TYPE_CHECKING:
    from qlora_kit.export.push import PushResult


def push(
    folder: Annotated[str, typer.Argument(help="What merge or export wrote, or an adapter (store name or folder).")],
    *,
    to: Annotated[str, typer.Option("--to", help="ORG/NAME on the Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Visible to everybody; private by default.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent, and send nothing.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Add a commit to a repository that is there.")] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Send a model or an adapter to the Hub, with a model card."""
    from qlora_kit.export.push import push_folder

    result = push_folder(folder, to, public=public, dry_run=dry_run, update=update, store=store)
    if json:
        print_json(result.to_json())
    else:
        _show(result)
    if dry_run:
        say("nothing was sent; leave --dry-run out to send it")


def _show(result: PushResult) -> None:
    seen = {True: "private", False: "public", None: "seen by whom it was before"}[result.private]
    sizes = [(file.path, file.bytes) for file in result.files]
    stdout_console().print(files_table(f"{result.repo_id} ({seen})", sizes))
    if result.left_out:
        stdout_console().print(f"not sent: {', '.join(result.left_out)}", markup=False)
    for remark in result.remarks:
        stdout_console().print(f"- {remark}", markup=False)
    if result.sent:
        stdout_console().print(f"sent: {result.url}", markup=False)
    else:
        stdout_console().print(f"\nREADME.md:\n\n{result.card}", markup=False, soft_wrap=True)
