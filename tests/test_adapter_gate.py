"""The gate lets PEFT's own adapters through and stops what PEFT would load in silence."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.bad_adapters import (
    BAD_FOLDERS,
    BAD_SETTINGS,
    BAD_TENSORS,
    Q0,
    Canary,
    change_config,
    change_tensors,
    make_adapter,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import Qwen2ForCausalLM

from qlora_kit.adapters import check_adapter_folder, pair_faults
from qlora_kit.adapters.lora_settings import read_lora_settings
from qlora_kit.errors import AdapterError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter; tests change copies of it."""
    return make_adapter(tmp_path_factory.mktemp("sound"))[0]


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound adapter that a test may spoil."""
    return shutil.copytree(sound, tmp_path / "adapter")


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


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_are_refused(adapter: Path, kind: str) -> None:
    change, expected = BAD_TENSORS[kind]
    change_tensors(adapter, change)
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(adapter)
    assert expected in str(caught.value)


@pytest.mark.parametrize("kind", BAD_SETTINGS)
def test_bad_settings_are_refused(adapter: Path, kind: str) -> None:
    change_config(adapter, **BAD_SETTINGS[kind])
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(adapter)
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_refused(adapter: Path, tmp_path: Path, kind: str) -> None:
    BAD_FOLDERS[kind](adapter)
    with pytest.raises(AdapterError) as caught:
        check_adapter_folder(adapter)
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)
    assert len(str(caught.value)) < 20_000
    assert not (tmp_path / "canary").exists()


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
    shapes = {f"model.layers.{layer}.self_attn.{name}": (32, 64) for layer in (0, 2) for name in ("q_proj", "v_proj")}
    whats = [fault.what for fault in pair_faults(files, shapes)]
    assert len(whats) == 5
    assert sum("which the base lacks" in what for what in whats) == 2
    assert sum("as (64, 64)" in what for what in whats) == 1
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
