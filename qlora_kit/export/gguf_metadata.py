"""A model's shape and rotary embedding as a GGUF file says them, and what llama.cpp cannot say refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.architecture import Architecture, read_architecture
from qlora_kit.errors import BaseModelError, Fault
from qlora_kit.export.gguf_names import ARCHITECTURES
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    from gguf import GGUFWriter

ROPE_FREQUENCIES = "rope_freqs.weight"
_DEFAULT_NORM_EPSILON = 1e-6
_PLAIN_ROPE = {"rope_type", "rope_theta"}
# Settings of each kind that are written; any other one that is set would be lost.
_ROPE_SETTINGS: dict[str, set[str]] = {
    "default": _PLAIN_ROPE,
    "linear": _PLAIN_ROPE | {"factor"},
    "llama3": _PLAIN_ROPE | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _PLAIN_ROPE
    | {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
    | {"mscale_all_dim"},
}
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
_HARMLESS: dict[str, Any] = {"partial_rotary_factor": 1.0, "truncate": True}
_FIX = "export as bnb-4bit or for vLLM, which read config.json itself"


@dataclass(frozen=True)
class GgufModel:
    """A model that llama.cpp can compute.

    Attributes:
        architecture: Its shape.
        norm_epsilon: Of its RMS norms.
        context_length: Positions over which llama.cpp computes the same: a sliding window ends them.
        rope_factors: By which each rotary frequency is divided; None where all are left as they are.
    """

    architecture: Architecture
    norm_epsilon: float
    context_length: int
    rope_factors: tuple[float, ...] | None

    def write_to(self, writer: GGUFWriter) -> None:
        """Add the keys to a file's header."""
        from gguf import RopeScalingType

        shape = self.architecture
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(shape.hidden_size)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.intermediate_size)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_layer_norm_rms_eps(self.norm_epsilon)
        writer.add_vocab_size(shape.vocab_size)
        writer.add_rope_dimension_count(shape.head_dim)
        writer.add_rope_freq_base(float(shape.rope["rope_theta"]))
        kind = shape.rope["rope_type"]
        if kind == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(shape.rope["factor"]))
        elif kind == "yarn":
            self._write_yarn(writer)

    def _write_yarn(self, writer: GGUFWriter) -> None:
        """YaRN (https://arxiv.org/abs/2309.00071): llama.cpp multiplies its own 0.1 ln(s) + 1 by the file's factor."""
        from gguf import RopeScalingType

        rope = self.architecture.rope
        factor = float(rope["factor"])
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
        writer.add_rope_scaling_attn_factors(_yarn_attention_factor(rope) / _magnitude(factor))


def read_gguf_model(config: Mapping[str, Any], *, where: str) -> GgufModel:
    """What a GGUF file has to say of the model that a ``config.json`` describes.

    Args:
        config: The file's content.
        where: The file, for messages.

    Raises:
        BaseModelError: The family is none that is written, the sizes are wrong, or llama.cpp computes otherwise; with
            every fault found.
    """
    shape = read_architecture(config, where=where)
    faults = [*_activation_faults(config, where), *_norm_faults(config, where), *_rope_faults(shape, where)]
    if faults:
        raise BaseModelError.of(faults)
    window = shape.sliding_window
    return GgufModel(
        architecture=shape,
        norm_epsilon=float(config.get("rms_norm_eps", _DEFAULT_NORM_EPSILON)),
        context_length=shape.context_length if window is None else min(window, shape.context_length),
        rope_factors=_llama3_factors(shape) if shape.rope["rope_type"] == "llama3" else None,
    )


def _activation_faults(config: Mapping[str, Any], where: str) -> list[Fault]:
    activation = config.get("hidden_act", "silu")
    if activation == "silu":
        return []
    return [Fault(f"{where}: hidden_act is {shown(str(activation))}", "silu, as llama.cpp computes it", _FIX)]


def _norm_faults(config: Mapping[str, Any], where: str) -> list[Fault]:
    epsilon = config.get("rms_norm_eps", _DEFAULT_NORM_EPSILON)
    if _is_positive(epsilon):
        return []
    what = f"{where}: rms_norm_eps is {shown(str(epsilon))}"
    return [Fault(what, "a number above 0", "copy or download the base's config.json again")]


def _rope_faults(shape: Architecture, where: str) -> list[Fault]:
    rope = shape.rope
    kind = rope["rope_type"]
    if kind not in _ROPE_SETTINGS or (kind == "llama3" and ARCHITECTURES[shape.family] != "llama"):
        known = [name for name in _ROPE_SETTINGS if name != "llama3" or ARCHITECTURES[shape.family] == "llama"]
        what = f"{where}: the rotary embedding is scaled by {shown(str(kind))}"
        return [Fault(what, f"for {shape.family} one of {', '.join(known)}", _FIX)]
    faults = [
        Fault(f"{where}: {key} of the rotary embedding is {rope.get(key)!r}", "a number above 0", _FIX)
        for key in ("rope_theta", *_REQUIRED.get(kind, ()))
        if not _is_positive(rope.get(key))
    ]
    faults += [
        Fault(f"{where}: {key} of the rotary embedding is {shown(str(rope[key]))}", "a number, or left out", _FIX)
        for key in _OPTIONAL
        if rope.get(key) is not None and rope[key] != 0 and not _is_positive(rope[key])
    ]
    faults += [
        Fault(f"{where}: the rotary embedding has {shown(key)} set, which a GGUF file cannot say", "left out", _FIX)
        for key, value in rope.items()
        if key not in _ROPE_SETTINGS[kind] and value is not None and _HARMLESS.get(key) != value
    ]
    return faults


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _magnitude(factor: float, weight: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """What queries and keys are multiplied by, as transformers computes it (``_compute_yarn_parameters``)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor, weight, weight_all = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")
    if weight and weight_all:
        return _magnitude(factor, weight) / _magnitude(factor, weight_all)
    return _magnitude(factor)


def _llama3_factors(shape: Architecture) -> tuple[float, ...]:
    """Llama 3.1's scaling: short wavelengths are kept, long ones divided, those between in part.

    As ``_compute_llama3_parameters`` of transformers and ``generate_extra_tensors`` of llama.cpp's converter do it.
    """
    rope = shape.rope
    factor, low, high = (float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    context = float(rope["original_max_position_embeddings"])
    factors = []
    for index in range(0, shape.head_dim, 2):
        wavelength = 2 * math.pi * float(rope["rope_theta"]) ** (index / shape.head_dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)
