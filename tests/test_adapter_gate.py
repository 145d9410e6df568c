"""The gate lets PEFT's own adapters through and stops what PEFT would load in silence."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from qlora_kit.adapters import check_adapter_folder, pair_faults
from qlora_kit.adapters.lora_settings import read_lora_settings
from qlora_kit.errors import AdapterError

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS = dict[str, torch.Tensor]


def make_adapter(folder: Path, **settings: Any) -> tuple[Path, Any]:
    """A PEFT adapter of a random two-layer Qwen2, saved by PEFT; returns its folder and the PEFT model."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(**settings))
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter; tests change copies of it."""
    return make_adapter(tmp_path_factory.mktemp("sound"))[0]


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound adapter that a test may spoil."""
    return shutil.copytree(sound, tmp_path / "adapter")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[TENSORS], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear", "r": 16},
        {"target_modules": r".*\.self_attn\.(q|k)_proj"},
        {"use_rslora": True, "lora_alpha": 3},
        {"use_dora": True},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        {"rank_pattern": {r".*\.1\.self_attn\.[qv]_proj": 3}},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1, 5]},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"task_type": None},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_what_peft_saves_passes_and_is_described_as_peft_has_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder, model = make_adapter(tmp_path, **settings)
    files = check_adapter_folder(folder)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and "default" in module.lora_A
    }
    assert files.pairs.keys() == layers.keys()
    for name, layer in layers.items():
        pair = files.pairs[name]
        assert (pair.r, pair.in_features, pair.out_features) == (
            layer.r["default"],
            layer.in_features,
            layer.out_features,
        )
        assert files.config.scaling_of(name) == pytest.approx(layer.scaling["default"])
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in Qwen2ForCausalLM(model.config).named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert pair_faults(files, shapes) == []
    tensors = load_file(folder / "adapter_model.safetensors")
    others = {name for name in tensors if ".lora_A." not in name and ".lora_B." not in name}
    assert {*files.extra_tensors, *files.base_tensors} == others
    assert bool(files.base_tensors) == (settings.get("bias", "none") != "none")


def test_half_precision_passes(adapter: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        path = adapter / "adapter_model.safetensors"
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
        assert check_adapter_folder(adapter).pairs


def poison(value: float, dtype: torch.dtype) -> Callable[[TENSORS], Any]:
    def change(tensors: TENSORS) -> None:
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)
        tensors[f"{Q0}.lora_B.weight"][3, 1] = value

    return change


