"""What a training run's memory depends on: one ``RunConfig``, an architecture and a device in, a ``Workload`` out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, NamedTuple

from qlora_kit.adapters.lora_settings import LoraSettings
from qlora_kit.architecture import EMBEDDING, HEAD, Architecture
from qlora_kit.config import LoraSection, RunConfig
from qlora_kit.errors import ConfigError
from qlora_kit.launched import process_count

Device = Literal["cuda", "cpu"]
DEFAULT_EVAL_BATCH = 8  # transformers' TrainingArguments.per_device_eval_batch_size
_EMBEDDING = f"model.{EMBEDDING}"
_UNCOUNTED = {  # field of SFTConfig -> the value that changes nothing; any other changes memory in ways not counted
    "use_liger_kernel": False,
    "activation_offloading": False,
    "torch_compile": False,
}


class Pair(NamedTuple):
    """A LoRA pair: the linear layer that it stands beside, and its rank.

    Attributes:
        module: The layer's own name, ``q_proj``.
        out_features: Rows of its weight.
        in_features: Columns of its weight.
        r: The rank.
    """

    module: str
    out_features: int
    in_features: int
    r: int

    @property
    def parameters(self) -> int:
        """Of A (r, in) and B (out, r)."""
        return self.r * (self.in_features + self.out_features)


@dataclass(frozen=True)
class Workload:
    """One training run, as far as its memory goes.

    Attributes:
        architecture: The base.
        layers: The pairs of each transformer block, from the first block on.
        trained_whole: Parameters of ``lora.modules_to_save``, which are copied and trained.
        batch_size: Rows of a micro-batch.
        length: Tokens of its longest row.
        most_rows: How many rows the data have at all; 0 where that is not known.
        accumulation: Micro-batches of an optimizer step.
        eval_batch_size: Rows of a validation batch; 0 without validation.
        eval_length: Tokens of its longest row; 0 for ``length``.
        checkpointing: Whether activations are computed again in the backward pass.
        checkpointed_layers: Of so many blocks, the first ones; None for all. Without ``checkpointing`` of none.
        optim: transformers' name of the optimizer.
        load_in_4bit: Whether the linear layers are 4-bit codes.
        double_quant: Whether the scales of the codes are quantized too.
        compute_bytes: Of one number in the forward pass: 2 (bf16, fp16; the adapters are cast by autocast) or 4.
        device: ``cuda`` or ``cpu``.
        flash: Whether the device has the flash attention kernel (16 bits, NVIDIA's Ampere or later).
        packing: Whether rows are put together to sequences of ``length``.
        dropout: Whether there is dropout before ``lora_A``.
        use_dora: Whether the pairs are DoRA's.
        shards: Over how many processes the linear layers of the base are split (``train.shard_base``).
        embedding_on_host: Whether the input embedding stays in host memory (``train.embedding_on_host``).
        embedding_is_movable: Whether it could: not tied, not trained, not split.
        fast: Whether it takes the fused path (``train.fast``), where that knows the layers.
        full_logits: Whether the loss needs all logits at once (label smoothing).
        trains_head: Whether the head is trained whole.
        uncounted: Settings that change memory in ways that are not counted.
    """

    architecture: Architecture
    layers: tuple[tuple[Pair, ...], ...]
    batch_size: int
    length: int
    trained_whole: int = 0
    accumulation: int = 1
    eval_batch_size: int = 0
    eval_length: int = 0
    most_rows: int = 0
    checkpointing: bool = False
    checkpointed_layers: int | None = None
    optim: str = "adamw_torch"
    load_in_4bit: bool = True
    double_quant: bool = True
    compute_bytes: int = 2
    device: Device = "cuda"
    flash: bool = True
    packing: bool = False
    dropout: bool = False
    use_dora: bool = False
    shards: int = 1
    embedding_on_host: bool = False
    embedding_is_movable: bool = False
    fast: bool = False
    full_logits: bool = False
    trains_head: bool = False
    uncounted: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Of a micro-batch, padding included."""
        return self.rows * self.length

    @property
    def rows(self) -> int:
        """Of a micro-batch: no more than there are."""
        return min(self.batch_size, self.most_rows) if self.most_rows else self.batch_size

    @property
    def recomputed(self) -> int:
        """How many blocks, from the first on, keep their input alone and are computed again."""
        if not self.checkpointing:
            return 0
        return len(self.layers) if self.checkpointed_layers is None else min(self.checkpointed_layers, len(self.layers))

    @property
    def effective_batch(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.accumulation

    @property
    def trainable(self) -> int:
        """Numbers that are trained."""
        pairs = sum(count * sum(pair.parameters for pair in block) for block, count in self.kinds.items())
        return pairs + self.trained_whole

    @property
    def kinds(self) -> Counter[tuple[Pair, ...]]:
        """Blocks of different pairs, and how many there are of each; mostly one."""
        return Counter(self.layers)

    def kinds_of(self, first: int, last: int) -> Counter[tuple[Pair, ...]]:
        """As ``kinds``, of the blocks from ``first`` up to before ``last``."""
        return Counter(self.layers[first:last])

    @property
    def fused_head(self) -> bool:
        """Whether the fused path scores the labels; label smoothing asks for logits, and it knows no trained head."""
        return self.fast and not (self.full_logits or self.trains_head)

    @property
    def masked(self) -> bool:
        """Whether attention gets a mask of its own: rows of unequal length, packed rows, or a window that bites.

        Without one, transformers 5 leaves the mask out and SDPA is told ``is_causal``.
        """
        window = self.architecture.sliding_window
        if self.fast and window is None:  # `segment_attention` needs none
            return False
        return self.rows > 1 or self.packing or (window is not None and self.length >= window)

    @property
    def in_one_row(self) -> bool:
        """Whether the layers see a micro-batch as one sequence: packed or, on the fused path, without its padding."""
        unpadded = self.fused_head and not self.dropout and self.architecture.sliding_window is None and self.rows > 1
        return self.packing or unpadded

    def with_(self, **changes: Any) -> Workload:
        """The same run with other settings."""
        return replace(self, **changes)


def require_no_more_layers(checkpointed: int | None, layers: int, *, base: str) -> None:
    """Compare ``train.checkpointed_layers`` with the layers that the base has.

    Raises:
        ConfigError: It is more.
    """
    if checkpointed is not None and checkpointed > layers:
        raise ConfigError(
            f"train.checkpointed_layers is {checkpointed}, and {base} has {layers} layers",
            expected=f"1 to {layers}, or null for all",
            fix="remove it to checkpoint all layers, or lower it",
        )


def workload_of(
    config: RunConfig,
    architecture: Architecture,
    *,
    base_config: Mapping[str, Any],
    device: Device = "cuda",
    bf16: bool = True,
) -> Workload:
    """The workload of a config.

    Args:
        config: The run.
        architecture: Of its base.
        base_config: The base's ``config.json``; an already quantized base brings its own 4-bit settings.
        device: Where it is trained.
        bf16: Whether the GPU computes in bfloat16, as NVIDIA's do from Ampere on.
    """
    train, quantization = config.train, config.quantization
    more = train.model_extra or {}
    compute = quantization.bnb_4bit_compute_dtype
    compute_bytes = 4 if compute == "float32" or (compute == "auto" and device == "cpu") else 2
    load_in_4bit, double_quant = quantization.load_in_4bit, quantization.bnb_4bit_use_double_quant
    stored = base_config.get("quantization_config")
    if isinstance(stored, Mapping):  # the checkpoint's own settings win while it is loaded
        load_in_4bit, double_quant = True, stored.get("bnb_4bit_use_double_quant") is True
    validates = any(part.section.validation for part in config.parts()) and train.eval_strategy != "no"
    return Workload(
        architecture=architecture,
        layers=lora_pairs(architecture, config.lora),
        trained_whole=_trained_whole(architecture, config.lora),
        batch_size=train.per_device_train_batch_size,
        length=train.max_length,
        accumulation=train.gradient_accumulation_steps,
        eval_batch_size=more.get("per_device_eval_batch_size", DEFAULT_EVAL_BATCH) if validates else 0,
        checkpointing=train.gradient_checkpointing,
        checkpointed_layers=train.checkpointed_layers,
        optim=train.optim,
        load_in_4bit=load_in_4bit,
        double_quant=double_quant,
        compute_bytes=compute_bytes,
        device=device,
        flash=device == "cpu" or (bf16 and compute_bytes == 2),
        packing=train.packing,
        dropout=config.lora.lora_dropout > 0,
        use_dora=config.lora.use_dora,
        shards=process_count() if train.shard_base else 1,
        embedding_on_host=train.embedding_on_host,
        embedding_is_movable=not (architecture.tied or trains_embedding(config.lora) or train.shard_base),
        fast=_is_fast(config, load_in_4bit=load_in_4bit, device=device),
        full_logits=more.get("label_smoothing_factor", 0.0) > 0,
        trains_head=_settings(config.lora).saves_tensor(f"{HEAD}.weight"),
        uncounted=tuple(
            f"train.{name}" for name, usual in _UNCOUNTED.items() if more.get(name, usual) not in (usual, None)
        ),
    )


def _is_fast(config: RunConfig, *, load_in_4bit: bool, device: Device) -> bool:
    """Whether ``training.fitting`` lets the fused path in and it takes the layers.

    ``auto`` may leave it on a GPU, where a trial decides: the libraries' own path, which takes more, is counted there.
    """
    more = config.train.model_extra or {}
    uncounted = any(more.get(name, usual) not in (usual, None) for name, usual in _UNCOUNTED.items())
    wanted = config.train.fast == "on" or (config.train.fast == "auto" and device == "cpu")
    return wanted and load_in_4bit and not config.lora.use_dora and process_count() == 1 and not uncounted


def lora_pairs(architecture: Architecture, lora: LoraSection) -> tuple[tuple[Pair, ...], ...]:
    """The LoRA pairs of each block, chosen by PEFT's rules."""
    settings = _settings(lora)
    blocks: list[list[Pair]] = [[] for _ in range(architecture.layers)]
    for tensor, plan in architecture.tensors().items():
        module = tensor.removesuffix(".weight")
        if plan.part in ("attention", "mlp") and len(plan.shape) == 2 and settings.targets(module):
            block = int(module.split(".")[2])  # model.layers.7.mlp.up_proj
            pair = Pair(module.rpartition(".")[2], plan.shape[0], plan.shape[1], settings.rank_of(module))
            blocks[block].append(pair)
    return tuple(tuple(block) for block in blocks)


def trains_embedding(lora: LoraSection) -> bool:
    """Whether the section names the input embedding: as a target, to be saved whole, or by rows of tokens."""
    settings = _settings(lora)
    targeted = lora.target_modules != "all-linear" and settings.targets(_EMBEDDING)
    return targeted or settings.saves_tensor(f"{_EMBEDDING}.weight") or isinstance(lora.trainable_token_indices, tuple)


def _settings(lora: LoraSection) -> LoraSettings:
    return LoraSettings(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=lora.target_modules,
        exclude_modules=() if lora.exclude_modules is None else lora.exclude_modules,
        layers_to_transform=None,
        layers_pattern=(),
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        modules_to_save=lora.modules_to_save,
        trainable_token_indices={},
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        ensure_weight_tying=False,
        base_model_name_or_path=None,
        peft_version=None,
    )


def _trained_whole(architecture: Architecture, lora: LoraSection) -> int:
    """Parameters of the modules that ``lora.modules_to_save`` names; a tied head is copied, too."""
    shapes = {tensor: plan.shape for tensor, plan in architecture.tensors().items()}
    shapes[f"{HEAD}.weight"] = (architecture.vocab_size, architecture.hidden_size)
    settings = _settings(lora)
    return sum(prod(shape) for tensor, shape in shapes.items() if settings.saves_tensor(tensor))
