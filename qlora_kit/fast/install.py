"""Puts the fused path into a model for the time of its training, piece by piece, and says what it left as it was."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlora_kit.fast.attention import FastAttention
from qlora_kit.fast.head import FastHead
from qlora_kit.fast.lora_layers import why_not
from qlora_kit.fast.mlp import FastMLP
from qlora_kit.fast.norm import DeferredNorm
from qlora_kit.fast.segments import SEGMENTS, register_segments

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PIECES = ("projections", "mlp", "segments", "head", "unpadding")
FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""transformers' model types whose decoder layers are known, and how their classes' names begin."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One piece of the fused path.

    Attributes:
        name: One of ``PIECES``.
        places: In how many layers it is in use (1 or 0, where it is not about layers).
        possible: Of how many.
        reason: Why it is not in use everywhere; None where it is.
    """

    name: str
    places: int
    possible: int
    reason: str | None

    def __str__(self) -> str:
        where = f" in {self.places} of {self.possible} layers" if self.possible > 1 and self.places else ""
        return f"{self.name}{where}"


@dataclass(frozen=True)
class FastPath:
    """What of the fused path a model runs with.

    Attributes:
        pieces: Each that was asked for.
        head: To score labels with; None where TRL's head does it.
    """

    pieces: tuple[Piece, ...]
    head: FastHead | None

    def tell(self) -> None:
        """Log what is in use, and what is not and why."""
        used = ", ".join(str(piece) for piece in self.pieces if piece.places)
        logger.info("train.fast: %s", f"fused are {used}" if used else "nothing is fused")
        left = [piece for piece in self.pieces if piece.reason is not None]
        if left:
            # Nobody can do anything about a base's limited attention, and dropout is a choice.
            harmless = ("segments", "unpadding")
            level = logging.INFO if all(piece.name in harmless for piece in left) else logging.WARNING
            told = ", ".join(f"{_left(piece)} ({piece.reason})" for piece in left)
            logger.log(level, "train.fast leaves plain, which is slower and not wrong: %s", told)


def _left(piece: Piece) -> str:
    missing = piece.possible - piece.places
    return f"{piece.name} in {missing} of {piece.possible} layers" if piece.possible > 1 else piece.name


@contextmanager
def fast_path(model: PeftModel, *, pieces: Collection[str] = PIECES) -> Iterator[FastPath]:
    """Inside the block the model trains by the fused path, with the same parameters under the same names.

    Modules are replaced by ones that hold the same children, and put back at the end. What cannot be fused stays plain.

    Args:
        model: With one LoRA adapter.
        pieces: Which to use, of ``PIECES``.
    """
    base = model.get_base_model()
    replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]] = []
    attention = base.config._attn_implementation
    try:
        reason = _unknown(base)
        if reason is not None:
            yield FastPath(tuple(Piece(name, 0, 1, reason) for name in PIECES if name in pieces), None)
            return
        yield FastPath(*_install(base, pieces, replaced))
    finally:
        for parent, name, module in reversed(replaced):
            setattr(parent, name, module)
        if base.config._attn_implementation != attention:
            base.set_attn_implementation(attention)


