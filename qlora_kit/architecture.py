"""What a causal language model is made of, from its config.json alone: sizes, parameters by part, and LoRA's targets.

The tensors of a model are listed with their shapes, as ``modeling_<family>.py`` of transformers builds them; everything
that is counted is counted on that list, and the headers of safetensors files are compared with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from qlora_kit.errors import BaseModelError, Fault
from qlora_kit.safetensors_header import TensorLocation

Part = Literal["embedding", "attention", "mlp", "norms", "head"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "norms", "head")
SHOWN_DIFFERENCES = 5
EMBEDDING, HEAD = "embed_tokens", "lm_head"
"""The last parts of their modules' names."""

# Family (`model_type`) -> the values that transformers takes where config.json lacks the key.
_COMMON_DEFAULTS = {
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": None,
    "head_dim": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "rope_theta": 10_000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {**_COMMON_DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32_768},
    "qwen3": {**_COMMON_DEFAULTS, "num_key_value_heads": 32, "max_position_embeddings": 32_768, "head_dim": 128},
    "llama": {**_COMMON_DEFAULTS, "max_position_embeddings": 2_048},
    "mistral": {**_COMMON_DEFAULTS, "num_key_value_heads": 8, "max_position_embeddings": 131_072},
}
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


@dataclass(frozen=True)
class LoraTarget:
    """A kind of linear layer that LoRA takes.

    Attributes:
        out_features: Rows of its weight.
        in_features: Columns of its weight.
        layers: In how many layers it stands.
    """

    out_features: int
    in_features: int
    layers: int

    def trainable(self, r: int) -> int:
        """Parameters of all its pairs of rank ``r``: A is (r, in), B is (out, r) (https://arxiv.org/abs/2106.09685)."""
        return r * (self.in_features + self.out_features) * self.layers


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that the model has: its shape and the part of the model that it is counted to."""

    shape: tuple[int, ...]
    part: Part


@dataclass(frozen=True)
class Architecture:
    """The shape of a model.

    Attributes:
        name: The class of transformers that builds it, ``Qwen2ForCausalLM``.
        family: Its ``model_type``, a key of ``FAMILIES``.
        layers: Transformer blocks.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        heads: Query heads.
        kv_heads: Key and value heads; fewer than ``heads`` in grouped-query attention.
        head_dim: Width of one head; not always ``hidden_size / heads``.
        vocab_size: Rows of the embedding, which may be more than the tokenizer has tokens.
        tied: Whether the head is the embedding.
        context_length: Positions that the config allows (``max_position_embeddings``).
        sliding_window: Positions that attention looks back, where it is limited.
        rope: Settings of the rotary embedding, ``rope_type`` and ``rope_theta`` among them.
        dtype: Of the saved weights, as the config says.
        qkv_bias: Whether query, key and value have biases.
        output_bias: Whether attention's output has one.
        mlp_bias: Whether the MLP's linear layers have biases.
        query_key_norm: Whether each query and key head is normalised.
    """

    name: str
    family: str
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    context_length: int
    sliding_window: int | None
    rope: Mapping[str, Any]
    dtype: str | None
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool

    def lora_targets(self) -> dict[str, LoraTarget]:
        """What PEFT's ``all-linear`` takes, by names for ``lora.target_modules``: each linear layer but the head."""
        return {
            module.rpartition(".")[2]: LoraTarget(*shape, self.layers) for module, (shape, _) in self._linears().items()
        }

    def tensors(self) -> dict[str, TensorPlan]:
        """Every tensor by its name in the checkpoint; a tied head is none of its own."""
        table = {"model.embed_tokens.weight": TensorPlan((self.vocab_size, self.hidden_size), "embedding")}
        for layer in range(self.layers):
            table.update({f"model.layers.{layer}.{name}": plan for name, plan in self._layer_tensors()})
        table["model.norm.weight"] = TensorPlan((self.hidden_size,), "norms")
        if not self.tied:
            table["lm_head.weight"] = TensorPlan((self.vocab_size, self.hidden_size), "head")
        return table

    def parameters_by_part(self) -> dict[Part, int]:
        """How many parameters each part has; a tied head has none of its own, biases count to their layers."""
        counts: Counter[Part] = Counter()
        for plan in self.tensors().values():
            counts[plan.part] += prod(plan.shape)
        return {part: counts[part] for part in PARTS}

    def parameters(self) -> int:
        """How many parameters the model has."""
        return sum(self.parameters_by_part().values())

    def vector_parameters(self) -> int:
        """How many of them stand in norms and biases."""
        of_one_layer = sum(prod(plan.shape) for _, plan in self._layer_tensors() if len(plan.shape) == 1)
        return self.layers * of_one_layer + self.hidden_size

    def _linears(self) -> dict[str, tuple[tuple[int, int], bool]]:
        """The linear layers of one block: name to (out, in) and whether there is a bias."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": ((queries, hidden), self.qkv_bias),
            "self_attn.k_proj": ((keys, hidden), self.qkv_bias),
            "self_attn.v_proj": ((keys, hidden), self.qkv_bias),
            "self_attn.o_proj": ((hidden, queries), self.output_bias),
            "mlp.gate_proj": ((inner, hidden), self.mlp_bias),
            "mlp.up_proj": ((inner, hidden), self.mlp_bias),
            "mlp.down_proj": ((hidden, inner), self.mlp_bias),
        }

    def _layer_tensors(self) -> Iterator[tuple[str, TensorPlan]]:
        for module, (shape, has_bias) in self._linears().items():
            part: Part = "attention" if module.startswith("self_attn.") else "mlp"
            yield f"{module}.weight", TensorPlan(shape, part)
            if has_bias:
                yield f"{module}.bias", TensorPlan(shape[:1], part)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{norm}.weight", TensorPlan((self.hidden_size,), "norms")
        if self.query_key_norm:
            for norm in ("q_norm", "k_norm"):
                yield f"self_attn.{norm}.weight", TensorPlan((self.head_dim,), "norms")


def read_architecture(config: Mapping[str, Any], *, where: str) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Args:
        config: The file's content, of transformers 4 or 5.
        where: The file, for messages.

    Raises:
        BaseModelError: Another family of models, or sizes that are missing or impossible; all of them at once.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BaseModelError(
            f"{where}: model_type is {family!r}",
            expected=f"one of {', '.join(FAMILIES)}: the families whose parameters are counted without loading them",
            fix="choose a base of these families for a description; training is not limited to them",
        )
    values = {**FAMILIES[family], **config}
    if faults := _faults(values, where):
        raise BaseModelError.of(faults)
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    qkv_bias, output_bias = (True, False) if family == "qwen2" else (values["attention_bias"],) * 2
    names = values.get("architectures") or [f"{family.capitalize()}ForCausalLM"]
    return Architecture(
        name=str(names[0]),
        family=family,
        layers=values["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=values["intermediate_size"],
        heads=heads,
        kv_heads=heads if values["num_key_value_heads"] is None else values["num_key_value_heads"],
        head_dim=hidden // heads if values["head_dim"] is None else values["head_dim"],
        vocab_size=values["vocab_size"],
        tied=values["tie_word_embeddings"],
        context_length=values["max_position_embeddings"],
        sliding_window=_sliding_window(values, family),
        rope=_rope(values),
        dtype=values.get("dtype") or values.get("torch_dtype"),  # transformers 5 and 4
        qkv_bias=qkv_bias and family != "mistral",
        output_bias=output_bias and family != "mistral",
        mlp_bias=values["mlp_bias"] and family == "llama",
        query_key_norm=family == "qwen3",
    )


def weight_differences(architecture: Architecture, found: Mapping[str, TensorLocation]) -> tuple[str, ...]:
    """How the tensors of a checkpoint differ from what the config describes; empty where they agree.

    A 4-bit weight of bitsandbytes agrees when it has half as many bytes as the weight has elements; the tensors of its
    quantization state are named below it and left alone, as are a tied head's copy and the rotary buffers of old files.

    Args:
        architecture: Made from the config.
        found: The checkpoint's tensors by name.
    """
    planned = architecture.tensors()
    differences = [f"{name} is missing" for name in planned if name not in found]
    for name, location in found.items():
        info = location.info
        if name not in planned:
            if not _is_beside_the_plan(name, planned, tied=architecture.tied):
                differences.append(f"{name} is not described by the config")
        elif info.shape != planned[name].shape:
            packed = info.dtype == "U8" and info.size_bytes == (prod(planned[name].shape) + 1) // 2
            if not packed:
                differences.append(f"{name} has the shape {list(info.shape)}, not {list(planned[name].shape)}")
    more = len(differences) - SHOWN_DIFFERENCES
    return (*differences[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else []))


def _is_beside_the_plan(name: str, planned: Mapping[str, TensorPlan], *, tied: bool) -> bool:
    if name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight"):
        return True
    weight, separator, _ = name.partition(".weight.")
    return bool(separator) and f"{weight}.weight" in planned


def _faults(values: Mapping[str, Any], where: str) -> list[Fault]:
    fix = "check that the file is whole: it is the config.json of the checkpoint, as it was saved or downloaded"
    faults = [
        Fault(f"{where}: {key} is {values.get(key)!r}", "a whole number above 0", fix)
        for key in (*_SIZES, *_OPTIONAL_SIZES)
        if not _is_size(values.get(key)) and not (key in ("num_key_value_heads", "head_dim") and values[key] is None)
    ]
    faults += [
        Fault(f"{where}: {key} is {values[key]!r}", "true or false", fix)
        for key in _SWITCHES
        if not isinstance(values[key], bool)
    ]
    heads, kv_heads = values.get("num_attention_heads"), values["num_key_value_heads"]
    if _is_size(heads) and _is_size(kv_heads) and heads % kv_heads:
        what = f"{where}: {heads} query heads do not share {kv_heads} key/value heads evenly"
        faults.append(Fault(what, "num_attention_heads that is a multiple of num_key_value_heads", fix))
    return faults


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def _sliding_window(values: Mapping[str, Any], family: str) -> int | None:
    limited = family == "mistral" or (family != "llama" and values["use_sliding_window"])
    return values["sliding_window"] if limited else None


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """In the words of transformers 5 (``rope_parameters``); 4 had ``rope_theta`` and ``rope_scaling``."""
    settings = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    settings["rope_type"] = settings.get("rope_type") or settings.pop("type", None) or "default"
    settings.setdefault("rope_theta", values["rope_theta"])
    return settings
