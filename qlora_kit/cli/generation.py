"""`qlora-kit generate`: one prompt or a file of prompts, answered by the base or an adapter."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import open_engine
from qlora_kit.cli.output import JsonOption, print_json, say

if TYPE_CHECKING:
    from qlora_kit.engine import Answer

BaseOption = Annotated[
    str | None, typer.Option("--base", help="tiny, a folder, ID or ID@REVISION of the Hub; else the adapter's own.")
]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The user's turn; - reads it from stdin.")] = None,
    *,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file of prompts: text lines, or rows with the column `prompt`."),
    ] = None,
    base: BaseOption = None,
    adapter: Annotated[str | None, typer.Option(help="A store name or a folder; none for the base.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt in place of the adapter's.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Number of tokens to sample from; 0 for all.")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, tokens said before become less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Answer a prompt, or each prompt of a file."""
    texts = _texts(prompt, prompts)
    from qlora_kit.conversation import Message
    from qlora_kit.generation import Sampling

    sampling = Sampling(
        max_new_tokens=Sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    engine = open_engine(base, (adapter,) if adapter else (), store)
    name = engine.load(adapter) if adapter else None
    if max_new_tokens is None:
        sampling = replace(sampling, max_new_tokens=engine.default_sampling(name).max_new_tokens)
    contract = None if name is None else engine.contract(name)
    if system is not None and contract is not None and (fault := contract.system_prompt_fault(system)) is not None:
        say(f"{name}: {fault}")
    opening = [] if system is None else [Message("system", system)]
    conversations = [[*opening, Message("user", text)] for text in texts]
    answers = engine.generate(conversations, adapter=name, sampling=sampling)
    if not json:
        _show(texts, answers, many=prompts is not None)
    elif prompts is None:
        print_json(asdict(answers[0]))
    else:
        rows = [{"prompt": text, **asdict(answer)} for text, answer in zip(texts, answers, strict=True)]
        print_json({"adapter": name, "answers": rows})


def _texts(prompt: str | None, prompts: Path | None) -> list[str]:
    """The prompts, from the command line, stdin or a file."""
    import sys

    from qlora_kit.errors import ConfigError

    if (prompt is None) == (prompts is None):
        given = "neither a prompt nor --prompts" if prompt is None else "both a prompt and --prompts"
        fix = "write the prompt in quotes, or name a file with --prompts"
        raise ConfigError(f"{given} is given", expected="one of the two", fix=fix)
    if prompts is not None:
        from qlora_kit.data.prompt_file import read_prompts

        return read_prompts(prompts)
    text = sys.stdin.read() if prompt == "-" else str(prompt)
    if not text.strip():
        raise ConfigError("the prompt is empty", expected="some text", fix="write the prompt in quotes")
    return [text]


def _show(texts: list[str], answers: list[Answer], *, many: bool) -> None:
    """The answers; of many, each below its prompt."""
    for text, answer in zip(texts, answers, strict=True):
        if many:
            print(f"> {text}")
        print(answer.text)
        if answer.finish_reason == "length":
            say(f"(cut at {answer.completion_tokens} tokens; --max-new-tokens raises the limit)")
