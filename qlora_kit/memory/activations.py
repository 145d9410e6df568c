"""Bytes of a forward and backward pass: what autograd keeps for each block, and what is made and dropped meanwhile.

``e`` is the size of a number in the forward pass. The formulas follow what transformers' blocks, PEFT's ``Linear4bit``
and TRL's chunked loss save, and ``fused`` where the kit's own layers stand in their place; tests count them with
``saved_tensors_hooks``.
"""

from __future__ import annotations

from qlora_kit.memory import fused
from qlora_kit.memory.optimizers import FP32_BYTES
from qlora_kit.memory.parts import largest_linear
from qlora_kit.memory.workload import Pair, Workload

LOSS_TOKENS = 4096  # TOKEN_CHUNK_SIZE in trl/kernels/chunked_logprob.py (TRL 1.16)
LOSS_VOCABULARY = 32_768  # _CHUNKED_LOGPROB_CHUNK_SIZE in trl/trainer/utils.py
CPU_LOSS_TILES = 8  # fp32 tiles that torch makes where there is no Triton: 7.4 were counted
_FIRST = ("q_proj", "k_proj", "v_proj")
_SHARING = (_FIRST, ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # one input each


def checkpoint_bytes(workload: Workload) -> int:
    """Checkpointing keeps the input of its blocks: e·H a token and block (200.7 kB a token at 7B in 16 bits)."""
    return workload.recomputed * workload.compute_bytes * workload.architecture.hidden_size * workload.tokens


def shared_bytes(workload: Workload) -> int:
    """Once for all blocks: cosines and sines of the positions, and the boolean mask where there is one."""
    positions = workload.tokens if workload.in_one_row else workload.length
    mask = _mask_cells(workload) if workload.masked else 0
    return 2 * workload.compute_bytes * positions * workload.architecture.head_dim + mask


def block_bytes(workload: Workload, pairs: tuple[Pair, ...], *, input_has_gradient: bool = True) -> int:
    """What autograd keeps of one block: norms, attention, MLP and LoRA; 211 kB a token at 7B in 16 bits, r = 16.

    Args:
        workload: The run.
        pairs: The block's LoRA pairs.
        input_has_gradient: False for the first block where that is not checkpointed. Nothing there is kept for the
            gradient of its input: not the first norm's, not what its first three pairs would need.
    """
    if fused.is_fused(workload, pairs, fused.ATTENTION):
        attention = fused.attention_bytes(workload, pairs)
    else:
        chosen = tuple(pair for pair in pairs if pair.module in fused.ATTENTION)
        attention = _norm_bytes(workload) if input_has_gradient else 0
        attention += _pair_bytes(workload, chosen, input_has_gradient=input_has_gradient)
    if fused.is_fused(workload, pairs, fused.MLP):
        mlp = fused.mlp_bytes(workload, pairs)
    else:
        chosen = tuple(pair for pair in pairs if pair.module in fused.MLP)
        mlp = _norm_bytes(workload) + _mlp_bytes(workload) + _pair_bytes(workload, chosen)
    return attention + _attention_bytes(workload) + mlp


def saved_bytes(workload: Workload) -> int:
    """What is kept when the loss is reached, without ``shared_bytes``: checkpoints, whole blocks, and the head."""
    return checkpoint_bytes(workload) + whole_blocks_bytes(workload) + head_bytes(workload)


def whole_blocks_bytes(workload: Workload) -> int:
    """What the blocks that are not checkpointed keep: the last ones, or all of them."""
    whole = workload.kinds_of(workload.recomputed, len(workload.layers))
    blocks = sum(block_bytes(workload, pairs) * count for pairs, count in whole.items())
    if workload.recomputed:
        return blocks
    first = workload.layers[0]
    return blocks - block_bytes(workload, first) + block_bytes(workload, first, input_has_gradient=False)


def head_bytes(workload: Workload) -> int:
    """The last norm, and of each supervised position its hidden state, label and two fp32 statistics (TRL)."""
    if workload.fused_head:
        return _norm_bytes(workload) + fused.head_bytes(workload)
    positions = workload.rows * (workload.length - 1)
    hidden = workload.compute_bytes * workload.architecture.hidden_size
    # One row's hidden states are a view of the norm's output, which has one more position.
    held = workload.tokens if workload.rows == 1 and workload.device == "cpu" else positions
    return _norm_bytes(workload) + held * hidden + positions * (8 + 2 * FP32_BYTES + 2)


def peak_bytes_of_pass(workload: Workload) -> int:
    """The most that one forward and backward pass holds beyond what stays the whole run.

    These moments compete: the loss (its logits come in tiles), the backward pass of the last norm, that of the last
    block's MLP, and that of the last checkpointed block, which is computed again first. By then the blocks behind it
    are done, and what they kept is free: so the first blocks are the ones to checkpoint.
    """
    kept = shared_bytes(workload) + saved_bytes(workload)
    moments = [kept + _casts_in_forward(workload) + loss_bytes(workload), kept + _norm_backward_bytes(workload)]
    if workload.recomputed < len(workload.layers):
        moments.append(kept - head_bytes(workload) + block_backward_bytes(workload, again=False))
    if workload.recomputed:
        before = shared_bytes(workload) + checkpoint_bytes(workload)
        moments.append(before + block_backward_bytes(workload, again=True))
    return max(moments)


def loss_bytes(workload: Workload) -> int:
    """What the loss needs meanwhile.

    TRL's chunked loss: one tile of logits of at most 4,096 positions by 32,768 tokens (0.27 GB in 16 bits), the fp32
    gradient of the hidden states and that gradient cast. Label smoothing: all logits, in the compute dtype and in fp32,
    and their log-probabilities with gradients.
    """
    if workload.fused_head:
        return fused.loss_bytes(workload)
    architecture, e = workload.architecture, workload.compute_bytes
    positions = workload.rows * (workload.length - 1)
    gradients = positions * architecture.hidden_size * (FP32_BYTES + e)
    if workload.full_logits:
        return gradients + positions * architecture.vocab_size * (2 * e + 4 * FP32_BYTES)
    rows = min(positions, LOSS_TOKENS)
    if workload.device == "cpu":  # pages of the buffer that are never written take no memory
        columns = min(architecture.vocab_size, LOSS_VOCABULARY)
        return gradients + rows * columns * (e + CPU_LOSS_TILES * FP32_BYTES)
    return gradients + rows * LOSS_VOCABULARY * e


def block_backward_bytes(workload: Workload, *, again: bool) -> int:
    """The backward pass of a block: a checkpointed one's activations again, then the MLP's gradients.

    Behind ``down_proj``, two gradients of its input and their sum stand beside the block's activations, of which one
    input is free by then, or a dequantized weight stands beside the two.
    """
    architecture, e, tokens = workload.architecture, workload.compute_bytes, workload.tokens
    recomputed = 0
    if again:
        recomputed = max(block_bytes(workload, pairs) for pairs in workload.kinds_of(0, workload.recomputed))
        if e == FP32_BYTES or workload.fast:
            recomputed -= e * architecture.hidden_size * tokens  # the first norm keeps the checkpoint itself
    dequantized = dequantized_bytes(workload)
    if workload.fast:
        gradients = fused.mlp_backward_bytes(workload, dequantized=dequantized)
    else:
        inner = e * architecture.intermediate_size * tokens
        gradients = inner + max(inner, dequantized)
    gradients += e * architecture.hidden_size * tokens
    return recomputed + gradients + _attention_work_bytes(workload)


def dequantized_bytes(workload: Workload) -> int:
    """The largest weight in the compute dtype, made in forward and backward (bitsandbytes' ``dequantize_4bit``)."""
    return workload.compute_bytes * largest_linear(workload.architecture) if workload.load_in_4bit else 0


def evaluation_bytes(workload: Workload) -> int:
    """A validation batch: nothing is kept, four tensors of the MLP's width stand at once; then the loss."""
    if not workload.eval_batch_size:
        return 0
    length = workload.eval_length or workload.length
    run = workload.with_(batch_size=workload.eval_batch_size, most_rows=0, length=length, checkpointing=False)
    architecture, e, tokens = run.architecture, run.compute_bytes, run.tokens
    hidden = 3 * e * architecture.hidden_size * tokens
    mlp = 4 * e * architecture.intermediate_size * tokens + dequantized_bytes(run)
    return shared_bytes(run) + hidden + max(mlp, loss_bytes(run), _attention_work_bytes(run))


def _norm_bytes(workload: Workload) -> int:
    """RMSNorm keeps its input in fp32 and one fp32 factor a token."""
    return workload.tokens * (FP32_BYTES * workload.architecture.hidden_size + FP32_BYTES)


def _norm_backward_bytes(workload: Workload) -> int:
    """The last norm's backward pass: four fp32 tensors and two in the compute dtype (counted with torch's profiler)."""
    return workload.tokens * workload.architecture.hidden_size * (4 * FP32_BYTES + 2 * workload.compute_bytes)


def _attention_bytes(workload: Workload) -> int:
    """SDPA keeps query, key, value and output, and the logarithm of the softmax's denominator in fp32.

    With a mask, keys and values are repeated for each query head, and the mask is kept as numbers. Without the flash
    kernel, grouped heads without a mask take torch's plain way, which keeps the probabilities (T² for each head).
    """
    architecture, e, tokens = workload.architecture, workload.compute_bytes, workload.tokens
    queries = architecture.heads * architecture.head_dim
    repeated = workload.masked and architecture.kv_heads > 1  # a single head is expanded without a copy
    keys = queries if repeated else architecture.kv_heads * architecture.head_dim
    kept = tokens * (e * (2 * queries + 2 * keys) + FP32_BYTES * architecture.heads)
    if workload.masked:
        kept += e * _mask_cells(workload)
    if plain_attention(workload):
        kept += FP32_BYTES * (3 * queries * tokens + _probabilities(workload))
    if architecture.query_key_norm:
        heads = architecture.heads + architecture.kv_heads
        kept += tokens * FP32_BYTES * heads * (architecture.head_dim + 1)
    return kept


def plain_attention(workload: Workload) -> bool:
    """Whether SDPA falls back to plain matrix products on a GPU.

    transformers passes grouped heads as they are where there is no mask; torch's memory-efficient kernel, the only one
    before Ampere or in fp32, takes no grouped heads.
    """
    grouped = workload.architecture.kv_heads < workload.architecture.heads
    return workload.device == "cuda" and not workload.flash and not workload.masked and grouped


def _attention_work_bytes(workload: Workload) -> int:
    """Plain attention's gradients of the probabilities; the kernels need only what the MLP has freed by then."""
    return 2 * FP32_BYTES * _probabilities(workload) if plain_attention(workload) else 0


def _probabilities(workload: Workload) -> int:
    return workload.rows * workload.architecture.heads * workload.length**2


def _mask_cells(workload: Workload) -> int:
    """Cells of the mask: one square a row; packed rows lie in one sequence, whose mask is block-diagonal but dense."""
    return workload.tokens**2 if workload.packing else workload.rows * workload.length**2


def _mlp_bytes(workload: Workload) -> int:
    """Gate before and after SiLU, and up; the product is ``down_proj``'s input, counted there."""
    return 3 * workload.compute_bytes * workload.architecture.intermediate_size * workload.tokens


def _lora_bytes(workload: Workload, pairs: tuple[Pair, ...], *, input_has_gradient: bool) -> int:
    """Each pair keeps its input and A's output; layers with the same input share it unless dropout makes it their own.

    Attention's output is ``o_proj``'s input and is counted there. With dropout each pair has an input and a mask.
    DoRA keeps the base's and the pair's output too.
    """
    by_name = {pair.module: pair for pair in pairs}
    e, total = workload.compute_bytes, 0
    for group in _SHARING:
        adapted = [by_name[module] for module in group if module in by_name]
        if not adapted:
            continue
        width = adapted[0].in_features
        if workload.dropout:
            mask = 1 if workload.device == "cuda" else e  # a GPU keeps it in bytes
            mask = mask if input_has_gradient or group != _FIRST else 0
            total += len(adapted) * width * (e + mask)
        elif group != ("o_proj",):
            copies = 1 if workload.load_in_4bit or e == FP32_BYTES else len(adapted)
            total += copies * width * e
        total += e * sum(pair.r for pair in adapted)
        if workload.use_dora:
            total += 2 * e * sum(pair.out_features for pair in adapted)
    return total * workload.tokens


def _pair_bytes(workload: Workload, pairs: tuple[Pair, ...], *, input_has_gradient: bool = True) -> int:
    return _lora_bytes(workload, pairs, input_has_gradient=input_has_gradient) + _cast_bytes(
        workload, pairs, input_has_gradient=input_has_gradient
    )


def _cast_bytes(workload: Workload, pairs: tuple[Pair, ...], *, input_has_gradient: bool = True) -> int:
    """Autocast's 16-bit copies of the fp32 pairs, kept for the gradients of their inputs."""
    if workload.compute_bytes == FP32_BYTES:
        return 0
    unused = 0 if input_has_gradient else sum(pair.r * pair.in_features for pair in pairs if pair.module in _FIRST)
    return workload.compute_bytes * (sum(pair.parameters for pair in pairs) - unused)


def _casts_in_forward(workload: Workload) -> int:
    """Autocast keeps all copies until the forward pass ends; of whole blocks they are kept and counted anyway."""
    if workload.fast:  # which casts by hand, for one product at a time
        return 0
    kinds = workload.kinds_of(0, workload.recomputed)
    return sum(_cast_bytes(workload, pairs) * count for pairs, count in kinds.items())
