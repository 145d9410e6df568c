"""The most tokens a second that a card can train: floating-point operations and passes over the weights."""

from __future__ import annotations

from qlora_kit.memory.cards import Card
from qlora_kit.memory.parts import host_embedding_bytes, linear_weights
from qlora_kit.memory.workload import Workload

_FOUR_BIT_PASS_BYTES = 2.516  # of a weight: 0.516 read, 2 written in 16 bits, each time that it is dequantized
_SIXTEEN_BIT_PASS_BYTES = 2.0
_BUS_BYTES_PER_SECOND = 6e9  # from ordinary host memory over PCIe 3 or 4 x16; below the data sheets' 16 and 32 GB/s


def operations_per_token(workload: Workload) -> float:
    """Floating-point operations for each token of a training step.

    With N the weights of the linear layers, h those of the head, P those of the adapter and a = S·heads·head_dim·layers
    for attention that skips what causality masks: 4N + 6h + 6P + 7a without checkpointing, 6N + 6h + 8P + 9a with it,
    and of k of L layers that share of the difference.
    Two for forward and two for the gradient of the inputs; the frozen weights get no gradient, the adapter does. Of 6h,
    2h are TRL's chunked loss, which computes the logits again in the backward pass.
    """
    architecture = workload.architecture
    linear = linear_weights(workload.architecture)
    head = architecture.vocab_size * architecture.hidden_size
    attention = workload.length * architecture.heads * architecture.head_dim * architecture.layers
    again = 2 * _recomputed_share(workload) * (linear + workload.trainable + attention)
    return 4 * linear + 6 * head + 6 * workload.trainable + 7 * attention + again


def _recomputed_share(workload: Workload) -> float:
    return workload.recomputed / len(workload.layers)


def tokens_per_second(workload: Workload, card: Card) -> float | None:
    """Tokens a second at the card's full speed, padding included; real runs stay below. None where it is not known.

    A micro-batch takes its operations at the data sheet's rate, and one pass over the weights in each of forward,
    backward and, with checkpointing, the second forward, at the data sheet's bandwidth. The rows of an embedding on the
    host cross the bus.
    """
    if card.tflops is None or card.gigabytes_per_second is None:
        return None
    computing = workload.tokens * operations_per_token(workload) / (card.tflops * 1e12)
    passes = 2 + _recomputed_share(workload)
    pass_bytes = _FOUR_BIT_PASS_BYTES if workload.load_in_4bit else _SIXTEEN_BIT_PASS_BYTES
    reading = passes * pass_bytes * linear_weights(workload.architecture) / (card.gigabytes_per_second * 1e9)
    return workload.tokens / (computing + reading + _sending_seconds(workload))


def _sending_seconds(workload: Workload) -> float:
    if not host_embedding_bytes(workload):
        return 0.0
    return workload.tokens * workload.architecture.hidden_size * workload.compute_bytes / _BUS_BYTES_PER_SECOND
