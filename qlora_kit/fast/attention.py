"""Attention with fused projections, and SDPA that looks at each conversation by itself: no mask of length squared."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from qlora_kit.fast.linear_group import apply_group
from qlora_kit.fast.lora_layers import lora_linears
from qlora_kit.fast.norm import PendingNorm

SEGMENTS = "qlora_kit_segments"
"""The name of ``segment_attention`` among transformers' attention functions."""


class FastAttention(torch.nn.Module):
    """In the place of Llama's, Mistral's, Qwen2's or Qwen3's attention and with its children."""

    q_proj: torch.nn.Module
    k_proj: torch.nn.Module
    v_proj: torch.nn.Module
    o_proj: torch.nn.Module
    q_norm: torch.nn.Module | None
    k_norm: torch.nn.Module | None
    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    num_key_value_groups: int
    scaling: float
    attention_dropout: float
    is_causal: bool

    def __init__(self, attention: Any, *, query_key_norm: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj
        self.q_norm = attention.q_norm if query_key_norm else None
        self.k_norm = attention.k_norm if query_key_norm else None
        self.config, self.layer_idx, self.head_dim = attention.config, attention.layer_idx, attention.head_dim
        self.num_key_value_groups, self.scaling = attention.num_key_value_groups, attention.scaling
        self.attention_dropout, self.is_causal = attention.attention_dropout, attention.is_causal
        self.train(attention.training)

    def forward(
        self,
        hidden_states: PendingNorm,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over the normalised hidden states (B, T, H): (B, T, H), and weights where the function has any."""
        shape = hidden_states.hidden_states.shape[:-1]
        query, key, value = (part.view(*shape, -1, self.head_dim) for part in self._projections(hidden_states))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, heads, T, head_dim)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self._output(output.reshape(*shape, -1).contiguous()), weights

    def _projections(self, hidden_states: PendingNorm) -> tuple[torch.Tensor, ...]:
        modules = (self.q_proj, self.k_proj, self.v_proj)
        linears = lora_linears(modules) if self.training else None
        if linears is None:
            inner = hidden_states.normalised()
            return tuple(module(inner) for module in modules)
        return apply_group(hidden_states, linears)

    def _output(self, attended: torch.Tensor) -> torch.Tensor:
        linears = lora_linears((self.o_proj,)) if self.training else None
        output: torch.Tensor = self.o_proj(attended) if linears is None else apply_group(attended, linears)[0]
        return output


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

    Packed conversations are attended to one after another; they begin where ``position_ids`` (1, T) do not go on by
    one. Everything else is transformers' SDPA.
    """
    lengths = _segment_lengths(position_ids) if attention_mask is None and query.shape[2] == key.shape[2] else []
    if len(lengths) < 2:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    segments = zip(*(part.split(lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=k.shape[1] < q.shape[1]
        ).transpose(1, 2)
        for q, k, v in segments
    ]
    return torch.cat(outputs, dim=1), None


def _segment_lengths(position_ids: torch.Tensor | None) -> list[int]:
    """How long the stretches of consecutive positions are; none where there is more than one row of positions."""
    if position_ids is None or position_ids.shape[0] > 1:
        return []
    row = position_ids[0]
    starts = (row.diff() != 1).nonzero().flatten().add_(1).tolist()
    edges = [0, *starts, row.numel()]
    return [end - start for start, end in pairwise(edges)]
