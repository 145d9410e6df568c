"""What each optimizer keeps for a trained number, by transformers' names of the optimizers."""

from __future__ import annotations

from dataclasses import dataclass

from qlora_kit.memory.workload import Workload

FP32_BYTES = 4
BLOCK = 256  # bitsandbytes quantizes state in blocks of 256 numbers with one fp32 scale each
LEAST_8BIT = 4096  # smaller tensors keep fp32 state (`min_8bit_size`)
LEAST_PAGED = 100_000  # smaller tensors are not paged (bitsandbytes' `get_state_buffer`)


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps.

    Attributes:
        moments: Numbers kept for each trained number.
        in_8_bits: Whether they are quantized to 8 bits.
        paged: Whether they may move to the host: bitsandbytes' managed memory, outside of torch's count.
        factored: Adafactor: rows and columns in place of the second moment.
        counters: fp32 scalars beside each tensor: torch.optim counts steps, Adafactor keeps a mean square.
        step_temporaries: Copies of all trained numbers while it steps: torch's foreach AdamW on a GPU.
    """

    moments: int
    in_8_bits: bool = False
    paged: bool = False
    factored: bool = False
    counters: int = 0
    step_temporaries: int = 0


OPTIMIZERS: dict[str, OptimizerState] = {
    "adamw_torch": OptimizerState(2, counters=1, step_temporaries=2),
    "adamw_torch_fused": OptimizerState(2, counters=1),
    "adamw_8bit": OptimizerState(2, in_8_bits=True),
    "adamw_bnb_8bit": OptimizerState(2, in_8_bits=True),
    "paged_adamw": OptimizerState(2, paged=True),
    "paged_adamw_32bit": OptimizerState(2, paged=True),
    "paged_adamw_8bit": OptimizerState(2, in_8_bits=True, paged=True),
    "adafactor": OptimizerState(0, factored=True, counters=1),
    "sgd": OptimizerState(0),
    "adagrad": OptimizerState(1, counters=1, step_temporaries=2),
    "rmsprop": OptimizerState(1, counters=1, step_temporaries=2),
    "lion_32bit": OptimizerState(1),
    "lion_8bit": OptimizerState(1, in_8_bits=True),
    "paged_lion_32bit": OptimizerState(1, paged=True),
    "paged_lion_8bit": OptimizerState(1, in_8_bits=True, paged=True),
    "ademamix": OptimizerState(3),
    "ademamix_8bit": OptimizerState(3, in_8_bits=True),
    "paged_ademamix_32bit": OptimizerState(3, paged=True),
    "paged_ademamix_8bit": OptimizerState(3, in_8_bits=True, paged=True),
}
UNKNOWN = OPTIMIZERS["adamw_torch"]
"""What any other optimizer is counted as."""


def state_of(optim: str) -> OptimizerState:
    """The entry of ``optim``; of one that is not in the table, plain AdamW's."""
    return OPTIMIZERS.get(optim, UNKNOWN)


def optimizer_bytes(workload: Workload) -> int:
    """State on the training device, after the first step.

    Paged state of a GPU is left out: it moves to the host when room is short. Sources: torch.optim's ``AdamW``,
    bitsandbytes' ``Optimizer2State.init_state``, transformers' ``Adafactor._get_options``.
    """
    return _state_bytes(workload, pages=workload.device == "cuda")


def paged_bytes(workload: Workload) -> int:
    """State that may move to the host: 0 but for a paged optimizer on a GPU."""
    state = state_of(workload.optim)
    if not state.paged or workload.device != "cuda":
        return 0
    return _state_bytes(workload, pages=False) - optimizer_bytes(workload)


def step_bytes(workload: Workload) -> int:
    """Temporaries of an optimizer step; activations are gone by then."""
    state = state_of(workload.optim)
    return FP32_BYTES * state.step_temporaries * workload.trainable


def _state_bytes(workload: Workload, *, pages: bool) -> int:
    """Of A (r, in) and B (out, r) of each pair, and of what is trained whole, taken as one tensor."""
    state = state_of(workload.optim)
    total = _tensor_bytes(state, (workload.trained_whole, 1), pages=pages) if workload.trained_whole else 0
    for block, count in workload.kinds.items():
        for pair in block:
            total += count * _tensor_bytes(state, (pair.r, pair.in_features), pages=pages)
            total += count * _tensor_bytes(state, (pair.out_features, pair.r), pages=pages)
    return total


def _tensor_bytes(state: OptimizerState, shape: tuple[int, int], *, pages: bool) -> int:
    numbers = shape[0] * shape[1]
    counters = FP32_BYTES * state.counters
    if state.factored:
        return FP32_BYTES * sum(shape) + counters
    if state.in_8_bits and numbers >= LEAST_8BIT:
        moments = state.moments * numbers
        scales = state.moments * FP32_BYTES * -(-numbers // BLOCK)
    else:
        moments, scales = state.moments * FP32_BYTES * numbers, 0
    if pages and state.paged and numbers >= LEAST_PAGED:
        moments = 0
    return moments + scales + counters
