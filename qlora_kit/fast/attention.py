"""Attention with fused projections: the queries, keys and values of a layer are one group."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from qlora_kit.fast.linear_group import apply_group
from qlora_kit.fast.lora_layers import lora_linears
from qlora_kit.fast.norm import PendingNorm


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
        self.training = attention.training  # and not that of its children, which may differ

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
        query, key = query.to(value.dtype), key.to(value.dtype)  # wider behind a norm in fp32, or by the angles' dtype
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
