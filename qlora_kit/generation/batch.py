"""Batched decoding of token ids: prompts in, completions out, in the prompts' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import ConfigError
from qlora_kit.generation.sampling import FinishReason, Sampling

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


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
        sampling: How tokens are chosen; stop strings and logprobs need the engine.
        stop_token_ids: Tokens that end an answer.
        pad_token_id: Fills shorter rows; never attended to.
        batch_size: Rows at once.
        progress: Called with the number of rows done after each batch.
        interrupt: Called before each batch and after each token; what it raises ends the decoding.

    Returns:
        One completion for each prompt, in their order.

    Raises:
        ConfigError: ``sampling`` asks for stop strings or logprobs.
    """
    import torch

    if sampling.stop or sampling.logprobs is not None:
        raise ConfigError(
            f"stop is {sampling.stop} and logprobs is {sampling.logprobs}",
            expected="neither: plain batches know tokens only",
            fix="use Engine.generate",
        )
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

    mixed = torch.autocast(model.device.type, dtype=model.dtype, enabled=_trains_whole_modules(model))
    with torch.inference_mode(), mixed:
        output: torch.Tensor = model.generate(  # (B, longest + new)
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([] if interrupt is None else [ask]),
        )
    return [_completion(row, stop_token_ids) for row in output[:, longest:].tolist()]


def _trains_whole_modules(model: PreTrainedModel) -> bool:
    """Whether the adapter brings whole modules in another dtype than the base's 16 bits, as ``modules_to_save`` are.

    They were trained in mixed precision, and without it a matrix does not take what the one before it gives.
    """
    return model.dtype.itemsize == 2 and any(
        parameter.dtype != model.dtype for name, parameter in model.named_parameters() if ".modules_to_save." in name
    )


def _completion(token_ids: list[int], stop_token_ids: Sequence[int]) -> Completion:
    """What was generated up to the first stop token; without one, the length limit ended it."""
    stops = set(stop_token_ids)
    end = next((index for index, token in enumerate(token_ids) if token in stops), None)
    if end is None:
        return Completion(tuple(token_ids), "length")
    return Completion(tuple(token_ids[:end]), "stop")
