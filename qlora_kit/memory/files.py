"""What the results of a run take on disk, and what merging takes in memory."""

from __future__ import annotations

from collections.abc import Mapping

from qlora_kit.memory.optimizers import FP32_BYTES, optimizer_bytes, paged_bytes
from qlora_kit.memory.parts import adapter_bytes, embedding_bytes, linear_bytes, small_bytes
from qlora_kit.memory.workload import Workload

SIXTEEN_BIT_BYTES = 2
Q8_0_BLOCK, Q8_0_BLOCK_BYTES = 32, 34  # GGUF: 32 numbers in 8 bits and one 16-bit scale
VERIFY_MARGIN = 1.3  # activations, logits, and what loading holds beside the weights


def file_bytes(workload: Workload) -> Mapping[str, int]:
    """Sizes on disk: the adapter, a checkpoint of the run, and the merged model in three formats."""
    parameters = workload.architecture.parameters()
    optimizer = optimizer_bytes(workload) + paged_bytes(workload)
    sixteen_bits = workload.with_(compute_bytes=SIXTEEN_BIT_BYTES, load_in_4bit=True)
    return {
        "adapter": adapter_bytes(workload),
        "checkpoint": adapter_bytes(workload) + optimizer,
        "merged": SIXTEEN_BIT_BYTES * parameters,
        "gguf_q8_0": parameters * Q8_0_BLOCK_BYTES // Q8_0_BLOCK,
        "bnb_4bit": linear_bytes(sixteen_bits) + embedding_bytes(sixteen_bits) + small_bytes(sixteen_bits),
    }


def merge_memory_bytes(workload: Workload) -> Mapping[str, int]:
    """Host memory of a merge: ``write`` takes the largest weight thrice in fp32, ``verify`` the whole model in fp32."""
    architecture = workload.architecture
    largest = max(architecture.vocab_size, architecture.intermediate_size) * architecture.hidden_size
    return {
        "write": 3 * FP32_BYTES * largest,
        "verify": int(VERIFY_MARGIN * FP32_BYTES * architecture.parameters()),
    }