BAD_TENSORS: dict[str, tuple[Callable[[TENSORS], Any], str]] = {
    "base weight": (lambda t: t.update({f"{Q0}.base_layer.weight": torch.zeros(32, 32)}), "not declared"),
    "base weight, plain": (lambda t: t.update({f"{Q0}.weight": torch.zeros(32, 32)}), "not declared"),
    "norm": (lambda t: t.update({"base_model.model.model.norm.weight": torch.ones(32)}), "not declared"),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(64, 32)}),
        "not declared",
    ),
    "head": (lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(64, 32)}), "not declared"),
    "bias": (lambda t: t.update({f"{Q0}.bias": torch.ones(32)}), "not declared"),
    "wrapped bias": (lambda t: t.update({f"{Q0}.base_layer.bias": torch.ones(32)}), "not declared"),
    "magnitude": (lambda t: t.update({f"{Q0}.lora_magnitude_vector": torch.ones(32)}), "not declared"),
    "tokens": (
        lambda t: t.update(
            {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 32)}
        ),
        "not declared",
    ),
    "bias of B": (lambda t: t.update({f"{Q0}.lora_B.bias": torch.ones(32)}), "not declared"),
    "no prefix": (
        lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}),
        "not declared",
    ),
    "untargeted pair": (
        lambda t: t.update({k.replace("q_proj", "o_proj"): v.clone() for k, v in t.items() if "q_proj" in k}),
        "not declared",
    ),
    "name of an adapter": (lambda t: t.update({f"{Q0}.lora_A.default.weight": torch.ones(4, 32)}), "not declared"),
    "embedding factors": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}),
        "not declared",
    ),
    "missing B": (lambda t: t.pop(f"{Q0}.lora_B.weight"), "is missing"),
    "missing A": (lambda t: t.pop(f"{Q0}.lora_A.weight"), "is missing"),
    "no tensors": (lambda t: t.clear(), "no LoRA pair"),
    "rank of A": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(8, 32)}), "the rank"),
    "rank of B": (lambda t: t.update({f"{Q0}.lora_B.weight": torch.ones(32, 2)}), "the rank"),
    "swapped": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(32, 4)}), "the rank"),
    "one dimension": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(128)}), "the rank"),
    "convolution": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, 1, 1)}), "the rank"),
    "empty": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 0)}), "the rank"),
    "integers": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}), "dtype I32"),
    "bytes": (lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32, dtype=torch.uint8)}), "dtype U8"),
    "8-bit floats": (
        lambda t: t.update({f"{Q0}.lora_A.weight": torch.ones(4, 32).to(torch.float8_e4m3fn)}),
        "dtype F8_E4M3",
    ),
    "NaN": (poison(float("nan"), torch.float32), "1 values that are NaN or infinite"),
    "infinite": (poison(float("inf"), torch.float32), "NaN or infinite"),
    "NaN, bf16": (poison(float("nan"), torch.bfloat16), "NaN or infinite"),
    "infinite, bf16": (poison(float("-inf"), torch.bfloat16), "NaN or infinite"),
    "NaN, fp16": (poison(float("nan"), torch.float16), "NaN or infinite"),
    "infinite, fp64": (poison(float("inf"), torch.float64), "NaN or infinite"),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_refused(adapter: Path, kind: str) -> None:
    change, expected = BAD_TENSORS[kind]
    change_tensors(adapter, change)
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(adapter)
    assert expected in str(caught.value)


BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "another method": {"peft_type": "IA3"},
    "no method": {"peft_type": None},
    "rank 0": {"r": 0},
    "rank above the bound": {"r": 1025},
    "rank a flag": {"r": True},
    "rank a text": {"r": "4"},
    "another rank": {"r": 8},
    "alpha negative": {"lora_alpha": -1},
    "alpha a text": {"lora_alpha": "8"},
    "alpha beyond": {"lora_alpha": 1e9},
    "no targets": {"target_modules": []},
    "targets null": {"target_modules": None},
    "targets numbers": {"target_modules": [1]},
    "targets with a path": {"target_modules": ["../q_proj"]},
    "broken expression": {"target_modules": "(q_proj"},
    "exponential expression": {"target_modules": "(a+)+q_proj"},
    "long expression": {"target_modules": "q_proj|" * 1000},
    "rank pattern a list": {"rank_pattern": [4]},
    "rank pattern beyond": {"rank_pattern": {"q_proj": 5000}},
    "rank pattern unlike the tensors": {"rank_pattern": {"q_proj": 8}},
    "alpha pattern of texts": {"alpha_pattern": {"q_proj": "8"}},
    "unknown bias": {"bias": "some"},
    "modules to save a text": {"modules_to_save": "lm_head"},
    "DoRA without magnitudes": {"use_dora": True},
    "flag a text": {"use_rslora": "yes"},
    "initialisation that rewrites the base": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "code to import": {"auto_mapping": {"base_model_class": "x", "parent_library": "antigravity"}},
    "remote code": {"auto_map": {"AutoModel": "evil.Model"}},
    "bias of B": {"lora_bias": True},
    "copied layers": {"layer_replication": [[0, 2]]},
    "parameters": {"target_parameters": ["mlp.weight"]},
    "QA-LoRA": {"use_qalora": True},
    "activated LoRA": {"alora_invocation_tokens": [1]},
    "transposed weights": {"fan_in_fan_out": True},
    "megatron": {"megatron_config": {"a": 1}},
    "a setting of tomorrow": {"use_something_new": True},
    "classification": {"task_type": "SEQ_CLS"},
    "tokens of texts": {"trainable_token_indices": ["a"]},
}


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings_are_refused(adapter: Path, kind: str) -> None:
    change_config(adapter, **BAD_SETTINGS[kind])
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(adapter)
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff\xfe", b'{"r":1,"r":2}', b'{"lora_alpha":NaN}', b" " * 5_000_000]
)
def test_unreadable_settings_are_refused(adapter: Path, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        check_adapter_folder(adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "qlora_kit.json"])
def test_links_missing_files_and_pipes_are_refused(adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / "qlora_kit.json").write_text("{}")
    (adapter / name).rename(tmp_path / "elsewhere")
    if name != "qlora_kit.json":
        with pytest.raises(AdapterError, match="no such file"):
            check_adapter_folder(adapter)
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="symbolic link"):
        check_adapter_folder(adapter)
    (adapter / name).unlink()
    os.mkfifo(adapter / name)
    with pytest.raises(AdapterError, match="not a regular file"):
        check_adapter_folder(adapter)


