"""Adapters with random factors, as PEFT itself writes them, and what transformers and PEFT answer with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, PreTrainedModel, Qwen2ForCausalLM


def copy_of(base: PreTrainedModel) -> PreTrainedModel:
    """The same model once more, for PEFT to change."""
    copy = Qwen2ForCausalLM(base.config)
    copy.load_state_dict(base.state_dict())
    return copy.eval()


def write_adapter(folder: Path, base: PreTrainedModel, *, seed: int = 0, scale: float = 0.1, **settings: Any) -> Path:
    """An adapter of ``base`` in ``folder``."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(copy_of(base), LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        is_bias = name.endswith(".bias") and parameter.requires_grad  # those that `bias` names
        if "lora_" in name or "modules_to_save" in name or "trainable_tokens" in name or is_bias:
            start = parameter.data if "magnitude" in name or "modules_to_save" in name or is_bias else 0.0
            parameter.data = start + scale * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def with_adapter(base: PreTrainedModel, folder: Path | None) -> Any:
    """A fresh copy of ``base`` with the adapter in ``folder`` on it, by PEFT alone."""
    copy = copy_of(base)
    return copy if folder is None else PeftModel.from_pretrained(copy, folder).eval()


def alone(model: Any, prompt: tuple[int, ...], new: int, **settings: Any) -> list[int]:
    """A row by itself, by transformers' ``generate``, with nothing to stop at."""
    config = GenerationConfig(max_new_tokens=new, pad_token_id=0, **{"do_sample": False, **settings})
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()
