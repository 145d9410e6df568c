"""Merging: equal to PEFT on the dequantized base, whatever kind of LoRA; every fault stops it and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qlora_kit.adapters import AdapterContract, BaseIdentity
from qlora_kit.base_files import BaseRef
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import AdapterError, BaseModelError, GuardError, OutputError, QloraKitError
from qlora_kit.merging import MergeResult, merge_adapter
from qlora_kit.merging.arithmetic import half_ulp
from qlora_kit.merging.planning import read_layout
from qlora_kit.merging.round_trip import block_absmax, block_scales, code_table, round_trip
from qlora_kit.models import base_facts, load_base_model
from qlora_kit.shard_writer import ShardWriter

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
Q_PROJ = "model.layers.0.self_attn.q_proj"
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"q_proj": 5, "k_proj": 3}},
}


@dataclass(frozen=True)
class World:
    """A folder with a tied and an untied base, and makes adapters for them."""

    root: Path

    def base(self, *, tied: bool) -> Path:
        return self.root / ("tied" if tied else "untied")

    def adapter(self, folder: Path, base: Path, *, fill: float = 0.02, **settings: Any) -> Path:
        """An adapter folder as PEFT writes it, B filled with random values of the size ``fill``."""
        model = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"], **settings}
        adapted = get_peft_model(model, LoraConfig(**chosen))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * fill
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, chatml_tokenizer: PreTrainedTokenizerFast) -> World:
    root = tmp_path_factory.mktemp("merging")
    for tied in (True, False):
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=len(chatml_tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
            eos_token_id=chatml_tokenizer.eos_token_id,
        )
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(std=0.1)
        folder = root / ("tied" if tied else "untied")
        model.save_pretrained(folder)
        chatml_tokenizer.save_pretrained(folder)
    return World(root)


@pytest.fixture(scope="module")
def plain(world: World) -> tuple[Path, Path]:
    """A LoRA adapter without contract, and its base."""
    base = world.base(tied=True)
    return world.adapter(world.root / "plain", base), base


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where to merge to; its folder holds nothing else, and must not after a failure either."""
    folder = tmp_path / "merged"
    folder.mkdir()
    return folder / "model"


def contract_for(base: Path, *, quantization: dict[str, Any]) -> AdapterContract:
    facts = base_facts(BaseRef(str(base), base), AutoTokenizer.from_pretrained(base))
    assert facts.fingerprint is not None
    assert facts.stop_token_ids is not None
    return AdapterContract(
        base=BaseIdentity(str(base), None, facts.fingerprint),
        quantization=quantization,
        chat_template_sha256=facts.chat_template_sha256,
        system_prompt="Is this review positive, negative or neutral?",
        stop_token_ids=facts.stop_token_ids,
        generation={},
        task="sentiment",
        metric_names=("accuracy",),
        data=(),
        config_sha256="0" * 64,
        versions={},
        created="2026-01-01T00:00:00+00:00",
        kit_version="0",
        name="review",
    )


def with_contract(adapter: Path, target: Path, base: Path, *, quantization: dict[str, Any] = NF4) -> Path:
    shutil.copytree(adapter, target)
    contract_for(base, quantization=quantization).save(target)
    return target


def dequantized_base(base: Path) -> tuple[Qwen2ForCausalLM, dict[str, torch.Tensor]]:
    """The fp32 model that 4-bit loading computes with, made by transformers and bitsandbytes alone, and its weights."""
    settings = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **NF4)
    loaded = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    weights = {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in loaded.named_modules()
        if isinstance(module, Linear4bit)
    }
    model = Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)
    missing = model.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    return model, weights


def merged_by_peft(model: Qwen2ForCausalLM, adapter: Path) -> dict[str, torch.Tensor]:
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.to(torch.bfloat16) for name, tensor in merged.state_dict().items()}


