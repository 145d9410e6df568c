"""Batched decoding of token ids: prompts in, completions out, in the prompts' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from qlora_kit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Limit of an answer, in tokens.
        temperature: 0 takes the likeliest token (greedy); above 0 samples.
        top_p: Sample from the smallest set of tokens with this share of the probability.
        top_k: Sample from so many likeliest tokens; 0 for all.
        repetition_penalty: Above 1, tokens said before become less likely (Keskar et al. 2019).
        seed: Of the sampling; None leaves torch's generator as it is.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        bounds: dict[str, tuple[bool, str]] = {
            "max_new_tokens": (1 <= self.max_new_tokens <= 131_072, "1 to 131072"),
            "temperature": (0 <= self.temperature <= 10, "0 (greedy) to 10"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (0 <= self.top_k <= 1_000_000, "0 (all tokens) or more"),
            "repetition_penalty": (0.1 <= self.repetition_penalty <= 10, "0.1 to 10"),
            "seed": (self.seed is None or 0 <= self.seed < 2**32, "0 to 4294967295"),
        }
        for name, (fine, expected) in bounds.items():
            if not fine:
                value = vars(self)[name]
                raise ConfigError(f"{name} is {value}", expected=expected, fix=f"choose another {name}")

    def as_generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of transformers' ``generate``."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return arguments


@dataclass(frozen=True)
class Completion:
    """One generated answer: its token ids without the stop token, and whether it ended by itself."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int = 16,
    progress: Callable[[int], None] | None = None,
    interrupt: Callable[[], None] | None = None,
) -> list[Completion]:
    """Decode every prompt; rows of like length share a left-padded batch.

    Args:
        model: A causal language model with the wanted adapter active.
        prompts: Token ids of each prompt, rendered up to where the answer begins.
        sampling: How tokens are chosen.
        stop_token_ids: Tokens that end an answer.
        pad_token_id: Fills shorter rows; never attended to.
        batch_size: Rows at once.
        progress: Called with the number of rows done after each batch.
        interrupt: Called before each batch and after each token; what it raises ends the decoding.

    Returns:
        One completion for each prompt, in their order.
    """
    import torch

    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions: dict[int, Completion] = {}
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            if interrupt is not None:
                interrupt()
            answers = _generate_batch(
                model,
                [prompts[row] for row in rows],
                sampling=sampling,
                stop_token_ids=stop_token_ids,
                pad_token_id=pad_token_id,
                interrupt=interrupt,
            )
            completions.update(zip(rows, answers, strict=True))
            if progress is not None:
                progress(len(completions))
    finally:
        model.train(was_training)
    return [completions[index] for index in range(len(prompts))]


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    interrupt: Callable[[], None] | None,
) -> list[Completion]:
    import torch
    from transformers import GenerationConfig, StoppingCriteriaList

    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[pad_token_id] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    config = GenerationConfig(
        eos_token_id=list(stop_token_ids), pad_token_id=pad_token_id, **sampling.as_generate_arguments()
    )

    def ask(token_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A stopping criterion that stops no row, called after each token."""
        if interrupt is not None:
            interrupt()
        return torch.zeros(token_ids.shape[0], dtype=torch.bool, device=token_ids.device)

    with torch.inference_mode():
        output: torch.Tensor = model.generate(  # (B, longest + new)
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([] if interrupt is None else [ask]),
        )
    return [_completion(row, stop_token_ids) for row in output[:, longest:].tolist()]


def _completion(token_ids: list[int], stop_token_ids: Sequence[int]) -> Completion:
    """What was generated up to the first stop token; without one, the length limit ended it."""
    stops = set(stop_token_ids)
    end = next((index for index, token in enumerate(token_ids) if token in stops), None)
    if end is None:
        return Completion(tuple(token_ids), "length")
    return Completion(tuple(token_ids[:end]), "stop")