def _install(
    base: PreTrainedModel, pieces: Collection[str], replaced: list[tuple[torch.nn.Module, str, torch.nn.Module]]
) -> tuple[tuple[Piece, ...], FastHead | None]:
    def replace(parent: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
        replaced.append((parent, name, getattr(parent, name)))
        setattr(parent, name, module)

    layers = base.model.layers
    found: list[Piece] = []
    if "projections" in pieces:
        reasons = [_projections_refusal(base, layer) for layer in layers]
        for layer, refused in zip(layers, reasons, strict=True):
            if refused is None:
                replace(layer, "input_layernorm", DeferredNorm(layer.input_layernorm))
                normed = base.config.model_type == "qwen3"
                replace(layer, "self_attn", FastAttention(layer.self_attn, query_key_norm=normed))
        found.append(_piece("projections", reasons))
    if "mlp" in pieces:
        reasons = [_mlp_refusal(base, layer) for layer in layers]
        for layer, refused in zip(layers, reasons, strict=True):
            if refused is None:
                replace(layer, "post_attention_layernorm", DeferredNorm(layer.post_attention_layernorm))
                replace(layer, "mlp", FastMLP(layer.mlp))
        found.append(_piece("mlp", reasons))
    if "segments" in pieces:
        refused = _segments_refusal(base)
        if refused is None:
            register_segments()
            base.set_attn_implementation(SEGMENTS)
        found.append(_piece("segments", [refused]))
    head = None
    if "head" in pieces:
        refused = _head_refusal(base)
        if refused is None:
            head = FastHead(base.lm_head)
            replace(base, "lm_head", head)
        found.append(_piece("head", [refused]))
    if "unpadding" in pieces:
        refused = _unpadding_refusal(base, head)
        if head is not None and refused is None:
            head.unpads = True
        found.append(_piece("unpadding", [refused]))
    return tuple(found), head


def _piece(name: str, reasons: list[str | None]) -> Piece:
    refused = [reason for reason in reasons if reason is not None]
    return Piece(name, len(reasons) - len(refused), len(reasons), refused[0] if refused else None)


def _unknown(base: PreTrainedModel) -> str | None:
    family = base.config.model_type
    if family not in FAMILIES or not _is(base, family, "ForCausalLM"):
        return f"the architecture {type(base).__name__} is not one of {', '.join(FAMILIES.values())}"
    if base.dtype not in _DTYPES:
        return f"the base is in {base.dtype}"
    return None


def _is(module: torch.nn.Module, family: str, kind: str) -> bool:
    """Whether a module is transformers' own class of a family, and nobody's subclass or wrapper of it."""
    name = f"transformers.models.{family}.modeling_{family}.{FAMILIES[family]}{kind}"
    return f"{type(module).__module__}.{type(module).__qualname__}" == name


def _projections_refusal(base: PreTrainedModel, layer: Any) -> str | None:
    family = base.config.model_type
    if not (_is(layer.input_layernorm, family, "RMSNorm") and _is(layer.self_attn, family, "Attention")):
        return "its modules are not transformers' own"
    if base.config._attn_implementation not in ("sdpa", "eager", SEGMENTS):
        return f"attention is {base.config._attn_implementation}"
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return _half_refusal(base, layer.self_attn, names, layer.input_layernorm)


def _mlp_refusal(base: PreTrainedModel, layer: Any) -> str | None:
    family = base.config.model_type
    if not (_is(layer.post_attention_layernorm, family, "RMSNorm") and _is(layer.mlp, family, "MLP")):
        return "its modules are not transformers' own"
    if base.config.hidden_act != "silu":
        return f"the activation is {base.config.hidden_act}"
    return _half_refusal(base, layer.mlp, ("gate_proj", "up_proj", "down_proj"), layer.post_attention_layernorm)


def _half_refusal(base: PreTrainedModel, parent: torch.nn.Module, names: tuple[str, ...], norm: Any) -> str | None:
    if norm.weight.requires_grad:
        return "the norm before it is trained"
    if norm.weight.dtype != base.dtype:
        return f"the norm before it is in {norm.weight.dtype}"
    for name in names:
        reason = why_not(parent.get_submodule(name), base.dtype)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _segments_refusal(base: PreTrainedModel) -> str | None:
    config = base.config.to_dict()
    if "sliding_attention" in (config.get("layer_types") or ()):
        return "some layers look back over a limited stretch only"
    if base.config.model_type == "mistral" and config.get("sliding_window") is not None:
        return "the layers look back over a limited stretch only"
    if base.config._attn_implementation != "sdpa":
        return f"attention is {base.config._attn_implementation}"
    return None


def _head_refusal(base: PreTrainedModel) -> str | None:
    if type(base.lm_head) is not torch.nn.Linear:
        return "the head has a wrapper of its own"
    if any(parameter.requires_grad for parameter in base.lm_head.parameters()):
        return "the head is trained"
    if base.lm_head.weight.dtype != base.dtype:
        return f"the head is in {base.lm_head.weight.dtype}"
    return None


def _unpadding_refusal(base: PreTrainedModel, head: FastHead | None) -> str | None:
    if head is None:
        return "it needs the piece head"
    if base.config._attn_implementation != SEGMENTS:
        return "it needs the piece segments"
    drops = any(isinstance(module, torch.nn.Dropout) and module.p for module in base.modules())
    if drops or base.config.to_dict().get("attention_dropout"):
        return "dropout would draw other masks than with padding"
    return None