def assert_bits_equal(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    assert found.dtype == expected.dtype, name
    assert torch.equal(found.view(torch.int16), expected.contiguous().view(torch.int16)), name


def assert_nothing_left(out: Path) -> None:
    assert list(out.parent.iterdir()) == []


def merge(adapter: Path, out: Path, base: Path | None, **settings: Any) -> MergeResult:
    return merge_adapter(adapter, out, base=None if base is None else str(base), **{"onto": "dequantized", **settings})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_merge_equals_pefts_on_the_dequantized_base(
    world: World, tmp_path: Path, out: Path, kind: str, tied: bool
) -> None:
    base = world.base(tied=tied)
    adapter = world.adapter(tmp_path / "adapter", base, **KINDS[kind])

    result = merge(adapter, out, base)

    model, quantized = dequantized_base(base)
    expected = merged_by_peft(model, adapter)
    written, source = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
    assert written.keys() == source.keys()
    for name, tensor in written.items():
        assert_bits_equal(tensor, expected[name], name)
        if name not in quantized:
            assert_bits_equal(tensor, source[name], name)
    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.tensors.merged == 8
    assert result.verification.tensors.round_trips == 6
    assert result.verification.drift == result.verification.logits


@pytest.mark.parametrize("tied", [True, False])
def test_original_merge_equals_pefts_on_the_original_base(world: World, tmp_path: Path, out: Path, tied: bool) -> None:
    base = world.base(tied=tied)
    adapter = world.adapter(tmp_path / "adapter", base)

    result = merge(adapter, out, base, onto="original")

    expected = merged_by_peft(Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    for name, tensor in load_file(out / "model.safetensors").items():
        assert_bits_equal(tensor, expected[name], name)
    assert result.verification is not None
    assert result.verification.drift is None


def test_the_head_of_an_untied_base_is_merged(world: World, tmp_path: Path, out: Path) -> None:
    base = world.base(tied=False)
    adapter = world.adapter(tmp_path / "adapter", base, target_modules=["lm_head", "q_proj"])

    merge(adapter, out, base)

    expected = merged_by_peft(dequantized_base(base)[0], adapter)
    assert_bits_equal(load_file(out / "model.safetensors")["lm_head.weight"], expected["lm_head.weight"], "head")


def whole_round_trip(weight: torch.Tensor, section: QuantizationSection) -> torch.Tensor:
    flat = weight.reshape(-1)
    absmax = block_absmax(flat)
    table = code_table(section.bnb_4bit_quant_type)
    return round_trip(flat, absmax, block_scales(absmax, section), table).view(weight.shape)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_the_round_trip_is_what_a_loaded_model_holds(world: World, kind: Any, double: bool) -> None:
    base = world.base(tied=False)
    section = QuantizationSection(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    ref = BaseRef("base", base)
    model = load_base_model(ref, section, device=torch.device("cpu"))
    source = load_file(base / "model.safetensors")

    held = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    assert read_layout(ref).quantized == held.keys()
    assert len(held) == 14
    for name, module in held.items():
        expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(whole_round_trip(source[f"{name}.weight"], section), expected), name


def test_the_output_is_a_plain_checkpoint_with_a_report(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    adapter, base = with_contract(plain[0], tmp_path / "run", plain[1]), plain[1]
    calls: list[tuple[int, int]] = []

    result = merge_adapter(adapter, out, progress=lambda done, total: calls.append((done, total)))

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    report = json.loads((out / "merge_report.json").read_text())
    assert result.onto == report["onto"] == "dequantized"
    assert report["verification"] == result.to_json()["verification"]
    assert {"passed", "max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement", "kl"} <= report[
        "verification"
    ].keys()
    assert {"output_dir", "onto", "seconds", "peak_rss_bytes", "verification"} <= result.to_json().keys()
    assert report["task"] == "sentiment"
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert calls[-1] == (result.weight_bytes, result.weight_bytes)
    assert calls == sorted(calls)
    assert result.adapted_weights >= result.changed_weights > 0.9 * result.adapted_weights
    umask = os.umask(0)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~umask}


def test_what_the_logits_measure_is_measured(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    """Onto the original base, the drift from the 4-bit base is far above the rounding; the gate is about the latter."""
    adapter = with_contract(plain[0], tmp_path / "run", plain[1])

    verification = merge_adapter(adapter, out, onto="original").verification

    assert verification is not None
    assert verification.drift is not None
    assert verification.logits.max_abs <= verification.max_limit < verification.drift.max_abs
    assert verification.logits.mean_abs <= verification.mean_limit < verification.drift.mean_abs
    assert verification.noise.mean_abs / 2 < verification.logits.mean_abs < verification.noise.mean_abs * 2
    assert 0 < verification.logits.kl < verification.drift.kl
    assert verification.effect.mean_abs > 3 * verification.logits.mean_abs


def test_auto_follows_the_contract(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    adapter = with_contract(plain[0], tmp_path / "run", plain[1], quantization={"load_in_4bit": False})

    result = merge_adapter(adapter, out)

    assert result.onto == "original"
    assert result.verification is not None
    assert result.verification.drift == result.verification.logits


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_stay_as_they_are(plain: tuple[Path, Path], tmp_path: Path, out: Path, dtype: torch.dtype) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain[1], base)
    Qwen2ForCausalLM.from_pretrained(plain[1], dtype=dtype).save_pretrained(base)

    merge(plain[0], out, base)

    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {dtype}


def test_sharded_in_and_out(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    adapter, base = plain
    sharded = tmp_path / "sharded"
    shutil.copytree(base, sharded)
    (sharded / "model.safetensors").unlink()
    Qwen2ForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(sharded, max_shard_size="150KB")
    merge(adapter, tmp_path / "single", base, verify=False)

    merge(adapter, out, sharded, max_shard_bytes=100_000)

    assert len(list(sharded.glob("*.safetensors"))) > 2
    shards = list(out.glob("*.safetensors"))
    assert len(shards) > 2
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    single = load_file(tmp_path / "single" / "model.safetensors")
    assert written.keys() == single.keys()
    for name, tensor in written.items():
        assert_bits_equal(tensor, single[name], name)
    AutoModelForCausalLM.from_pretrained(out)


def test_without_verification_the_report_says_so(plain: tuple[Path, Path], out: Path) -> None:
    result = merge(*(plain[0], out, plain[1]), verify=False)

    assert result.to_json()["verification"] is None
    assert "not verified" in (out / "README.md").read_text()


def test_half_ulp_is_half_the_way_to_the_next_number() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.tensor([1.0, 1.5, -0.3, 0.0, 6e-8, -1000.0, 0.02]).to(dtype)
        away = torch.nextafter(values, torch.where(values < 0, -torch.inf, torch.inf).to(dtype))
        assert torch.equal(half_ulp(values.float(), dtype) * 2, (away.float() - values.float()).abs())


# Faults of the written files. Each spoils one thing; the gate must see it, exit 3, and leave nothing.


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[torch.Tensor], None]) -> None:
    write = ShardWriter.write

    def faulty(self: ShardWriter, tensor_name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.clone()
        if tensor_name == name:
            change(tensor)
        write(self, tensor_name, tensor)

    monkeypatch.setattr(ShardWriter, "write", faulty)


def two_ulps(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16)[3, 5] += 2


def one_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int16).view(-1)[7] ^= 1


def not_a_number(tensor: torch.Tensor) -> None:
    tensor.view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{Q_PROJ}.weight", two_ulps),
        (f"{Q_PROJ}.weight", not_a_number),
        ("model.layers.1.self_attn.v_proj.weight", one_bit),
        ("model.layers.0.input_layernorm.weight", one_bit),
        ("model.embed_tokens.weight", one_bit),
        ("model.layers.1.self_attn.q_proj.bias", one_bit),
    ],
)
def test_a_wrong_tensor_is_caught(
    plain: tuple[Path, Path],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    change: Callable[[torch.Tensor], None],
) -> None:
    spoil(monkeypatch, name, change)

    with pytest.raises(GuardError, match=name) as caught:
        merge(*(plain[0], out, plain[1]))

    assert caught.value.exit_code == 3
    assert len(caught.value.faults) == 1
    assert_nothing_left(out)


@pytest.mark.parametrize("damage", ["cut", "gone", "config", "tokenizer", "no-config"])
def test_a_damaged_output_is_caught(
    plain: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    close = ShardWriter.close

    def faulty(self: ShardWriter) -> None:
        close(self)
        weights, config, tokenizer = (
            self.folder / name for name in ("model.safetensors", "config.json", "tokenizer.json")
        )
        if damage == "cut":
            os.truncate(weights, weights.stat().st_size - 10)
        elif damage == "gone":
            weights.unlink()
        elif damage == "no-config":
            config.unlink()
        elif damage == "config":
            config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 1e-2}))
        else:
            content = json.loads(tokenizer.read_text())
            content["model"]["merges"] = content["model"]["merges"][:10]
            tokenizer.write_text(json.dumps(content))

    monkeypatch.setattr(ShardWriter, "close", faulty)

    with pytest.raises(GuardError) as caught:
        merge(*(plain[0], out, plain[1]))

    assert caught.value.exit_code == 3
    assert_nothing_left(out)


