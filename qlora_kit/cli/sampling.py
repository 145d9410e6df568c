"""The options of the verbs that answer prompts, declared once, and the sampling that they ask for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from qlora_kit.cli.output import say

if TYPE_CHECKING:
    from qlora_kit.generation import Sampling

BaseOption = Annotated[
    str | None, typer.Option("--base", help="tiny, a folder, ID or ID@REVISION of the Hub; else the adapter's own.")
]
AdapterOption = Annotated[
    str | None,
    typer.Option("--adapter", help="A store name or a folder; NAME:0.5 and A:0.7+B:0.3 mix; none for the base."),
]
SystemOption = Annotated[str | None, typer.Option("--system", help="System prompt in place of the adapter's.")]
MaxNewTokensOption = Annotated[int | None, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", help="0 is greedy.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Share of the probability to sample from.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Number of tokens to sample from; 0 for all.")]
MinPOption = Annotated[
    float, typer.Option("--min-p", help="Leave out tokens below this share of the likeliest one's probability.")
]
RepetitionPenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", help="Above 1, tokens said before become less likely.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of the sampling.")]


def sampling_of(
    *,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    repetition_penalty: float,
    seed: int | None,
) -> Sampling:
    """What the options ask for; without a limit of their own, ``Sampling``'s stands there. Idle options are told.

    Raises:
        ConfigError: A number is out of its bounds.
    """
    from qlora_kit.generation import Sampling

    sampling = Sampling(
        max_new_tokens=Sampling.max_new_tokens if max_new_tokens is None else max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    given = {"--top-p": top_p != 1, "--top-k": top_k != 0, "--min-p": min_p != 0, "--seed": seed is not None}
    idle = ", ".join(name for name, is_given in given.items() if is_given)
    if temperature == 0 and idle:
        say(f"{idle}: without effect at temperature 0, which takes the likeliest token; --temperature 1 samples")
    return sampling
