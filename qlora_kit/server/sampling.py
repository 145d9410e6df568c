"""From a request's fields to the engine's requests: sampling on top of the contract's defaults, one seed a choice."""

from __future__ import annotations

from dataclasses import replace

from qlora_kit.engine import Request
from qlora_kit.generation import Sampling
from qlora_kit.generation.sampling import MAX_SEED
from qlora_kit.server.request_schema import GenerationFields

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")


def sampling_of(
    fields: GenerationFields, defaults: Sampling, *, max_new_tokens: int | None, logprobs: int | None
) -> Sampling:
    """``defaults`` with what the request sets.

    Args:
        fields: The request.
        defaults: As the adapter's contract says.
        max_new_tokens: The request's own limit.
        logprobs: So many alternatives of each token are wanted; None for no log probabilities.
    """
    values = vars(fields)
    given = {name: values[name] for name in _NAMES if values[name] is not None}
    if max_new_tokens is not None:
        given["max_new_tokens"] = max_new_tokens
    return replace(defaults, **given, stop=fields.stop, logprobs=logprobs)


def choices_of(request: Request, n: int | None) -> list[Request]:
    """The request once for each choice; one that gives a seed goes on counting from it."""
    sampling = request.sampling
    if sampling is None or sampling.seed is None:
        return [request] * (n or 1)
    seeds = [(sampling.seed + index) % (MAX_SEED + 1) for index in range(n or 1)]
    return [replace(request, sampling=replace(sampling, seed=seed)) for seed in seeds]
