"""Small 4-bit models with LoRA for the tests of the fused path, and their losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from qlora_kit.four_bit import keep_4bit_weights_as_they_are

VOCABULARY = 300
OF_FAMILY: dict[str, dict[str, Any]] = {"qwen2": {}, "qwen3": {"head_dim": 32}, "llama": {}, "mistral": {}}
OF_FAMILY["mistral"] = {"sliding_window": None}


def base_model(family: str = "qwen2", *, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    """Two layers with random weights, the norms' and biases' too, the linear layers in NF4."""
    torch.manual_seed(0)
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values | OF_FAMILY[family] | settings))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.2)
    model.to(dtype)
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            layer = Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                quant_type="nf4",
            )
            layer.load_state_dict(module.state_dict())
            layer.to(dtype)
            model.model.layers.set_submodule(name, layer.to("cpu"))
    keep_4bit_weights_as_they_are(model, dtype)
    model.is_loaded_in_4bit = True
    return model.requires_grad_(False)


def with_lora(base: torch.nn.Module, **settings: Any) -> PeftModel:
    """An adapter of rank 4 in fp32 that changes something, and TRL's head."""
    torch.manual_seed(1)
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(**values | settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    return model.train()


def padded_batch() -> dict[str, torch.Tensor]:
    """Three rows padded on the right, whose first tokens are not supervised."""
    ids = torch.randint(VOCABULARY, (3, 17), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 12:], mask[2, 5:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_batch() -> dict[str, torch.Tensor]:
    """Four conversations in one sequence, one of them of a single token."""
    ids = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(3))
    positions = torch.cat([torch.arange(length) for length in (9, 1, 20, 10)]).unsqueeze(0)
    labels = ids.masked_fill(positions < 2, -100)
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: the loss, each trained weight's gradient, and the figures beside the loss."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    entropy: torch.Tensor
    is_top1: torch.Tensor

    def distance(self, other: Pass) -> float:
        """The largest relative difference between gradients, and none may be zero."""
        assert self.gradients.keys() == other.gradients.keys()
        assert all(grad.norm() > 0 for grad in other.gradients.values())
        pairs = [(self.gradients[name], grad) for name, grad in other.gradients.items()]
        return max(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in pairs)

    def whole_distance(self, other: Pass) -> float:
        """The relative difference of all gradients, taken as one vector."""
        difference = [self.gradients[name] - grad for name, grad in other.gradients.items()]
        total = torch.nn.utils.get_total_norm(list(other.gradients.values()))
        return float(torch.nn.utils.get_total_norm(difference) / total)


def one_pass(model: PeftModel, call: Callable[..., Any], batch: dict[str, torch.Tensor]) -> Pass:
    """The mean loss of ``call``, which takes the batch as TRL's trainer gives it, and what follows from it."""
    model.zero_grad()
    torch.manual_seed(4)
    base = model.get_base_model()
    with torch.autocast("cpu", torch.bfloat16, enabled=base.dtype == torch.bfloat16):
        output = call(**batch, fused_lm_head=True, use_cache=False)
    loss = -output.log_probs.sum() / (batch["labels"] != -100).sum()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Pass(loss.detach(), gradients, output.entropy.detach(), output.is_top1)
