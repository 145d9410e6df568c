"""What the fused path (``train.fast: auto``, ``qlora_kit/fast``) keeps and makes in place of the libraries' layers.

``e`` is the size of a number in the forward pass. Each half of a block is fused where all its linear layers have a LoRA
pair on 4-bit weights; tests count what is kept with ``saved_tensors_hooks``.
"""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.memory.optimizers import FP32_BYTES
from qlora_kit.memory.workload import Pair, Workload

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TILE_LOGITS = 2**26  # of qlora_kit/fast/head.py, which a module of this layer cannot import: it needs torch
_PLACE_BYTES = 16  # two indices of a supervised position


def is_fused(workload: Workload, pairs: Sequence[Pair], half: tuple[str, ...]) -> bool:
    """Whether the half of a block with the linear layers ``half`` takes the fused path."""
    return workload.fast and {pair.module for pair in pairs} >= set(half)


def attention_bytes(workload: Workload, pairs: Sequence[Pair]) -> int:
    """Of the projections: the hidden states before the norm, its factor, and A's outputs. SDPA's own is not in it.

    Rows in one sequence are attended to one by one, so that ``o_proj`` keeps their outputs once more, put together.
    """
    architecture = workload.architecture
    queries = architecture.heads * architecture.head_dim
    copy = workload.compute_bytes * queries * workload.tokens if workload.in_one_row and not workload.masked else 0
    return _half_bytes(workload, pairs, ATTENTION) + copy


def mlp_bytes(workload: Workload, pairs: Sequence[Pair]) -> int:
    """The hidden states before the norm, its factor, gate, up and A's outputs; SiLU and the product are made again."""
    kept = 2 * workload.compute_bytes * workload.architecture.intermediate_size * workload.tokens
    return _half_bytes(workload, pairs, MLP) + kept


def head_bytes(workload: Workload) -> int:
    """Of each supervised position the gradient of its hidden state, and two indices; the last norm is not in it."""
    positions = workload.rows * (workload.length - 1)
    return positions * (workload.compute_bytes * workload.architecture.hidden_size + _PLACE_BYTES)


def loss_bytes(workload: Workload) -> int:
    """Beside ``head_bytes``: the chosen hidden states and a tile of logits; later the gradient in its place.

    A tile is whole rows of logits, which are there twice in fp32 and, where that is less, once in the compute dtype.
    """
    architecture, e = workload.architecture, workload.compute_bytes
    positions = workload.rows * (workload.length - 1)
    rows = min(positions, max(1, TILE_LOGITS // architecture.vocab_size))
    number = 2 * FP32_BYTES + (e if e < FP32_BYTES else 0)
    forward = positions * architecture.hidden_size * e + rows * architecture.vocab_size * number
    cast = e if e < FP32_BYTES else 0
    return max(forward, architecture.hidden_size * (positions * (FP32_BYTES + cast) + workload.tokens * e))


def mlp_backward_bytes(workload: Workload, *, dequantized: int) -> int:
    """Beside a block's activations: three tensors of the MLP's width, or one and a dequantized weight."""
    inner = workload.compute_bytes * workload.architecture.intermediate_size * workload.tokens
    return max(3 * inner, inner + dequantized)


def _half_bytes(workload: Workload, pairs: Sequence[Pair], half: tuple[str, ...]) -> int:
    """What each group of layers with one input keeps; with dropout a mask of its input in bytes for each of them."""
    e, chosen = workload.compute_bytes, [pair for pair in pairs if pair.module in half]
    numbers = e * workload.architecture.hidden_size + FP32_BYTES + e * sum(pair.r for pair in chosen)
    masks = sum(pair.in_features for pair in chosen) if workload.dropout else 0
    return workload.tokens * (numbers + masks)
