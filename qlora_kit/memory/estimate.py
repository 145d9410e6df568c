"""Peak memory of a run by part: a ``Workload`` in, an ``Estimate`` out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qlora_kit.memory import activations, parts
from qlora_kit.memory.optimizers import OPTIMIZERS, optimizer_bytes, paged_bytes, step_bytes
from qlora_kit.memory.workload import Workload

CUDA_CONTEXT_BYTES = 500_000_000  # context, cuBLAS and kernels: torch does not count it, the driver does
CPU_LIBRARIES_BYTES = 900_000_000  # resident size of Python with torch, transformers, PEFT and TRL
# Of what comes and goes: freed blocks that do not fit the next request. The share of a GPU is not
# measured yet; a CPU's malloc kept up to half as much again in runs of `tiny`.
ALLOWANCE = {"cuda": 0.05, "cpu": 0.5}
MARGIN = 0.05  # of the predicted peak, to be free beside it: as far as a prediction may be off


@dataclass(frozen=True)
class Estimate:
    """The predicted peak of a run.

    Attributes:
        breakdown: Bytes by part, in the order of their lifetimes; they add up to ``peak_bytes``.
        allocated_bytes: The part of it that torch allocates (``torch.cuda.max_memory_allocated``).
        on_host: Bytes in host memory: the embedding, and optimizer state that moves there where the GPU is full.
        notes: What is not counted, or is counted roughly.
    """

    breakdown: Mapping[str, int]
    allocated_bytes: int
    on_host: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def host_bytes(self) -> int:
        """All that lies, or may lie, in host memory."""
        return sum(self.on_host.values())

    @property
    def peak_bytes(self) -> int:
        """Everything together, with context and allowance."""
        return sum(self.breakdown.values())

    @property
    def margin_bytes(self) -> int:
        """What must be free beside the peak, since a prediction may be too low."""
        return int(MARGIN * self.peak_bytes)

    @property
    def needed_bytes(self) -> int:
        """Peak and margin: a run fits where so much is free."""
        return self.peak_bytes + self.margin_bytes


def estimate(workload: Workload) -> Estimate:
    """The peak of ``workload``, for rows that all reach ``length``.

    Training and validation passes compete: whichever takes more is the peak. The optimizer's temporaries count where
    they exceed the activations, which are gone by then. An embedding on the host is loaded onto the GPU first, when
    there is nothing but the base yet.
    """
    shared = activations.shared_bytes(workload)
    checkpoints = activations.checkpoint_bytes(workload)
    whole_pass = max(activations.peak_bytes_of_pass(workload), step_bytes(workload))
    all_recomputed = workload.recomputed == len(workload.layers)
    kept = shared + (0 if all_recomputed else activations.saved_bytes(workload) - checkpoints)
    held = min(checkpoints + kept, whole_pass)
    gradients = parts.gradient_bytes(workload)
    evaluation = activations.evaluation_bytes(workload)
    on_host = parts.host_embedding_bytes(workload)
    stays = {
        "linear layers": parts.held_linear_bytes(workload),
        "head" if on_host else "embedding and head": parts.embedding_bytes(workload) - on_host,
        "norms and biases": parts.small_bytes(workload),
        "adapter": parts.adapter_bytes(workload),
        "optimizer": optimizer_bytes(workload),
    }
    training = {
        "gradients": gradients,
        **_kept_parts(workload, checkpoints, held),
        "work of one block" if all_recomputed else "work": whole_pass - held,
    }
    validation = {"gradients": 0, "validation batch": evaluation}
    comes = training if gradients + whole_pass >= evaluation else validation
    moving = sum(comes.values()) - comes["gradients"]
    later = stays["adapter"] + stays["optimizer"] + sum(comes.values())
    loading = {"embedding, while loading": on_host - later} if on_host > later else {}
    context = CUDA_CONTEXT_BYTES if workload.device == "cuda" else CPU_LIBRARIES_BYTES
    breakdown = {
        **stays,
        **comes,
        **loading,
        "allowance for fragmentation": int(ALLOWANCE[workload.device] * moving),
        "context and libraries": context,
    }
    allocated = sum(stays.values()) + sum(comes.values()) + sum(loading.values())
    host = {"embedding on the host": on_host, "optimizer, may move to host": paged_bytes(workload)}
    host = {name: size for name, size in host.items() if size}
    return Estimate(breakdown, allocated, host, _notes(workload, comes is validation))


def _kept_parts(workload: Workload, checkpoints: int, held: int) -> dict[str, int]:
    """What a pass keeps, under one name or, where some blocks are checkpointed, two."""
    if workload.recomputed == len(workload.layers):
        return {"checkpoints": held}
    if not workload.recomputed:
        return {"activations": held}
    return {"checkpoints": min(checkpoints, held), "activations": held - min(checkpoints, held)}


def _notes(workload: Workload, validation_leads: bool) -> tuple[str, ...]:
    notes = [f"{name} is not counted" for name in workload.uncounted]
    context = workload.architecture.context_length
    if workload.length > context:
        notes.append(f"max_length is {workload.length:,}, and the base takes {context:,} tokens: lower it to those")
    if workload.optim not in OPTIMIZERS:
        notes.append(f"the optimizer {workload.optim} is counted as adamw_torch, with 8 bytes for each trained number")
    if workload.use_dora:
        notes.append("DoRA also dequantizes each layer's weight to measure its norm; that is counted roughly")
    if workload.fast and workload.device == "cuda":
        notes.append("train.fast=on is counted by the fused path's tensors, which were not measured on a GPU")
    if workload.full_logits:
        notes.append("label smoothing keeps the logits of the whole micro-batch; that is counted roughly")
    if activations.plain_attention(workload):
        notes.append("without the flash kernel, attention keeps length x length numbers for each head")
    if validation_leads:
        notes.append("the peak is the validation batch (train.per_device_eval_batch_size), not training")
    return tuple(notes)
