"""`qlora-kit adapters adopt`: an adapter that was trained elsewhere gets a contract, from measurements on its base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapter_card import card_json, quantization_text, short_hash
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.output import JsonOption, print_json, say, stdout_console

if TYPE_CHECKING:
    from rich.table import Table

    from qlora_kit.adoption import Adoption


def adopt_adapter(
    adapter: Annotated[str, typer.Argument(help="A store name or a folder.")],
    *,
    base: Annotated[str | None, typer.Option(help="What it was trained on: tiny, a folder or a Hub id.")] = None,
    trained_in: Annotated[
        Literal["4bit", "16bit"] | None,
        typer.Option(help="How the base was loaded in training; without it, --validation has to show it."),
    ] = None,
    quant_type: Annotated[Literal["nf4", "fp4"] | None, typer.Option(help="Of a 4-bit base; nf4 if not given.")] = None,
    double_quant: Annotated[
        bool | None, typer.Option("--double-quant/--no-double-quant", help="Of a 4-bit base; on if not given.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="One of the kit's tasks or a name of its own; the adapter's if not given.")
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(help="That it was trained with; none if not given.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(help="Rows like those of training, to measure the loss on; repeat for more.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name in the store; the folder's by default.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace the adapter of that name, or an earlier adoption.")
    ] = False,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Measure an adapter trained elsewhere and publish it with a contract."""
    from qlora_kit.adapters import AdapterStore

    say("loading the libraries")
    from qlora_kit.adoption import Claims
    from qlora_kit.adoption import adopt_adapter as adopt

    claims = Claims(
        base=base,
        task=task,
        trained_in=trained_in,
        quant_type=quant_type,
        double_quant=double_quant,
        system_prompt=system_prompt,
        max_new_tokens=max_new_tokens,
        validation=tuple(validation or ()),
    )
    adoption = adopt(adapter, AdapterStore(store), claims, name=name, replace=replace, progress=say)
    for note in adoption.notes:
        say(f"note: {note}")
    if json:
        print_json(_to_json(adoption))
        return
    stdout_console().print(adoption_table(adoption))
    stdout_console().print(f"{adoption.card.name}: adopted into {store}", markup=False)


def _to_json(adoption: Adoption) -> dict[str, Any]:
    return {
        **card_json(adoption.card),
        "adapters": [card_json(adoption.card)],
        "measured": dict(adoption.contract.metrics),
        "not_measured": list(adoption.contract.not_measured),
        "load_in_4bit": adoption.contract.quantization["load_in_4bit"],
        "notes": list(adoption.notes),
    }


def adoption_table(adoption: Adoption) -> Table:
    """What was measured, then what is the adopter's word or a default that stayed, then what is not known."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(adoption.card.name, "table.title"), box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    sections = {
        "measured": _measured_rows(adoption),
        "on your word": _claimed_rows(adoption),
        "not known": {"training": "its data, settings and library versions"},
    }
    for title, rows in sections.items():
        table.add_section()
        table.add_row(Text(title, "bold"))
        for label, value in rows.items():
            table.add_row(Text(f"  {label}"), Text(value))
    return table


def _measured_rows(adoption: Adoption) -> dict[str, str]:
    contract = adoption.contract
    found = contract.metrics
    rows = {
        "layers": f"all {adoption.pairs} pairs fit the base",
        "base at hand": f"fingerprint {short_hash(contract.base.fingerprint)}",
        "effect on logits": f"{found['max_abs_logit_diff']:.2e} at most, {found['mean_abs_logit_diff']:.2e} on average",
        "likeliest token": f"another one at {1 - found['top1_agreement']:.1%} of positions",
        "answers that end": f"{found['stop_rate']:.0%} of {found['probe_answers']} within"
        f" {contract.generation['max_new_tokens']} tokens, the base {found['base_stop_rate']:.0%}",
    }
    if "eval_loss" in found:
        rows["loss, nats/token"] = f"{found['eval_loss']:.4f}, the base {found['base_eval_loss']:.4f}"
        rows["  measured on"] = f"{found['eval_rows']:,} rows, {found['eval_tokens']:,} tokens of answers"
    if "eval_loss_without_system_prompt" in found:
        rows["  without system prompt"] = f"{found['eval_loss_without_system_prompt']:.4f}"
    if "eval_loss_4bit" in found:
        rows["  on 4 / 16 bits"] = f"{found['eval_loss_4bit']:.4f} / {found['eval_loss_16bit']:.4f}"
        rows["trained in"] = "4 bits" if contract.quantization["load_in_4bit"] else "16 bits"
    return rows


def _claimed_rows(adoption: Adoption) -> dict[str, str]:
    contract = adoption.contract
    prompt = "none" if not contract.system_prompt else repr(contract.system_prompt)
    quantization = quantization_text(contract.quantization)
    rows = {
        "base": ("trained on", contract.base.id),
        "chat_template_sha256": ("chat template", "the base's own"),
        "stop_token_ids": ("stop tokens", "the base's own"),
        "quantization": ("base loaded in", quantization),
        "quantization.bnb_4bit_quant_type": ("kind of 4 bits", quantization),
        "system_prompt": ("system prompt", prompt),
        "generation": ("longest answer", f"{contract.generation['max_new_tokens']} tokens"),
        "task": ("task", contract.task),
    }
    return {label: value for key, (label, value) in rows.items() if key in contract.not_measured}