def test_ctrl_c_leaves_nothing(plain: tuple[Path, Path], out: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(*(plain[0], out, plain[1]), progress=stop)

    assert_nothing_left(out)


def test_an_occupied_output_is_refused_and_replaced_only_on_request(plain: tuple[Path, Path], out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("keep")

    with pytest.raises(OutputError, match="not empty"):
        merge(*(plain[0], out, plain[1]))
    with pytest.raises(BaseModelError):
        merge(plain[0], out, plain[1].parent / "absent", overwrite=True)
    with pytest.raises(OutputError, match="did not write the folder"):  # a slip of the hand, such as --out data
        merge(plain[0], out, plain[1], overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

    (out / "mine.txt").rename(out / "merge_report.json")
    (out / "old.txt").write_text("of an earlier merge")
    merge(*(plain[0], out, plain[1]), overwrite=True)
    assert not (out / "old.txt").exists()
    assert (out / "merge_report.json").is_file()


@pytest.mark.parametrize("place", ["adapter", "base", "inside the base"])
def test_an_output_over_its_inputs_is_refused(plain: tuple[Path, Path], tmp_path: Path, place: str) -> None:
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(plain[0], adapter)
    shutil.copytree(plain[1], base)
    before = sorted(tmp_path.rglob("*"))
    out = {"adapter": adapter, "base": base, "inside the base": base / "merged"}[place]

    with pytest.raises(OutputError, match="lies in, or holds"):
        merge(adapter, out, base, overwrite=True)

    assert sorted(tmp_path.rglob("*")) == before


# What the user may hand in wrongly. Each is refused before, or without, an output.


def refused(
    error: type[QloraKitError], message: str, adapter: Path, out: Path, base: Path | None, **settings: Any
) -> None:
    with pytest.raises(error, match=message) as caught:
        merge(adapter, out, base, **settings)
    assert caught.value.exit_code == 2
    assert_nothing_left(out)


def test_without_contract_base_and_onto_must_be_given(plain: tuple[Path, Path], out: Path) -> None:
    refused(AdapterError, "no base was given", plain[0], out, None)
    refused(AdapterError, "no contract", plain[0], out, plain[1], onto="auto")


def test_another_base_is_refused(plain: tuple[Path, Path], world: World, tmp_path: Path, out: Path) -> None:
    adapter = with_contract(plain[0], tmp_path / "run", plain[1])
    refused(AdapterError, "base weights", adapter, out, world.base(tied=False))

    fingerprint = contract_for(plain[1], quantization=NF4).base.fingerprint
    other = replace(contract_for(plain[1], quantization=NF4), base=BaseIdentity("else", None, fingerprint))
    other.save(adapter)
    merge(adapter, out, plain[1], verify=False)  # equal weights, another name
    shutil.rmtree(out)

    changed = replace(contract_for(plain[1], quantization=NF4), chat_template_sha256="1" * 64)
    changed.save(adapter)
    refused(AdapterError, "chat template", adapter, out, plain[1])


def test_codes_of_another_quantizer_are_refused(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    codes = {f"{Q_PROJ}.weight": "00" * 32}
    adapter = with_contract(plain[0], tmp_path / "run", plain[1], quantization={**NF4, "nf4_codes": codes})
    refused(AdapterError, "NF4 codes", adapter, out, plain[1])


def test_an_adapter_of_another_shape_is_refused(
    world: World, plain: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(plain[1], wide)
    config = Qwen2Config.from_pretrained(plain[1])
    config.intermediate_size = 512
    Qwen2ForCausalLM(config).save_pretrained(wide)
    refused(AdapterError, "up_proj", plain[0], out, wide)

    partial = world.adapter(tmp_path / "partial", plain[1], layers_to_transform=[0])
    settings = json.loads((partial / "adapter_config.json").read_text())
    (partial / "adapter_config.json").write_text(json.dumps({**settings, "layers_to_transform": None}))
    refused(AdapterError, "has no tensors for 'model.layers.1", partial, out, plain[1])


def test_a_16_bit_adapter_is_not_merged_onto_dequantized_weights(
    plain: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    adapter = with_contract(plain[0], tmp_path / "run", plain[1], quantization={"load_in_4bit": False})
    refused(AdapterError, "trained on 16-bit weights", adapter, out, None)


def test_lora_on_a_tied_head_is_refused(world: World, tmp_path: Path, out: Path) -> None:
    base = world.base(tied=True)
    adapter = world.adapter(tmp_path / "adapter", world.base(tied=False), target_modules=["lm_head", "q_proj"])
    for onto in ("dequantized", "original"):
        refused(AdapterError, "shares its weight", adapter, out, base, onto=onto)


def test_an_adapter_that_changes_nothing_is_refused(world: World, tmp_path: Path, out: Path) -> None:
    base = world.base(tied=True)
    refused(AdapterError, "every B·A is zero", world.adapter(tmp_path / "zero", base, fill=0.0), out, base)
    faint = world.adapter(tmp_path / "faint", base, fill=1e-12, target_modules=["q_proj"])
    refused(AdapterError, "smaller than the rounding", faint, out, base, onto="original", verify=False)
    refused(AdapterError, "no logit", faint, out, base)  # exact zeros of NF4 do change, to no effect


def test_an_adapter_with_nan_is_refused(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(plain[0], adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{Q_PROJ}.lora_A.weight"][0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(AdapterError, "NaN or infinite", adapter, out, plain[1])


def test_a_merged_weight_that_overflows_is_a_failure(
    world: World, plain: tuple[Path, Path], tmp_path: Path, out: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain[1], base)
    Qwen2ForCausalLM.from_pretrained(plain[1], dtype=torch.float16).save_pretrained(base)
    adapter = world.adapter(tmp_path / "huge", plain[1], fill=1e7)

    with pytest.raises(GuardError, match=r"not finite in torch\.float16"):
        merge(adapter, out, base)

    assert_nothing_left(out)


def spoilt_base(base: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    shutil.copytree(base, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("name", [f"{Q_PROJ}.weight", "model.norm.weight"])
def test_a_base_with_nan_is_refused(plain: tuple[Path, Path], tmp_path: Path, out: Path, name: str) -> None:
    base = spoilt_base(plain[1], tmp_path / "base", lambda tensors: tensors[name].view(-1)[:1].fill_(torch.nan))
    refused(BaseModelError, f"{name}.*NaN", plain[0], out, base)


def test_a_base_with_missing_or_wrong_tensors_is_refused(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    name = f"{Q_PROJ}.weight"
    missing = spoilt_base(plain[1], tmp_path / "missing", lambda tensors: tensors.pop(name))
    refused(BaseModelError, f"no tensor '{name}'", plain[0], out, missing)
    narrow = spoilt_base(
        plain[1], tmp_path / "narrow", lambda tensors: tensors.update({name: tensors[name][:64].clone()})
    )
    refused(BaseModelError, r"shape \(64, 128\)", plain[0], out, narrow)
    other = spoilt_base(
        plain[1], tmp_path / "other", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})
    )
    refused(BaseModelError, "dtype I8", plain[0], out, other)


def test_a_truncated_shard_and_a_broken_index_are_refused(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(plain[1], base)
    (base / "model.safetensors").unlink()
    Qwen2ForCausalLM.from_pretrained(plain[1], dtype=torch.bfloat16).save_pretrained(base, max_shard_size="150KB")
    shard = sorted(base.glob("*.safetensors"))[1]
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-100])
    refused(BaseModelError, shard.name, plain[0], out, base)

    shard.write_bytes(whole)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    name = next(iter(index["weight_map"]))
    del index["weight_map"][name]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(BaseModelError, name, plain[0], out, base)


def test_a_merge_and_a_quantized_model_are_no_bases(plain: tuple[Path, Path], tmp_path: Path, out: Path) -> None:
    merge(plain[0], tmp_path / "once", plain[1], verify=False)
    refused(BaseModelError, "is a merge itself", plain[0], out, tmp_path / "once")

    base = tmp_path / "quantized"
    shutil.copytree(plain[1], base)
    config = json.loads((base / "config.json").read_text())
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    refused(BaseModelError, "quantized already", plain[0], out, base, onto="original")
    refused(BaseModelError, "not quantized as config.json says", plain[0], out, base)


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    plain: tuple[Path, Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(OutputError, "GiB are free on its disk", plain[0], out, plain[1])
    monkeypatch.setattr("qlora_kit.merging.input_checks.free_memory_bytes", lambda: 1000)
    refused(OutputError, "GiB of memory", plain[0], out, plain[1])
    merge(plain[0], out, plain[1], verify=False)