class Canary:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize(
    "name", ["adapter_model.bin", "adapter_model.pt", "x.pkl", "x.PTH", "pytorch_model.bin", "x.ckpt"]
)
@pytest.mark.parametrize("beside", [True, False])
def test_pickles_are_refused_unread(adapter: Path, tmp_path: Path, name: str, beside: bool) -> None:
    (adapter / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    if not beside:
        (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="pickle"):
        check_adapter_folder(adapter)
    assert not (tmp_path / "canary").exists()


def test_the_trainers_own_state_is_left_alone(adapter: Path, tmp_path: Path) -> None:
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (adapter / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    assert check_adapter_folder(adapter).pairs
    assert not (tmp_path / "canary").exists()


def test_a_missing_folder_and_a_cut_file_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        check_adapter_folder(tmp_path / "none")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="the tensors end at byte"):
        check_adapter_folder(adapter)


def test_many_faults_are_cut_short(adapter: Path) -> None:
    change_tensors(adapter, lambda tensors: tensors.update({f"base.{index}": torch.ones(1) for index in range(100)}))
    with pytest.raises(AdapterError, match="and 80 more faults") as caught:
        check_adapter_folder(adapter)
    assert len(caught.value.faults) == 21


def test_an_adapter_of_another_base_is_told_layer_by_layer(adapter: Path) -> None:
    files = check_adapter_folder(adapter)
    shapes = {f"model.layers.{layer}.self_attn.{name}": (16, 32) for layer in (0, 2) for name in ("q_proj", "v_proj")}
    whats = [fault.what for fault in pair_faults(files, shapes)]
    assert len(whats) == 5
    assert sum("which the base lacks" in what for what in whats) == 2
    assert sum("as (32, 32)" in what for what in whats) == 1
    assert sum("has no tensors for" in what for what in whats) == 2


def test_declared_magnitudes_must_fit(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path, use_dora=True)
    change_tensors(folder, lambda tensors: tensors.update({f"{Q0}.lora_magnitude_vector": torch.ones(31)}))
    with pytest.raises(AdapterError, match="has shape"):
        check_adapter_folder(folder)


def test_declared_tokens_must_be_as_many(tmp_path: Path) -> None:
    folder, _ = make_adapter(tmp_path, trainable_token_indices=[1, 5])
    change_config(folder, trainable_token_indices=[1, 5, 6])
    with pytest.raises(AdapterError, match="not declared"):
        check_adapter_folder(folder)


def test_settings_are_bounded_before_a_pattern_is_tried(adapter: Path) -> None:
    change_config(adapter, target_modules=".*a.*a.*a.*aq_proj")
    settings = read_lora_settings(adapter / "adapter_config.json")
    assert settings.targets("aaaaq_proj")
    assert not settings.targets("a" * 500 + "q_proj")
