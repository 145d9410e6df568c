"""`qlora-kit info`: what a base is made of, where its answers end and what LoRA takes, without loading weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_kit.cli.output import JsonOption, print_json, stdout_console

if TYPE_CHECKING:
    from qlora_kit.architecture import Architecture
    from qlora_kit.data.template_file import StopFacts


def info(
    model: Annotated[
        str, typer.Argument(help="`tiny`, a folder, or ID or ID@REVISION of the Hub.", metavar="MODEL")
    ] = "tiny",
    *,
    r: Annotated[int, typer.Option("--r", min=1, help="LoRA rank to count trainable parameters for.")] = 16,
    json: JsonOption = False,
) -> None:
    """Describe a base from its small files: sizes, parameters, template and stop tokens, LoRA's targets."""
    from qlora_kit.architecture import read_architecture
    from qlora_kit.base_files import read_model_config, resolve_description
    from qlora_kit.data.template_file import read_stop_facts

    ref = resolve_description(model)
    config = read_model_config(ref)
    architecture = read_architecture(config, where=str(ref.path / "config.json"))
    stops = read_stop_facts(ref.path, config)
    differences = _weight_differences(architecture, ref.path)
    quantization = _quantization(config, where=str(ref.path / "config.json"))
    if json:
        print_json({**_as_json(architecture, stops, differences, r=r), "quantization": quantization})
    else:
        _show(ref.id, architecture, stops, differences=differences, quantization=quantization, r=r)


def _quantization(config: dict[str, Any], *, where: str) -> str | None:
    """How the base's files are quantized already, or why the kit does not take them; None for plain weights."""
    from qlora_kit.errors import BaseModelError
    from qlora_kit.prequantized import read_prequantization

    try:
        held = read_prequantization(config, where=where)
    except BaseModelError as error:
        return error.faults[0].what
    if held is None:
        return None
    return f"4 bits already: bitsandbytes {held.quant_type}{', double quantization' if held.double_quant else ''}"


def _weight_differences(architecture: Architecture, folder: Path) -> tuple[str, ...] | None:
    """How the weight files differ from the config; None where there are none. Files that cannot be read differ too."""
    from qlora_kit.architecture import weight_differences
    from qlora_kit.errors import BaseModelError
    from qlora_kit.prequantized import read_packed_weights
    from qlora_kit.safetensors_header import locate_tensors

    if not any(folder.glob("*.safetensors")):
        return None
    try:
        tensors = locate_tensors(folder, error=BaseModelError)
        read_packed_weights(tensors)
        return weight_differences(architecture, tensors)
    except BaseModelError as error:
        return tuple(fault.what for fault in error.faults)


def _as_json(
    architecture: Architecture, stops: StopFacts, differences: tuple[str, ...] | None, *, r: int
) -> dict[str, Any]:
    facts = asdict(architecture)
    return {
        "architecture": facts.pop("name"),
        "parameters": architecture.parameters(),
        "parameters_by_part": architecture.parameters_by_part(),
        **facts,
        "r": r,
        "trainable_parameters": sum(target.trainable(r) for target in architecture.lora_targets().values()),
        "lora_targets": {
            name: {
                "out": target.out_features,
                "in": target.in_features,
                "layers": target.layers,
                "trainable": target.trainable(r),
            }
            for name, target in architecture.lora_targets().items()
        },
        "chat_template": stops.has_template,
        "stop_tokens": [] if stops.token is None else [stops.token],
        "stop_token_ids": [] if stops.token_id is None else [stops.token_id],
        "stop_problem": stops.problem,
        "generation_stop_ids": list(stops.generation_ids),
        "stops_agree": stops.agree,
        "weights_agree": None if differences is None else not differences,
        "weight_differences": list(differences or ()),
    }


def _show(
    name: str,
    architecture: Architecture,
    stops: StopFacts,
    *,
    differences: tuple[str, ...] | None,
    quantization: str | None,
    r: int,
) -> None:
    from rich.markup import escape
    from rich.tree import Tree

    targets = architecture.lora_targets()
    trainable = sum(target.trainable(r) for target in targets.values())
    total = architecture.parameters()
    sections = {
        f"parameters  {total:,}": _part_lines(architecture),
        "shape": _shape_lines(architecture),
        "positions": _position_lines(architecture),
        "weights": _weight_lines(architecture, differences, quantization),
        "turns": _stop_lines(stops),
        f"LoRA, r = {r}: {trainable:,} trainable ({trainable / total:.2%})": [
            f"{target:<10} {shape.out_features:>7,} x {shape.in_features:<7,} in {shape.layers} layers"
            f" {shape.trainable(r):>13,}"
            for target, shape in targets.items()
        ],
    }
    tree = Tree(f"[bold]{escape(name)}[/bold]  {escape(architecture.name)}")
    for title, lines in sections.items():
        branch = tree.add(f"[bold]{title}[/bold]")
        for line in lines:
            branch.add(escape(line))
    stdout_console().print(tree)


def _part_lines(architecture: Architecture) -> list[str]:
    total = architecture.parameters()
    lines = [
        f"{part:<10} {count:>15,} {count / total:>7.1%}" for part, count in architecture.parameters_by_part().items()
    ]
    return [*lines[:-1], f"{'head':<10} {'the embedding':>15}"] if architecture.tied else lines


def _shape_lines(architecture: Architecture) -> list[str]:
    shared = "" if architecture.heads == architecture.kv_heads else ", shared in groups"
    return [
        f"{architecture.layers} layers, hidden size {architecture.hidden_size:,},"
        f" MLP {architecture.intermediate_size:,}",
        f"{architecture.heads} query heads, {architecture.kv_heads} key/value heads{shared},"
        f" {architecture.head_dim} wide",
        f"vocabulary {architecture.vocab_size:,}, head {'tied to the embedding' if architecture.tied else 'untied'}",
    ]


def _position_lines(architecture: Architecture) -> list[str]:
    rope = ", ".join(f"{key} {value}" for key, value in architecture.rope.items())
    lines = [f"context {architecture.context_length:,} tokens", f"rope: {rope}"]
    if architecture.sliding_window is not None:
        lines.append(f"attention looks back {architecture.sliding_window:,} tokens")
    return lines


def _weight_lines(
    architecture: Architecture, differences: tuple[str, ...] | None, quantization: str | None
) -> list[str]:
    lines = [f"dtype {architecture.dtype or 'not given'}", *([] if quantization is None else [quantization])]
    if differences is None:
        return [*lines, "no weight files here: counted from config.json alone"]
    if not differences:
        return [*lines, "the headers of the weight files agree with config.json"]
    return [*lines, "the weight files do NOT agree with config.json:", *differences]


def _stop_lines(stops: StopFacts) -> list[str]:
    ids = ", ".join(str(token) for token in stops.generation_ids) or "nothing"
    lines = [
        f"a turn ends with {stops.token} (id {stops.token_id})" if stops.problem is None else stops.problem,
        f"transformers' generate stops at: {ids}",
    ]
    if stops.agree is False:
        lines.append("they do NOT agree: perhaps a base that was never taught to end a turn")
    return lines
