"""What `doctor --train` trains: a fixed two-layer Qwen2, adapter and batches, the same numbers on every machine.

Every number is a small integer over a power of two, drawn from PCG64's raw stream: exact in bf16, fp16 and fp32 alike,
and independent of numpy's version. So whatever differs from the references was computed differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

LAYERS = 2
HIDDEN_SIZE = 64
INTERMEDIATE_SIZE = 320  # 64 x 320 weights have 320 block scales: more than one block of 256 in double quantization
HEADS = 2
KV_HEADS = 1
HEAD_DIM = HIDDEN_SIZE // HEADS
VOCABULARY = 128
ROPE_THETA = 1e6
RMS_EPSILON = 1e-6
R = 4
LORA_ALPHA = 8
STEPS = 3
LEARNING_RATE = 5e-3
# About as large as the gradients: with the usual 1e-8, a gradient near zero moves its weight by the learning rate up or
# down, as its sign says, and rounding decides the sign.
ADAM_EPSILON = 0.01
IGNORED = -100
LENGTHS = (12, 9)  # tokens of the rows of a batch; the second one is padded
PROMPT_TOKENS = 4
_SEEDS = {"base": 11, "adapter": 12, "batches": 13}


@dataclass(frozen=True)
class Batch:
    """One step's rows, (B, T) each: padded on the right, prompts and padding not supervised."""

    input_ids: Integers
    attention_mask: Integers
    labels: Integers


def model_config() -> dict[str, Any]:
    """The base's ``config.json``."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 64,
        "rope_theta": ROPE_THETA,
        "rms_norm_eps": RMS_EPSILON,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
    }


def linear_shapes() -> dict[str, tuple[int, int]]:
    """The linear layers that are quantized and adapted, name to (out_features, in_features); the head is neither."""
    kv_size = KV_HEADS * HEAD_DIM
    shapes = {
        "self_attn.q_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
        "self_attn.k_proj": (kv_size, HIDDEN_SIZE),
        "self_attn.v_proj": (kv_size, HIDDEN_SIZE),
        "self_attn.o_proj": (HIDDEN_SIZE, HIDDEN_SIZE),
        "mlp.gate_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "mlp.up_proj": (INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "mlp.down_proj": (HIDDEN_SIZE, INTERMEDIATE_SIZE),
    }
    return {f"model.layers.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in shapes.items()}


def base_weights() -> dict[str, Floats]:
    """Every tensor of the base under its name in the checkpoint; exact in bf16."""
    random = np.random.PCG64(_SEEDS["base"])
    weights = {}
    for module, (rows, columns) in linear_shapes().items():
        weights[f"{module}.weight"] = _bell(random, (rows, columns)) / 512  # standard deviation 0.07
        if module.endswith(("q_proj", "k_proj", "v_proj")):
            weights[f"{module}.bias"] = _bell(random, (rows,)) / 1024
    norms = [
        f"model.layers.{layer}.{name}_layernorm" for layer in range(LAYERS) for name in ("input", "post_attention")
    ]
    for name in (*norms, "model.norm"):
        weights[f"{name}.weight"] = 1 + _integers(random, (HIDDEN_SIZE,), 32) / 128
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = _bell(random, (VOCABULARY, HIDDEN_SIZE)) / 256
    return weights


def adapter_weights() -> dict[str, Floats]:
    """The adapter before the first step, not zero: ``<module>.lora_A`` (r, in_features), ``.lora_B`` (out, r)."""
    random = np.random.PCG64(_SEEDS["adapter"])
    weights = {}
    for module, (rows, columns) in linear_shapes().items():
        weights[f"{module}.lora_A"] = _bell(random, (R, columns)) / 512
        weights[f"{module}.lora_B"] = _bell(random, (rows, R)) / 2048
    return weights


def batches() -> tuple[Batch, ...]:
    """One batch for each step."""
    random = np.random.PCG64(_SEEDS["batches"])
    return tuple(_batch(random) for _ in range(STEPS))


def _batch(random: np.random.PCG64) -> Batch:
    shape = (len(LENGTHS), max(LENGTHS))
    lengths = np.array(LENGTHS)[:, None]
    places = np.arange(shape[1])[None, :]
    inside = places < lengths  # (B, T)
    ids = 1 + _raw(random, shape) % (VOCABULARY - 1)
    return Batch(
        input_ids=np.where(inside, ids, 0),
        attention_mask=inside.astype(np.int64),
        labels=np.where(inside & (places >= PROMPT_TOKENS), ids, IGNORED),
    )


def inputs_sha256() -> str:
    """Identifies everything above: the references hold for these inputs only."""
    digest = hashlib.sha256(repr((model_config(), R, LORA_ALPHA, STEPS, LEARNING_RATE, ADAM_EPSILON)).encode())
    arrays: list[Mapping[str, NDArray[Any]]] = [base_weights(), adapter_weights()]
    arrays += [vars(batch) for batch in batches()]
    for group in arrays:
        for name, array in group.items():
            digest.update(f"{name} {array.shape}".encode() + array.astype(f"<{array.dtype.kind}8").tobytes())
    return digest.hexdigest()


def _raw(random: np.random.PCG64, shape: tuple[int, ...]) -> Integers:
    """Uniform integers of 31 bits."""
    return (random.random_raw(int(np.prod(shape))) >> np.uint64(33)).astype(np.int64).reshape(shape)


def _integers(random: np.random.PCG64, shape: tuple[int, ...], bound: int) -> Integers:
    """Integers from -bound to bound, as good as uniform."""
    return _raw(random, shape) % (2 * bound + 1) - bound


def _bell(random: np.random.PCG64, shape: tuple[int, ...]) -> Integers:
    """Integers from -124 to 124, spread like a bell of standard deviation 36."""
    return _integers(random, (4, *shape), 31).sum(axis=0)
