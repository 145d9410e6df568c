"""Contracts say what does not match and why it matters; fingerprints tell bases apart and copies alike."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_kit.adapters import (
    AdapterContract,
    BaseFacts,
    BaseIdentity,
    ContinuedFrom,
    DataFile,
    base_fingerprint,
)
from qlora_kit.errors import AdapterError, BaseModelError

CONTRACT = AdapterContract(
    base=BaseIdentity("Qwen/Qwen2.5-7B-Instruct", "abc", "sampled-1:11"),
    quantization={
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "nf4_codes": {"q": "00ff", "k": "1234"},
    },
    chat_template_sha256="22",
    system_prompt="Is this review positive, négative or neutral?",
    stop_token_ids=(2, 0),
    generation={"max_new_tokens": 8},
    task="sentiment",
    metric_names=("accuracy", "macro_f1"),
    data=(DataFile("train", "train.csv", "33", 2000),),
    config_sha256="44",
    versions={"torch": "2.13.0"},
    created="2026-01-02T03:04:05+00:00",
    kit_version="0.1.0",
    metrics={"accuracy": 0.95},
    continued_from=ContinuedFrom("reviews", "55"),
)
FACTS = BaseFacts(
    id="Qwen/Qwen2.5-7B-Instruct",
    revision="abc",
    fingerprint="sampled-1:11",
    chat_template_sha256="22",
    stop_token_ids=(0, 2),
    quantization=CONTRACT.quantization,
)


def test_a_contract_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = CONTRACT.save(tmp_path)
    assert path.name == "qlora_kit.json"
    assert AdapterContract.load(tmp_path) == AdapterContract.load(path) == CONTRACT
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["format_version"] == 2
    assert content["base"] == {"id": "Qwen/Qwen2.5-7B-Instruct", "revision": "abc", "fingerprint": "sampled-1:11"}
    assert content["stop_token_ids"] == [2, 0]
    assert [item.name for item in tmp_path.iterdir()] == ["qlora_kit.json"]


def test_unknown_keys_are_left_alone(tmp_path: Path) -> None:
    path = CONTRACT.save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 1}))
    assert AdapterContract.load(path) == CONTRACT


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format_version": 3}, "upgrade qlora-kit"),
        ({"format_version": 0}, "format_version is 0"),
        ({"format_version": True}, "format_version is True"),
        ({"format_version": None}, "format_version is missing"),
        ({"base": "x"}, "base is 'x'"),
        ({"base": {"id": "", "revision": None, "fingerprint": "f"}}, "base.id is ''"),
        ({"base": {"id": "x", "fingerprint": "f"}}, "base.revision is missing"),
        ({"quantization": {}}, "quantization is {}"),
        ({"quantization": {"load_in_4bit": True, "nf4_codes": {"a": 1}}}, "nf4_codes"),
        ({"stop_token_ids": []}, "stop_token_ids is []"),
        ({"stop_token_ids": [1.5]}, "stop_token_ids is [1.5]"),
        ({"stop_token_ids": [True]}, "stop_token_ids is [True]"),
        ({"generation": None}, "generation is None"),
        ({"generation": {"max_new_tokens": 0}}, "generation is {'max_new_tokens': 0}"),
        ({"generation": {"max_new_tokens": "8"}}, "generation is {'max_new_tokens': '8'}"),
        ({"task": ""}, "task is ''"),
        ({"metric_names": "accuracy"}, "metric_names is 'accuracy'"),
        ({"data": [1]}, "data[0] is not an object"),
        ({"data": [{"split": "train", "name": "x", "sha256": "y", "rows": -1}]}, "data[0].rows is -1"),
        ({"versions": {"torch": 2}}, "versions is"),
        ({"created": "yesterday"}, "created is 'yesterday'"),
        ({"created": 1}, "created is 1"),
        ({"name": 1}, "name is 1"),
        ({"continued_from": {"name": "reviews"}}, "continued_from is {'name': 'reviews'}"),
        ({"origin": "found"}, "origin is 'found'"),
        ({"origin": ["trained"]}, "origin is ['trained']"),
        ({"not_measured": [1]}, "not_measured is [1]"),
        ({"config_sha256": 1}, "config_sha256 is 1"),
        ({"quantization": {"load_in_4bit": True, "prequantized": 1}}, "prequantized"),
    ],
)
def test_a_spoilt_contract_is_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = CONTRACT.save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError) as caught:
        AdapterContract.load(path)
    assert expected in str(caught.value)


def test_every_missing_key_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "qlora_kit.json").write_text('{"format_version": 2}')
    with pytest.raises(AdapterError) as caught:
        AdapterContract.load(tmp_path)
    fields = {field.name for field in dataclasses.fields(AdapterContract)} - {"name", "continued_from", "combined_from"}
    assert {fault.what.split(": ")[1].split()[0] for fault in caught.value.faults} == fields


VERSION_1 = """{
  "format_version": 1,
  "base": {"id": "tiny", "revision": null, "fingerprint": "sampled-1:11"},
  "quantization": {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true},
  "chat_template_sha256": "22", "system_prompt": "Rules.", "stop_token_ids": [2], "generation": {"max_new_tokens": 8},
  "task": "sentiment", "metric_names": ["accuracy"], "config_sha256": "44", "versions": {"torch": "2.13.0"},
  "data": [{"split": "train", "name": "train.csv", "sha256": "33", "rows": 2000}],
  "created": "2026-01-02T03:04:05+00:00", "kit_version": "0.1.0", "metrics": {"accuracy": 0.95}, "name": "reviews"
}"""


def test_a_contract_of_version_1_is_migrated_and_its_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "qlora_kit.json"
    path.write_text(VERSION_1)
    contract = AdapterContract.load(tmp_path)
    assert (contract.origin, contract.not_measured, contract.name) == ("trained", (), "reviews")
    assert contract.quantization["prequantized"] is False
    assert contract.mismatches(BaseFacts("tiny", fingerprint="sampled-1:11", stop_token_ids=(2,))) == []
    assert path.read_text() == VERSION_1
    contract.save(tmp_path)
    assert json.loads(path.read_text())["format_version"] == 2
    assert AdapterContract.load(tmp_path) == contract


def test_faults_of_a_version_1_contract_are_told_too(tmp_path: Path) -> None:
    (tmp_path / "qlora_kit.json").write_text(VERSION_1.replace('"stop_token_ids": [2]', '"stop_token_ids": []'))
    with pytest.raises(AdapterError, match="stop_token_ids is"):
        AdapterContract.load(tmp_path)
    (tmp_path / "qlora_kit.json").write_text('{"format_version": 1, "quantization": 3}')
    with pytest.raises(AdapterError, match="quantization is 3"):
        AdapterContract.load(tmp_path)


def test_another_system_prompt_is_told_with_its_effect() -> None:
    assert CONTRACT.system_prompt_fault(CONTRACT.system_prompt) is None
    assert dataclasses.replace(CONTRACT, system_prompt=None).system_prompt_fault("") is None
    for requested in (None, "", "Be brief."):
        fault = CONTRACT.system_prompt_fault(requested)
        assert fault is not None
        assert fault.what.startswith(f"system prompt: {requested!r}")
        assert "négative" in fault.expected


def test_a_contract_that_is_no_json_is_neither_read_nor_written(tmp_path: Path) -> None:
    for content in (b"", b"[]", b"{", b"\xff", b'{"a": Infinity}'):
        (tmp_path / "qlora_kit.json").write_bytes(content)
        with pytest.raises(AdapterError, match=r"qlora_kit\.json"):
            AdapterContract.load(tmp_path)
    with pytest.raises(AdapterError, match="cannot be written as JSON"):
        dataclasses.replace(CONTRACT, metrics={"perplexity": float("nan")}).save(tmp_path)
    assert (tmp_path / "qlora_kit.json").read_bytes() == b'{"a": Infinity}'


def test_the_base_of_training_matches() -> None:
    assert CONTRACT.mismatches(FACTS) == []
    CONTRACT.require_match(FACTS)
    assert CONTRACT.mismatches(BaseFacts(id=CONTRACT.base.id)) == []


def test_equal_weights_excuse_another_place() -> None:
    assert CONTRACT.mismatches(dataclasses.replace(FACTS, id="/models/qwen", revision=None)) == []
    assert CONTRACT.mismatches(dataclasses.replace(FACTS, id="/models/qwen", fingerprint=None)) != []
    assert CONTRACT.mismatches(dataclasses.replace(FACTS, fingerprint="full-1:99")) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"id": "other", "fingerprint": None}, ["base: "]),
        ({"revision": "def", "fingerprint": None}, ["base revision: "]),
        ({"fingerprint": "sampled-1:12"}, ["base weights: "]),
        (
            {"id": "other", "revision": "def", "fingerprint": "sampled-1:12"},
            ["base: ", "base revision: ", "base weights: "],
        ),
        ({"quantization": {"load_in_4bit": False}}, ["quantization: trained with load_in_4bit: true"]),
        (
            {"quantization": {**CONTRACT.quantization, "bnb_4bit_quant_type": "fp4"}},
            ['quantization: trained with bnb_4bit_quant_type: "nf4"'],
        ),
        (
            {"quantization": {**CONTRACT.quantization, "bnb_4bit_use_double_quant": False}},
            ["quantization: trained with bnb_4bit_use_double_quant"],
        ),
        ({"quantization": {"load_in_4bit": True, "nf4_codes": {"q": "00fe", "k": "1234"}}}, ["NF4 codes: 1 of 2"]),
        ({"chat_template_sha256": "23"}, ["chat template: "]),
        ({"stop_token_ids": (0,)}, ["stop tokens: "]),
    ],
)
def test_each_mismatch_is_named_with_its_effect(change: dict[str, Any], expected: list[str]) -> None:
    facts = dataclasses.replace(FACTS, **change)
    faults = CONTRACT.mismatches(facts)
    assert len(faults) == len(expected)
    for fault, start in zip(faults, expected, strict=True):
        assert fault.what.startswith(start)
        assert "answers" in fault.what
        assert fault.fix
    with pytest.raises(AdapterError) as caught:
        CONTRACT.require_match(facts)
    assert caught.value.faults == tuple(faults)


# Fingerprint


def make_base(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1, **config: Any) -> Path:
    folder.mkdir()
    content = {"model_type": "qwen2", "hidden_size": 64, "rope_theta": 1e6, "torch_dtype": "float32", **config}
    (folder / "config.json").write_text(json.dumps(content))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    weight_map = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(tensors)}
    for file_name in set(weight_map.values()):
        save_file({name: array for name, array in tensors.items() if weight_map[name] == file_name}, folder / file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """Weights: one tensor larger than what is sampled of it, one smaller, one empty."""
    rng = np.random.default_rng(0)
    sizes = {"large": (400, 64), "small": (3, 5), "empty": (0, 2)}
    return {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}


@pytest.mark.parametrize("full", [False, True])
def test_copies_of_a_base_have_one_fingerprint(tmp_path: Path, tensors: dict[str, np.ndarray], full: bool) -> None:
    one = base_fingerprint(make_base(tmp_path / "one", tensors), full=full)
    assert one.startswith("full-1:" if full else "sampled-1:")
    backwards = dict(reversed(tensors.items()))
    copies = [
        make_base(tmp_path / "sharded", tensors, shards=2),
        make_base(
            tmp_path / "backwards", backwards, transformers_version="9", _name_or_path="x", torch_dtype="bfloat16"
        ),
        make_base(
            tmp_path / "v5", tensors, rope_theta=None, rope_parameters={"rope_theta": 1000000, "rope_type": "default"}
        ),
    ]
    assert {base_fingerprint(copy, full=full) for copy in copies} == {one}


@pytest.mark.parametrize("position", [0, 200, -1])
def test_changed_weights_have_another_fingerprint(
    tmp_path: Path, tensors: dict[str, np.ndarray], position: int
) -> None:
    original = make_base(tmp_path / "one", tensors)
    changed = {name: array.copy() for name, array in tensors.items()}
    changed["large"][position] += 1e-3
    other = make_base(tmp_path / "other", changed)
    assert base_fingerprint(original, full=True) != base_fingerprint(other, full=True)
    if position != 200:
        assert base_fingerprint(original) != base_fingerprint(other)


def test_other_names_shapes_dtypes_and_architecture_have_other_fingerprints(
    tmp_path: Path, tensors: dict[str, np.ndarray]
) -> None:
    folders = [
        make_base(tmp_path / "0", tensors),
        make_base(tmp_path / "1", {"renamed" if name == "small" else name: array for name, array in tensors.items()}),
        make_base(tmp_path / "2", {name: array.reshape(array.shape[::-1]) for name, array in tensors.items()}),
        make_base(tmp_path / "3", {name: array.view(np.int32) for name, array in tensors.items()}),
        make_base(tmp_path / "4", tensors, rope_theta=1e4),
        make_base(tmp_path / "5", tensors, num_attention_heads=8),
        make_base(tmp_path / "6", tensors, rope_scaling={"type": "yarn", "factor": 4.0}),
    ]
    assert len({base_fingerprint(folder) for folder in folders}) == len(folders)


def test_a_base_that_cannot_be_read_is_refused(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json"):
        base_fingerprint(tmp_path)
    (make_base(tmp_path / "base", tensors) / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"no model\.safetensors"):
        base_fingerprint(tmp_path / "base")
