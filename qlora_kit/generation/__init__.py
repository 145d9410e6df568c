"""Decoding: how tokens are chosen, whole batches by transformers, and the parts of the engine's own decoding loop."""

from qlora_kit.generation.batch import Completion, generate
from qlora_kit.generation.detokenising import TextStream
from qlora_kit.generation.sampling import FinishReason, Sampling
from qlora_kit.generation.token_choice import TokenChoice, TokenLogprob, greedy_tokens, token_logprob

__all__ = [
    "Completion",
    "FinishReason",
    "Sampling",
    "TextStream",
    "TokenChoice",
    "TokenLogprob",
    "generate",
    "greedy_tokens",
    "token_logprob",
]
