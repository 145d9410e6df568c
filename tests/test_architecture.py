"""Sizes and parameters read from config.json equal those of the models that transformers builds from it, and PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qlora_kit.architecture import PARTS, Architecture, read_architecture, weight_differences
from qlora_kit.errors import BaseModelError
from qlora_kit.safetensors_header import locate_tensors

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {  # what makes each family's arithmetic its own
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "qwen3-default-head": {"model_type": "qwen3"},
    "llama": {"model_type": "llama"},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-no-groups": {"model_type": "llama", "num_key_value_heads": None},
    "mistral": {"model_type": "mistral"},
    "mistral-wide-head": {"model_type": "mistral", "head_dim": 32, "attention_bias": True},  # which it ignores
}
# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
}


def build(config: dict[str, Any]) -> PreTrainedModel:
    """The model of transformers, without memory for its weights."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))


def part_of(name: str) -> str:
    for part, mark in (("norms", "norm"), ("attention", "self_attn"), ("mlp", "mlp"), ("embedding", "embed_tokens")):
        if mark in name:
            return part
    assert name == "lm_head.weight"
    return "head"


def small(**changes: Any) -> Architecture:
    return read_architecture({"model_type": "llama", **SMALL, **changes}, where="config.json")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_and_parameters_equal_those_of_transformers(family: str, tied: bool) -> None:
    config = {**SMALL, **FAMILIES[family], "tie_word_embeddings": tied}
    model = build(config)
    expected = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():  # a tied head is listed once, as the embedding
        expected[part_of(name)] += parameter.numel()

    architecture = read_architecture(config, where="config.json")
    shapes = {name: plan.shape for name, plan in architecture.tensors().items()}
    assert shapes == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert architecture.parameters_by_part() == expected
    assert architecture.parameters() == model.num_parameters()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_config_says_the_same(family: str, tmp_path: Path) -> None:
    config = {**SMALL, **FAMILIES[family]}
    settings = {key: value for key, value in config.items() if key != "model_type"}
    AutoConfig.for_model(config["model_type"], **settings).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert read_architecture(saved, where="saved").tensors() == read_architecture(config, where="given").tensors()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_keys_that_are_missing_take_the_defaults_of_transformers(family: str) -> None:
    config = {key: SMALL[key] for key in ("vocab_size", "intermediate_size", "num_hidden_layers")}
    config |= {"model_type": family, "num_attention_heads": 32, "hidden_size": 64}
    reference = AutoConfig.for_model(**config)
    architecture = read_architecture(config, where="config.json")
    assert architecture.kv_heads == reference.num_key_value_heads
    assert architecture.context_length == reference.max_position_embeddings
    assert architecture.sliding_window == (None if family == "llama" else reference.sliding_window)
    assert architecture.tied is reference.tie_word_embeddings
    assert architecture.rope == reference.rope_parameters
    assert architecture.parameters() == build(config).num_parameters()


@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-biases", "mistral-wide-head"])
def test_lora_targets_are_what_peft_takes(family: str, r: int) -> None:
    config = {**SMALL, **FAMILIES[family]}
    targets = read_architecture(config, where="config.json").lora_targets()
    everything = get_peft_model(build(config), LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert everything.get_nb_trainable_parameters()[0] == sum(target.trainable(r) for target in targets.values())
    assert set(targets) == everything.peft_config["default"].target_modules
    one = get_peft_model(build(config), LoraConfig(r=r, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    assert one.get_nb_trainable_parameters()[0] == targets["down_proj"].trainable(r)


def test_the_published_figures_of_qwen2_5_7b() -> None:
    architecture = read_architecture(QWEN_7B, where="config.json")
    assert architecture.parameters() == 7_615_616_512
    assert (architecture.layers, architecture.heads, architecture.kv_heads, architecture.head_dim) == (28, 28, 4, 128)
    assert (architecture.vocab_size, architecture.tied, architecture.context_length) == (152_064, False, 32_768)
    assert architecture.sliding_window is None
    assert architecture.rope == {"rope_type": "default", "rope_theta": 1_000_000.0}
    assert architecture.dtype == "bfloat16"
    assert sum(target.trainable(16) for target in architecture.lora_targets().values()) == 40_370_176


def test_rope_settings_of_transformers_4_and_5_read_the_same() -> None:
    old = small(rope_theta=5e5, rope_scaling={"type": "yarn", "factor": 4.0})
    new = small(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5})
    assert old.rope == new.rope == {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5}


@pytest.mark.parametrize("family", ["gpt2", "qwen2_moe", None, 3])
def test_another_family_is_refused(family: Any) -> None:
    with pytest.raises(BaseModelError, match=r"model_type is(.|\n)*qwen2, qwen3, llama, mistral"):
        small(model_type=family)


def test_all_faults_of_a_config_are_told_at_once() -> None:
    with pytest.raises(BaseModelError) as caught:
        small(hidden_size=None, num_hidden_layers="3", vocab_size=True, tie_word_embeddings="no", num_key_value_heads=4)
    text = str(caught.value)
    assert len(caught.value.faults) == 5
    for part in ("hidden_size is None", "num_hidden_layers is '3'", "vocab_size is True", "'no'", "6 query heads"):
        assert part in text


# --- the files against the config ---


def differences(folder: Path, **changes: Any) -> tuple[str, ...]:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    return weight_differences(read_architecture(config, where="config"), locate_tensors(folder, error=BaseModelError))


def test_weight_files_of_a_saved_model_agree(random_base: Path) -> None:
    assert differences(random_base) == ()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1.input_layernorm.weight is not described by the config"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight is missing"),
        ({"vocab_size": 7}, "model.embed_tokens.weight has the shape"),
        ({"num_key_value_heads": 2}, "model.layers.0.self_attn.k_proj.weight has the shape [32, 64], not [64, 64]"),
    ],
)
def test_weight_files_that_differ_are_told(random_base: Path, changes: dict[str, Any], expected: str) -> None:
    found = differences(random_base, **changes)
    assert any(expected in line for line in found)
    assert len(found) <= 6


def test_packed_weights_and_a_tied_copy_agree(random_base: Path, tmp_path: Path) -> None:
    """As bitsandbytes saves a 4-bit layer: packed bytes in one column, and its state beside it."""
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(random_base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{name}.absmax"] = torch.zeros(4)
    tensors[name] = torch.zeros(128 * 64 // 2, 1, dtype=torch.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((random_base / "config.json").read_text())
    assert differences(tmp_path, tie_word_embeddings=True) == ()
    tensors[name] = tensors[name][1:].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert [line.split(" has ")[0] for line in differences(tmp_path, tie_word_embeddings=True)] == [name]
