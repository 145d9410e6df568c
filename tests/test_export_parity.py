"""llama.cpp computes, tokenises, renders and stops as transformers does, on files that the kit wrote."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_level_tokenizer, trl_template
from gguf_models import llama3_tokenizer, mistral_tokenizer, random_model, save_base
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qlora_kit.base_files import TINY_FOLDER
from qlora_kit.export.gguf_check import check_gguf, require_agreement
from qlora_kit.export.gguf_lora import AdaptedWeights, write_gguf_lora
from qlora_kit.export.gguf_model import write_gguf
from qlora_kit.export.gguf_results import GgufCheck
from qlora_kit.export.gguf_weights import GgufWeights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed (extra gguf-test)"),
]
ADAPTERS = Path(__file__).resolve().parent.parent / "adapters"
TASKS = ("text_generation", "question_answering", "translation", "sentiment", "code_generation")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 500.0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 linear": ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2 yarn factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.5, "beta_fast": 16.0}}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("llama", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    "mistral": ("mistral", {"sliding_window": None}),
}


def base_of(variant: str, folder: Path) -> Path:
    """A random base of the variant, with the tokenizer of its family."""
    family, settings = VARIANTS[variant]
    if family in ("qwen2", "qwen3"):
        tokenizer = byte_level_tokenizer("qwen", "qwen2_5" if family == "qwen2" else "qwen3", eos_token="<|im_end|>")
    elif family == "llama":
        tokenizer = llama3_tokenizer(trl_template("llama3"))
    else:
        tokenizer = mistral_tokenizer()
    size = len(tokenizer) + 13  # a padded vocabulary
    return save_base(folder, random_model(family, size, eos_token_id=tokenizer.eos_token_id, **settings), tokenizer)


def require_equal(check: GgufCheck) -> None:
    """Nothing but fp32 sums in another order."""
    assert check.problems == ()
    assert check.logits.max_abs <= 1e-3
    assert check.logits.top1_agreement > 0.99


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family_computes_and_tokenises_alike(variant: str, tmp_path: Path) -> None:
    base = base_of(variant, tmp_path / "base")
    check = check_gguf(write_gguf(base, tmp_path / "m.gguf", quant="f32"), base)
    require_equal(check)
    assert check.weights.max_abs == 0


@pytest.mark.parametrize("prefix", ["first", "never"])
def test_rules_for_the_first_space_come_to_the_same(prefix: str, tmp_path: Path) -> None:
    tokenizer = mistral_tokenizer(prefix=prefix)
    model = random_model("mistral", len(tokenizer), eos_token_id=2, sliding_window=None)
    base = save_base(tmp_path / "base", model, tokenizer)
    check = check_gguf(write_gguf(base, tmp_path / "m.gguf", quant="f32"), base)
    assert check.logits.max_abs <= 1e-3
    assert check.same_template


@pytest.mark.parametrize("variant", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_alone_is_scaled_as_peft_scales_it(variant: str, rslora: bool, tmp_path: Path) -> None:
    base = base_of(variant, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora, init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    file = write_gguf(base, tmp_path / "m.gguf", quant="f32")
    lora = write_gguf_lora(tmp_path / "adapter", base, tmp_path / "a.gguf")
    require_equal(check_gguf(file, base, lora=lora, adapter_dir=tmp_path / "adapter"))
    # the reference of that check is PEFT's own model
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path / "adapter"
    )
    merged = loaded.merge_and_unload().state_dict()
    from qlora_kit.architecture import read_architecture
    from qlora_kit.base_files import BaseRef, read_model_config

    shape = read_architecture(read_model_config(BaseRef("base", base)), where="config.json")
    weights = AdaptedWeights(GgufWeights(file.path, shape), tmp_path / "adapter")
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        found = torch.cat([rows.result for rows in weights.blocks(name)])
        torch.testing.assert_close(found, merged[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_tiny_agrees_in_every_format(quant: str, tmp_path: Path) -> None:
    check = check_gguf(write_gguf(TINY_FOLDER, tmp_path / "m.gguf", quant=quant), TINY_FOLDER)
    require_agreement(check, write_gguf(TINY_FOLDER, tmp_path / "again.gguf", quant=quant))
    assert check.further_stop_ids == ()


@pytest.mark.skipif(
    shutil.which(os.environ.get("QLORA_KIT_LLAMA_QUANTIZE", "llama-quantize")) is None, reason="no llama-quantize"
)
@pytest.mark.parametrize("quant", ["q6_k", "q5_k_m", "q4_k_m"])
def test_k_quants_agree(quant: str, tmp_path: Path) -> None:
    file = write_gguf(TINY_FOLDER, tmp_path / "m.gguf", quant=quant)
    require_agreement(check_gguf(file, TINY_FOLDER), file)
    assert file.types["Q6_K"] >= 1


@pytest.mark.parametrize("task", TASKS)
def test_each_shipped_adapter_agrees_merged_and_alone(task: str, tmp_path: Path) -> None:
    from qlora_kit.adapters import AdapterContract
    from qlora_kit.merging import merge_adapter

    adapter = ADAPTERS / task
    prompt = AdapterContract.load(adapter).system_prompt
    merge_adapter(adapter, tmp_path / "merged", onto="dequantized", verify=False)
    for quant in ("f32", "f16", "q8_0"):
        file = write_gguf(tmp_path / "merged", tmp_path / f"{quant}.gguf", quant=quant)
        require_agreement(check_gguf(file, tmp_path / "merged", system_prompt=prompt), file)
    base = write_gguf(TINY_FOLDER, tmp_path / "base.gguf", quant="f32")
    lora = write_gguf_lora(adapter, TINY_FOLDER, tmp_path / "adapter.gguf")
    require_equal(check_gguf(base, TINY_FOLDER, system_prompt=prompt, lora=lora, adapter_dir=adapter))
