"""What llama.cpp calls a model's tensors, and whose rows it wants in another order."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from qlora_kit.config.serving_targets import GGUF_FAMILIES

if TYPE_CHECKING:
    import torch

ARCHITECTURES = {family: "llama" if family == "mistral" else family for family in GGUF_FAMILIES}
"""Family (``model_type``) -> llama.cpp's architecture."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUTER = {EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight", HEAD: "output.weight"}
_INNER = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?P<module>.+)\.(?P<kind>weight|bias)")


def gguf_name(tensor: str) -> str:
    """llama.cpp's name of the tensor ``tensor`` of a checkpoint.

    Raises:
        KeyError: It has none.
    """
    if tensor in _OUTER:
        return _OUTER[tensor]
    match = _LAYER.fullmatch(tensor)
    if match is None:
        raise KeyError(tensor)
    return f"blk.{match['layer']}.{_INNER[match['module']]}.{match['kind']}"


def is_table(tensor: str) -> bool:
    """Whether ``tensor`` is the embedding or the head."""
    return tensor in (EMBEDDING, HEAD)


def rotated_heads(tensor: str, family: str, *, heads: int, kv_heads: int) -> int | None:
    """How many heads the rows of ``tensor`` belong to, where ``head_rows_in_pairs`` has to reorder them; else None.

    transformers rotates the first half of a head's dimensions against the second half, llama.cpp's ``llama``
    architecture each dimension against its neighbour (``conversion/llama.py`` of llama.cpp, ``permute``).
    """
    if ARCHITECTURES[family] != "llama":
        return None
    module = tensor.rpartition(".")[0]
    return heads if module.endswith("self_attn.q_proj") else kv_heads if module.endswith("self_attn.k_proj") else None


def head_rows_in_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection so that the two that are rotated together are neighbours.

    Args:
        rows: (heads x head_dim, ...): a weight, a bias, or the B of a LoRA pair.
        heads: How many heads they belong to.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def head_rows_as_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """What ``head_rows_in_pairs`` was given."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)
