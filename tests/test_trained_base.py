"""The trained base alone: bitsandbytes' own weights in 16 bits, recognised again, shared by the adapters it is for."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerFast

from qlora_kit.adapters import AdapterContract, base_fingerprint
from qlora_kit.adapters.trained_base import read_trained_base
from qlora_kit.errors import AdapterError, BaseModelError, GuardError
from qlora_kit.merging import merge_adapter, write_trained_base
from qlora_kit.shard_writer import ShardWriter
from qlora_kit.training import TrainResult

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """``random_model`` in bf16."""
    folder = tmp_path_factory.mktemp("bf16") / "base"
    random_model.save_pretrained(folder)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    chatml_tokenizer.save_pretrained(folder)
    return folder


def four_bit_weights(base: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """What bitsandbytes' layers compute with, by transformers and bitsandbytes alone, in fp32."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    return {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def test_it_is_what_4_bit_layers_compute_with_rounded_once(base: Path, tmp_path: Path) -> None:
    result = write_trained_base(tmp_path / "out", base=str(base), max_shard_bytes=100_000)

    expected = four_bit_weights(base, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    source = load_file(base / WEIGHTS)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(shards) > 1
    assert len(expected) == 14
    assert written.keys() == source.keys()
    for name, tensor in written.items():
        wanted = expected[name].to(torch.bfloat16) if name in expected else source[name]
        assert torch.equal(tensor.view(torch.int16), wanted.view(torch.int16)), name
    found = result.verification
    assert found is not None
    assert found.passed
    assert (found.tensors.round_trips, found.tensors.merged) == (14, 0)
    assert found.effect is not None
    assert found.effect.mean_abs > 5 * found.logits.mean_abs  # what 4 bits cost, beside one rounding
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_contract_says_how_it_is_quantized(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(trained_run[0], tmp_path / "adapter"))
    contract = AdapterContract.load(adapter)
    plain = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    kept = {key: value for key, value in contract.quantization.items() if key != "nf4_codes"}
    other = replace(contract, quantization={**kept, **plain})
    other.save(adapter)

    write_trained_base(tmp_path / "out", adapter=adapter, verify=False)

    expected = four_bit_weights(Path(contract.base.id), **plain)
    written = load_file(tmp_path / "out" / WEIGHTS)
    for name, weight in expected.items():  # bitsandbytes gives FP4's second zero either sign
        assert torch.equal(written[name] + 0.0, weight + 0.0), name
    trained = read_trained_base(tmp_path / "out")
    assert trained is not None
    trained.require_match(other)
    with pytest.raises(AdapterError, match=r"bnb_4bit_quant_type is 'fp4'(.|\n)*double_quant is False"):
        trained.require_match(contract)


def test_it_is_recognised_and_knows_its_adapters(
    trained_run: tuple[Path, TrainResult], base: Path, tmp_path: Path
) -> None:
    contract = AdapterContract.load(trained_run[0])
    out = tmp_path / "out"
    write_trained_base(out, adapter=trained_run[0], verify=False)

    trained = read_trained_base(out)

    assert trained is not None
    assert trained.fingerprint == base_fingerprint(out) != trained.base.fingerprint
    assert trained.base.fingerprint == contract.base.fingerprint
    trained.require_match(contract)
    in_16_bits = replace(contract, quantization={"load_in_4bit": False})
    with pytest.raises(AdapterError, match="trained on 16-bit weights"):
        trained.require_match(in_16_bits)
    elsewhere = replace(contract, base=replace(contract.base, fingerprint=base_fingerprint(base)))
    with pytest.raises(AdapterError, match="was made of"):
        trained.require_match(elsewhere)
    assert read_trained_base(base) is None
    merge_adapter(trained_run[0], tmp_path / "merged", onto="original", verify=False)
    assert read_trained_base(tmp_path / "merged") is None

    tensors = load_file(out / WEIGHTS)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="not those that"):
        read_trained_base(out)
    (out / "merge_report.json").write_text(json.dumps({"kind": "trained_base", "base": 3}))
    with pytest.raises(BaseModelError, match="base_fingerprint"):
        read_trained_base(out)


def test_a_wrong_byte_is_caught(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ShardWriter.write
    name = "model.layers.1.mlp.up_proj.weight"

    def faulty(self: ShardWriter, tensor_name: str, tensor: torch.Tensor) -> None:
        if tensor_name == name:
            tensor = tensor.clone()
            tensor.view(torch.int16)[3, 5] ^= 1
        write(self, tensor_name, tensor)

    monkeypatch.setattr(ShardWriter, "write", faulty)
    with pytest.raises(GuardError, match=name):
        write_trained_base(tmp_path / "place" / "out", base=str(base))
    assert not (tmp_path / "place").exists()


def test_what_says_nothing_about_4_bits_is_refused(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(trained_run[0], tmp_path / "adapter"))
    contract = AdapterContract.load(adapter)
    replace(contract, quantization={"load_in_4bit": False}).save(adapter)
    with pytest.raises(AdapterError, match="trained on 16-bit weights"):
        write_trained_base(tmp_path / "out", adapter=adapter)
    (adapter / "qlora_kit.json").unlink()
    with pytest.raises(AdapterError, match="how its base was quantized is not known"):
        write_trained_base(tmp_path / "out", adapter=adapter)
    assert not (tmp_path / "out").exists()
