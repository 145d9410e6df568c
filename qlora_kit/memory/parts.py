"""Bytes that stay the whole run: the frozen base, the adapters, their gradients; each part a formula of its own."""

from __future__ import annotations

from qlora_kit.architecture import Architecture
from qlora_kit.memory.optimizers import FP32_BYTES
from qlora_kit.memory.workload import Workload

BLOCK = 64  # weights that share a scale (bitsandbytes' blocksize)
SCALE_BLOCK = 256  # scales that share a scale, with double quantization
CODE_TABLE_BYTES = 16 * FP32_BYTES  # the 16 values of NF4
SCALE_TABLE_BYTES = 256 * FP32_BYTES  # the 256 values of an 8-bit scale
OFFSET_BYTES = FP32_BYTES


def four_bit_weight_bytes(numbers: int, *, double_quant: bool) -> int:
    """One weight in 4 bits with its scales: 0.5159 bytes a number with double quantization, 0.5625 without.

    Codes n/2; a scale for each 64 weights in fp32, or in 8 bits with an fp32 scale for each 256 of them and one offset;
    and the tables of their values (Dettmers et al. 2023, section 3; bitsandbytes' ``quantize_4bit``).
    """
    blocks = -(-numbers // BLOCK)
    if double_quant:
        scales = blocks + FP32_BYTES * -(-blocks // SCALE_BLOCK) + OFFSET_BYTES + SCALE_TABLE_BYTES
    else:
        scales = FP32_BYTES * blocks
    return -(-numbers // 2) + CODE_TABLE_BYTES + scales


def linear_bytes(workload: Workload) -> int:
    """The linear layers of all blocks, in 4 bits or in the compute dtype."""
    if not workload.load_in_4bit:
        return workload.compute_bytes * linear_weights(workload.architecture)
    return sum(
        kind.layers * four_bit_weight_bytes(kind.out_features * kind.in_features, double_quant=workload.double_quant)
        for kind in workload.architecture.lora_targets().values()
    )


def held_linear_bytes(workload: Workload) -> int:
    """What one process holds of the linear layers: its share, and two whole layers, one in use and one coming."""
    whole = linear_bytes(workload)
    if workload.shards == 1:
        return whole
    gathered = 2 * -(-whole // workload.architecture.layers)
    return min(-(-whole // workload.shards) + gathered, whole)


def embedding_bytes(workload: Workload) -> int:
    """Embedding and head in the compute dtype; a tied head is the embedding (transformers never quantizes them)."""
    architecture = workload.architecture
    return workload.compute_bytes * architecture.vocab_size * architecture.hidden_size * (1 if architecture.tied else 2)


def host_embedding_bytes(workload: Workload) -> int:
    """The part of it that stays in host memory; on a CPU that is the same memory, and nothing is saved."""
    if not workload.embedding_on_host or workload.architecture.tied or workload.device == "cpu":
        return 0
    return embedding_bytes(workload) // 2


def small_bytes(workload: Workload) -> int:
    """Norms and biases in the compute dtype, and the rotary frequencies, which transformers keeps twice in fp32."""
    architecture = workload.architecture
    return workload.compute_bytes * architecture.vector_parameters() + 2 * FP32_BYTES * (architecture.head_dim // 2)


def adapter_bytes(workload: Workload) -> int:
    """The trained weights in fp32, the kit's master copy: 4 bytes each; DoRA adds a magnitude for each output."""
    return FP32_BYTES * (workload.trainable + _magnitudes(workload))


def gradient_bytes(workload: Workload) -> int:
    """Gradients have the shape and dtype of the trained weights, and live from backward to optimizer step."""
    return adapter_bytes(workload)


def largest_linear(architecture: Architecture) -> int:
    """Numbers of the largest weight that is dequantized."""
    return max(kind.out_features * kind.in_features for kind in architecture.lora_targets().values())


def linear_weights(architecture: Architecture) -> int:
    """Numbers in the weights of all blocks' linear layers."""
    return sum(kind.out_features * kind.in_features * kind.layers for kind in architecture.lora_targets().values())


def _magnitudes(workload: Workload) -> int:
    return sum(pair.out_features for block in workload.layers for pair in block) if workload.use_dora else 0
