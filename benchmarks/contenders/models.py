"""The models of the training benchmarks' contenders: one random base, with the adapter that each of them attaches."""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from benchmarks.memory_gpu import COMMON, random_base
from benchmarks.memory_gpu import SHAPES as PLANNED_SHAPES
from qlora_kit.architecture import read_architecture
from qlora_kit.base_files import resolve_base
from qlora_kit.config import LoraSection
from qlora_kit.models import attach_lora, load_tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2_048, "tie_word_embeddings": True,
    },
    # 7B's proportions: MLP 5.3 times as wide as the model, a head of 9 % of the layers' weights
    "0.1B": {
        "hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 10_240, "tie_word_embeddings": True,
    },
    "7B": PLANNED_SHAPES["7B"],
}  # fmt: skip
PLAIN = "TRL + PEFT"
SHIPPED = "TRL + PEFT, bf16 adapter"
LIGER = "the same, liger"
UNSLOTH = "Unsloth"
KIT = "kit"
HALF = "kit, half of the layers checkpointed"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Setting:
    """What all contenders train alike.

    Attributes:
        shape: One of ``SHAPES``.
        rows: In a batch.
        length: Longest row, in tokens.
        steps: Optimizer steps.
        checkpointing: Whether activations are computed again.
        packing: Whether rows are put together to sequences of ``length``.
        shortest: Share of ``length`` that the shortest row has; lengths between are equally likely.
        supervised: Share of each row that counts in the loss: its end.
        dtype: Compute dtype, by its name in torch.
    """

    shape: str = "0.1B"
    rows: int = 2
    length: int = 512
    steps: int = 6
    checkpointing: bool = True
    packing: bool = False
    shortest: float = 0.5
    supervised: float = 0.5
    dtype: str = "float32"


def missing(name: str) -> str | None:
    """Why a contender cannot run here; None where it can."""
    if name != LIGER:
        return None
    for package, module in (("liger-kernel", "liger_kernel"), ("triton", "triton")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "triton's kernels need a GPU"
    return None


def contender_model(name: str, setting: Setting, device: torch.device, folder: Path) -> Any:
    """A contender's model with its adapter on the random base; ``folder`` is for what must come from files."""
    config = {**COMMON, **SHAPES[setting.shape]}
    dtype = getattr(torch, setting.dtype)
    torch.manual_seed(0)
    base = random_base(read_architecture(config, where=setting.shape), config, device, dtype)
    if name == UNSLOTH:
        _write_4bit(base, folder)
        del base
        return _unsloth_model(setting, dtype, folder)
    if name == LIGER:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        # The loss stays TRL's: its trainer asks the model for log-probabilities, which liger's head does not give.
        apply_liger_kernel_to_qwen2(model=base, fused_linear_cross_entropy=False)
    return attach_lora(base, LoraSection(r=RANK, lora_alpha=ALPHA))


def _unsloth_model(setting: Setting, dtype: torch.dtype, folder: Path) -> Any:
    """The base from ``folder`` as Unsloth's own guide loads it, with the adapter that the others get."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=setting.length, dtype=dtype, load_in_4bit=True, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        target_modules=list(LINEARS),
        use_gradient_checkpointing="unsloth" if setting.checkpointing else False,
        max_seq_length=setting.length,
    )


def _write_4bit(base: Any, folder: Path) -> None:
    """The random base as a checkpoint that is quantized already, with a tokenizer beside it."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=base.dtype,
    )
    base.config.quantization_config = quantization
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    tied = {"lm_head.weight"} if base.config.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in base.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    load_tokenizer(resolve_base("tiny")).save_pretrained(folder)


def same_adapter(model: Any) -> None:
    """Give every A matrix the values that it has in all contenders: uniform, as PEFT begins them. B is zero."""
    source = torch.Generator().manual_seed(1)
    for _, matrix in sorted((name, weight) for name, weight in model.named_parameters() if "lora_A" in name):
        values = torch.rand(matrix.shape, generator=source).mul_(2).sub_(1).div_(math.sqrt(matrix.shape[1]))
        matrix.data.copy_(values)
