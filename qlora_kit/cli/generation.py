"""`qlora-kit generate`: one prompt, one answer, by the base or an adapter."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import typer

from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.cli.adapters import StoreOption
from qlora_kit.cli.engine import open_engine
from qlora_kit.cli.output import JsonOption, print_json, say

BaseOption = Annotated[
    str | None, typer.Option("--base", help="tiny, a folder, ID or ID@REVISION of the Hub; else the adapter's own.")
]


def generate(
    prompt: Annotated[str, typer.Argument(help="The user's turn; - reads it from stdin.")],
    *,
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
    """Answer one prompt."""
    import sys

    from qlora_kit.errors import ConfigError
    from qlora_kit.formats import Message

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("the prompt is empty", expected="some text", fix="write the prompt in quotes")
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
    turns = [Message("user", text)] if system is None else [Message("system", system), Message("user", text)]
    answer = engine.generate([turns], adapter=name, sampling=sampling)[0]
    if json:
        print_json(asdict(answer))
        return
    print(answer.text)
    if answer.finish_reason == "length":
        say(f"(cut at {answer.completion_tokens} tokens; --max-new-tokens raises the limit)")
