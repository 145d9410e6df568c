"""How an answer's tokens are chosen and where it ends: checked settings, in the words of transformers' ``generate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from qlora_kit.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled"]
MAX_NEW_TOKENS = 131_072
MAX_TOP_K = 1_000_000
REPETITION_PENALTIES = (0.1, 10.0)
MAX_SEED = 2**32 - 1
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 256
MAX_LOGPROBS = 20


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
        min_p: Sample from tokens at least so likely as this share of the likeliest (Nguyen et al. 2024); 0 for all.
        stop: Texts that end an answer; it comes without them.
        logprobs: For each token its log-probability under the model, before any of the above, and those of so many
            likeliest tokens; None for neither.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        least, most = REPETITION_PENALTIES
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) for text in self.stop)
        bounds: dict[str, tuple[bool, str]] = {
            "max_new_tokens": (1 <= self.max_new_tokens <= MAX_NEW_TOKENS, f"1 to {MAX_NEW_TOKENS}"),
            "temperature": (0 <= self.temperature <= 10, "0 (greedy) to 10"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "top_k": (0 <= self.top_k <= MAX_TOP_K, f"0 (all tokens) to {MAX_TOP_K}"),
            "repetition_penalty": (least <= self.repetition_penalty <= most, f"{least:g} to {most:g}"),
            "seed": (self.seed is None or 0 <= self.seed <= MAX_SEED, f"0 to {MAX_SEED}"),
            "min_p": (0 <= self.min_p <= 1, "0 (all tokens) to 1"),
            "stop": (
                texts
                and len(self.stop) <= MAX_STOPS
                and all(0 < len(text) <= MAX_STOP_CHARACTERS for text in self.stop),
                f"a tuple of at most {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters",
            ),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"None, or 0 to {MAX_LOGPROBS}"),
        }
        for name, (fine, expected) in bounds.items():
            if not fine:
                value = vars(self)[name]
                raise ConfigError(f"{name} is {value}", expected=expected, fix=f"choose another {name}")

    def as_generate_arguments(self) -> dict[str, Any]:
        """Keyword arguments of transformers' ``generate``; it knows neither ``stop`` nor ``logprobs``."""
        arguments: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.temperature > 0:
            arguments |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
            if self.min_p > 0:
                arguments["min_p"] = self.min_p
        return arguments
