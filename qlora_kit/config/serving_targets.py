"""What the programs that serve adapters cannot carry: the settings of a LoRA in, refusals by key out; no torch.

vLLM's limits are those of its own source (0.33: ``lora/peft_helper.py``, ``config/lora.py``, ``lora/lora_model.py``).
A GGUF LoRA, which llama.cpp and Ollama load, has one alpha and pairs of factors, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import BeforeValidator

from qlora_kit.architecture import HEAD
from qlora_kit.config.train_section import Problem, as_names, wrong_value
from qlora_kit.errors import Fault

VLLM, LLAMA_CPP, OLLAMA = "vllm", "llama.cpp", "ollama"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM's ``--max-lora-rank`` takes."""
VLLM_HEAD_FAMILIES = ("llama", "qwen3")
"""``model_type`` of the bases whose ``lm_head`` vLLM adapts."""
GGUF_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
"""``model_type`` of the bases that are written as GGUF."""


@dataclass(frozen=True)
class Limits:
    """What a target cannot carry.

    Attributes:
        title: The target's name in messages.
        max_rank: The highest rank; None for any.
        refused: LoRA settings that must be off.
        merged: How a merged model gets there instead.
    """

    title: str
    max_rank: int | None
    refused: tuple[str, ...]
    merged: str


_WHOLE = ("use_dora", "modules_to_save", "bias", "trainable_token_indices")
LIMITS = {
    VLLM: Limits("vLLM", VLLM_RANKS[-1], _WHOLE, "serve the merged model (`qlora-kit merge`)"),
    LLAMA_CPP: Limits(
        "llama.cpp", None, (*_WHOLE, "rank_pattern", "alpha_pattern"), "ship the merged model (`export --to gguf`)"
    ),
    OLLAMA: Limits(
        "Ollama", None, (*_WHOLE, "rank_pattern", "alpha_pattern"), "ship the merged model (`export --to ollama`)"
    ),
}
_EFFECT = {
    "use_dora": "has no DoRA magnitudes",
    "modules_to_save": "has no modules that an adapter brings whole",
    "bias": "has no biases in an adapter",
    "trainable_token_indices": "has no rows of embedding or head in an adapter",
    "rank_pattern": "has one scale for the whole adapter",
    "alpha_pattern": "has one scale for the whole adapter",
}
_OFF: tuple[object, ...] = (None, False, "none", "auto", (), {})


class LoraDescription(Protocol):
    """The settings that matter here, of a config's section ``lora`` or of an adapter's own configuration."""

    @property
    def r(self) -> int:
        """Rank."""

    @property
    def rank_pattern(self) -> Any:
        """Module pattern -> its own rank."""

    @property
    def alpha_pattern(self) -> Any:
        """Module pattern -> its own alpha."""

    @property
    def modules_to_save(self) -> Sequence[str]:
        """Modules saved whole."""

    @property
    def trainable_token_indices(self) -> Any:
        """Trained rows of embedding and head."""

    @property
    def bias(self) -> str:
        """Which biases are trained."""

    @property
    def use_dora(self) -> bool:
        """Whether it is DoRA."""


def _targets(value: object) -> tuple[str, ...]:
    names = as_names(value)
    if not set(names) <= LIMITS.keys():
        raise wrong_value(f"one or more of {', '.join(LIMITS)}", known=LIMITS)
    return names


ServingTargets = Annotated[tuple[str, ...], BeforeValidator(_targets)]


def serving_problems(lora: LoraDescription, targets: Sequence[str]) -> Iterator[Problem]:
    """What of ``lora`` the ``targets`` cannot serve beside its base, by key.

    Args:
        lora: The settings.
        targets: Names in ``LIMITS``.
    """
    for target in targets:
        limits = LIMITS[target]
        values = {
            "use_dora": lora.use_dora,
            "modules_to_save": tuple(lora.modules_to_save),
            "bias": lora.bias,
            "trainable_token_indices": lora.trainable_token_indices,
            "rank_pattern": lora.rank_pattern,
            "alpha_pattern": lora.alpha_pattern,
        }
        for key in limits.refused:
            if values[key] not in _OFF:
                what = f"is {_shown(values[key])}, and {limits.title} {_EFFECT[key]}"
                yield Problem(("lora", key), what, f"an adapter that {limits.title} can serve", _fix(key, target))
        ranks = {"r": lora.r, "rank_pattern": max(lora.rank_pattern.values(), default=0)}
        for key, rank in ranks.items():
            if limits.max_rank is not None and rank > limits.max_rank:
                what = f"asks for rank {rank}, and {limits.title} serves at most {limits.max_rank}"
                yield Problem(("lora", key), what, f"at most {limits.max_rank}", f"lower it, or {limits.merged}")


def base_problems(
    family: str, targets: Sequence[str], *, adapts_head: bool, token_rows: Sequence[str]
) -> Iterator[Problem]:
    """What only a base at hand can tell.

    Args:
        family: Its ``model_type``.
        targets: Names in ``LIMITS``.
        adapts_head: Whether the adapter adapts ``lm_head``.
        token_rows: Modules of which rows are trained beside the adapter.
    """
    for target in targets:
        limits = LIMITS[target]
        if target != VLLM and family not in GGUF_FAMILIES:
            what = f"names {target}, and bases of the type {family} are not written as GGUF"
            expected = f"a base of the types {', '.join(GGUF_FAMILIES)}"
            yield Problem(("target",), what, expected, f"leave {target} out of target, or choose another base")
        if target == VLLM and adapts_head and family not in VLLM_HEAD_FAMILIES:
            what = f"adapts {HEAD}, which vLLM does not for bases of the type {family}"
            fix = f"leave {HEAD} out of lora.target_modules, or {limits.merged}"
            yield Problem(("lora", "target_modules"), what, f"adapted layers without {HEAD}", fix)
        if token_rows:
            what = (
                f"is auto, and the base's stop token was never trained, so that its rows of {', '.join(token_rows)} "
                f"would be trained; {limits.title} {_EFFECT['trainable_token_indices']}"
            )
            fix = f"choose a base that stops by itself (-Instruct), or leave {target} out of target and {limits.merged}"
            yield Problem(("lora", "trainable_token_indices"), what, "a base whose stop token is trained", fix)


def adapter_faults(folder: Path, settings: LoraDescription, target: str) -> list[Fault]:
    """What of an adapter that is trained already ``target`` cannot serve beside its base; a merge is the way on.

    Args:
        folder: The adapter's, for messages.
        settings: Its own configuration.
        target: A name in ``LIMITS``.
    """
    return [
        Fault(f"{folder}: {problem.path[-1]} {problem.what}", problem.expected, LIMITS[target].merged)
        for problem in serving_problems(settings, (target,))
    ]


def vllm_max_rank(rank: int) -> int:
    """The smallest value of ``--max-lora-rank`` that an adapter of this rank fits.

    Raises:
        ValueError: It fits none.
    """
    return min(choice for choice in VLLM_RANKS if choice >= rank)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value) if isinstance(value, tuple) else value)


def _fix(key: str, target: str) -> str:
    off = {"use_dora": "false", "bias": "none", "trainable_token_indices": "null"}.get(key)
    train = f"leave lora.{key} out" if off is None else f"set lora.{key}: {off}"
    return f"{train}; or leave {target} out of target and {LIMITS[target].merged}"
