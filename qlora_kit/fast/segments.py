"""Attention that looks at each conversation of a packed row by itself: no mask of length squared."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SEGMENTS = "qlora_kit_segments"
"""The name of ``segment_attention`` among transformers' attention functions."""
CAUSAL = (-1, 0)
"""The window of FlashAttention that reaches back without end and not ahead."""
_known = WeakIdKeyDictionary()  # of position ids: their segments


@dataclass(frozen=True)
class Segments:
    """Where the conversations of a row are.

    Attributes:
        lengths: Of each, in tokens.
        edges: Where each begins, and where the last one ends; int32, on the row's device: (len(lengths) + 1,).
    """

    lengths: list[int]
    edges: torch.Tensor


def register_segments() -> None:
    """Make ``segment_attention`` and its mask known to transformers."""
    AttentionInterface.register(SEGMENTS, segment_attention)
    AttentionMaskInterface.register(SEGMENTS, segment_mask)


def segment_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask for SDPA, or None where ``segment_attention`` needs none.

    Rows that are padded on the right need none, since no token looks at what comes after it; nor does one row of packed
    conversations.
    """
    whole = q_length == kv_length and q_length > 1
    if attention_mask is None:
        plain = batch_size == 1 or allow_is_causal_skip  # which transformers forbids where it found packed rows
    else:
        plain = whole and bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all())
    if whole and plain:
        return None
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        **kwargs,
    )


def segment_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA over query (B, heads, T, head_dim), key and value (B, kv_heads, T, head_dim): (B, T, heads, head_dim).

    Packed conversations are attended to each by itself; they begin where ``position_ids`` (1, T) do not go on by one.
    Everything else is transformers' SDPA.
    """
    whole = attention_mask is None and query.shape[2] == key.shape[2]
    segments = _segments_of(position_ids) if whole and position_ids is not None else None
    groups = query.shape[1] // key.shape[1]
    if whole and groups > 1 and not takes_groups(query):
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        lengths = [query.shape[2]] if segments is None else segments.lengths
        return _one_by_one(query, key, value, lengths, dropout=dropout, scaling=scaling), None
    if segments is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if takes_varlen(query, dropout=dropout):
        return _all_at_once(query, key, value, segments, scaling), None
    return _one_by_one(query, key, value, segments.lengths, dropout=dropout, scaling=scaling), None


def takes_groups(query: torch.Tensor) -> bool:
    """Whether SDPA takes fewer heads of keys than of queries (B, heads, T, head_dim), other than by its plain formula.

    That one holds all weights, (B, heads, T, T). Of the kernels for GPUs FlashAttention alone takes them
    (https://github.com/huggingface/transformers/issues/48633).
    """
    return not query.is_cuda or _has_flash(query)


def takes_varlen(query: torch.Tensor, *, dropout: float) -> bool:
    """Whether torch's kernel for rows of all lengths takes queries (B, heads, T, head_dim) like these.

    It is FlashAttention without dropout; past 192 numbers a head, its backward pass is for some cards only. Its
    arguments change from one torch to the next; one without those that are given here is not called.
    """
    return not dropout and query.shape[-1] <= 192 and _has_flash(query) and _varlen_is_known()


def _has_flash(query: torch.Tensor) -> bool:
    """FlashAttention is for NVIDIA's cards from Ampere on and 16 bits, and torch may be built without it."""
    if not (query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)) or torch.version.cuda is None:
        return False
    new_enough = torch.cuda.get_device_capability(query.device) >= (8, 0)
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return new_enough and fits and torch.backends.cuda.is_flash_attention_available()


@cache
def _varlen_is_known() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch 2.9
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


def _all_at_once(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scaling: float | None
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # (T, heads, head_dim)
    longest = max(segments.lengths)
    output = varlen_attn(
        q,
        k,
        v,
        segments.edges,
        segments.edges,
        longest,
        longest,
        scale=scaling,
        window_size=CAUSAL,
        enable_gqa=k.shape[1] < q.shape[1],
    )
    return cast("torch.Tensor", output).unsqueeze(0)


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: list[int],
    *,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    parts = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=k.shape[1] < q.shape[1]
        ).transpose(1, 2)
        for q, k, v in parts
    ]
    return torch.cat(outputs, dim=1)


def _segments_of(position_ids: torch.Tensor) -> Segments | None:
    """The stretches of consecutive positions; None where there is one, or more than one row of positions.

    All layers of a pass ask with the same tensor. It is looked at once: on a GPU that waits for what came before.
    """
    if position_ids.shape[0] > 1:
        return None
    if position_ids not in _known:
        row = position_ids[0]
        starts = (row.diff() != 1).nonzero().flatten().add_(1).tolist()
        edges = [0, *starts, row.numel()]
        lengths = [end - start for start, end in pairwise(edges)]
        _known[position_ids] = Segments(lengths, torch.tensor(edges, dtype=torch.int32, device=row.device))
    segments: Segments = _known[position_ids]
    return segments if len(segments.lengths) > 1 else None
