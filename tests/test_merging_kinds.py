"""Merging what is more than LoRA pairs: DoRA, saved modules, biases, other vocabularies; each against PEFT's merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from qlora_kit.config import QuantizationSection
from qlora_kit.errors import AdapterError
from qlora_kit.four_bit import dequantize
from qlora_kit.merging import MergeResult, merge_adapter
from qlora_kit.merging.round_trip import block_absmax, block_scales, code_table, round_trip

IDS = torch.arange(30, 70).reshape(2, 20)
SMALL_BLOCK = 1 << 11  # so that the small weights here take several blocks


@pytest.fixture(scope="module")
def make_base(
    chatml_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Writes a bf16 base whose rows are no multiple of the quantizer's blocks: ``make_base(tied=...)``."""
    made: dict[bool, Path] = {}

    def make(*, tied: bool) -> Path:
        if tied not in made:
            config = Qwen2Config(
                vocab_size=len(chatml_tokenizer),
                hidden_size=96,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=tied,
                initializer_range=0.05,
                eos_token_id=chatml_tokenizer.eos_token_id,
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = Qwen2ForCausalLM(config)
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.data += 0.1 * torch.randn_like(parameter)
            folder = tmp_path_factory.mktemp("tied" if tied else "untied")
            model.to(torch.bfloat16).save_pretrained(folder)
            chatml_tokenizer.save_pretrained(folder)
            made[tied] = folder
        return made[tied]

    return make


def loaded(base: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(base, dtype=torch.float32)


def train_a_little(model: Qwen2ForCausalLM, folder: Path, **settings: Any) -> Path:
    """An adapter of ``model`` whose trainable numbers were all moved, as PEFT saves it."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    adapted = get_peft_model(model, LoraConfig(**chosen))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merge(adapter: Path, out: Path, base: Path, onto: Any = "original", **settings: Any) -> MergeResult:
    return merge_adapter(adapter, out, base=str(base), onto=onto, **settings)


def written(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in out.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_loads_as(out: Path, live: torch.nn.Module) -> None:
    """transformers loads the output whole, and it computes as the live model but for the rounding to bf16."""
    model, report = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = logits(live)
    assert float((logits(model) - expected).abs().max()) < 0.03 * float(expected.abs().max())


KINDS: dict[str, tuple[bool, dict[str, Any]]] = {
    "dora": (True, {"use_dora": True}),
    "dora-rslora-patterns": (True, {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "bias-all": (False, {"bias": "all"}),
    "bias-lora-only": (False, {"bias": "lora_only"}),
    "head": (False, {"modules_to_save": ["lm_head"]}),
    "embedding-and-head": (False, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms": (True, {"modules_to_save": ["input_layernorm", "norm"]}),
    "linear": (True, {"modules_to_save": ["o_proj"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_merge_bit_for_bit(
    kind: str, make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied, settings = KINDS[kind]
    base = make_base(tied=tied)
    adapter = train_a_little(loaded(base), tmp_path / "adapter", **settings)
    monkeypatch.setattr("qlora_kit.merging.tensors.BLOCK_NUMBERS", SMALL_BLOCK)

    result = merge(adapter, tmp_path / "out", base)

    live = PeftModel.from_pretrained(loaded(base), adapter).merge_and_unload()
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in live.state_dict().items()}
    found = written(tmp_path / "out")
    source = load_file(base / "model.safetensors")
    assert found.keys() == source.keys()
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, source[name])}
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.int16), expected[name].view(torch.int16)), name
    assert result.verification is not None
    assert result.verification.passed
    checked = result.verification.tensors
    assert checked.merged == 6
    assert checked.replaced == len(changed) - 6
    assert_loads_as(tmp_path / "out", live)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids="+".join)
def test_a_saved_embedding_or_head_unties_them(
    saved: list[str], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base(tied=True)
    adapter = train_a_little(loaded(base), tmp_path / "adapter", modules_to_save=saved)

    result = merge(adapter, tmp_path / "out", base)

    live = PeftModel.from_pretrained(loaded(base), adapter)
    found = written(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for name, module in (("model.embed_tokens.weight", "embed_tokens"), ("lm_head.weight", "lm_head")):
        assert torch.equal(found[name], old) == (module not in saved)
    assert_loads_as(tmp_path / "out", live)
    assert result.verification is not None
    assert result.verification.tensors.replaced == len(saved)


def test_a_tied_embedding_that_was_kept_tied_is_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base(tied=True)
    adapter = train_a_little(loaded(base), tmp_path / "adapter", modules_to_save=["embed_tokens"])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "ensure_weight_tying": True}))
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        merge(adapter, tmp_path / "out", base)


def test_a_resized_vocabulary(
    make_base: Callable[..., Path], chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base, size = make_base(tied=False), len(chatml_tokenizer) + 7
    model = loaded(base)
    model.resize_token_embeddings(size)
    adapter = train_a_little(model, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    (adapter / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes() + b"\n")

    result = merge(adapter, tmp_path / "out", base)

    resized = loaded(base)
    resized.resize_token_embeddings(size)
    assert_loads_as(tmp_path / "out", PeftModel.from_pretrained(resized, adapter))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == size
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert result.verification is not None

    again = loaded(base)
    again.resize_token_embeddings(size)
    half = train_a_little(again, tmp_path / "half", modules_to_save=["embed_tokens"])
    with pytest.raises(AdapterError, match="not all of it was saved"):
        merge(half, tmp_path / "other", base)
    assert not (tmp_path / "other").exists()


def test_saved_tensors_that_do_not_fit_are_refused(make_base: Callable[..., Path], tmp_path: Path) -> None:
    base = make_base(tied=False)
    wide = Qwen2ForCausalLM(Qwen2Config(**{**loaded(base).config.to_dict(), "hidden_size": 128}))
    adapter = train_a_little(wide, tmp_path / "adapter", target_modules=["o_proj"], modules_to_save=["norm"])
    with pytest.raises(AdapterError, match="the base's shape"):
        merge(adapter, tmp_path / "out", base)


@pytest.mark.parametrize("double", [True, False])
def test_dora_on_dequantized_weights(
    double: bool, make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tied=True)
    model = loaded(base)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            pair = quantize_4bit(module.weight.data, blocksize=64, compress_statistics=True, quant_type="nf4")
            module.weight.data = dequantize(*pair)
    adapter = train_a_little(loaded(base), tmp_path / "adapter", use_dora=True)
    monkeypatch.setattr("qlora_kit.merging.tensors.BLOCK_NUMBERS", SMALL_BLOCK if double else 1 << 20)

    merge(adapter, tmp_path / "out", base, onto="dequantized")

    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    for name, tensor in written(tmp_path / "out").items():
        assert torch.equal(tensor, merged[name].to(torch.bfloat16)), name


# The round trip, against bitsandbytes.


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    code = torch.tensor(quantize_4bit(torch.randn(64, 64), quant_type="nf4")[1].code.tolist())
    middles = (code[1:] + code[:-1]) / 2
    near = torch.cat(
        [middles, torch.nextafter(middles, torch.tensor(2.0)), torch.nextafter(middles, torch.tensor(-2.0))]
    )
    near = torch.cat([torch.ones(1), near, code, -code[:2]])
    holes = torch.randn(64, 64)
    holes[::3] = 0
    holes[1] = -0.0
    return {
        "random": torch.randn(300, 200) * 0.02,
        "bfloat16": (torch.randn(300, 200) * 0.02).bfloat16(),
        "float16": (torch.randn(300, 200) * 0.02).half(),
        "odd": torch.randn(37, 63),
        "less than a block": torch.randn(5, 7),
        "one number": torch.randn(1, 1),
        "zeros": torch.zeros(64, 65),
        "blocks of zeros": holes,
        "denormal": torch.randn(64, 64) * 1e-40,
        "all magnitudes": torch.randn(64, 67) * torch.logspace(-44, 37, 64)[:, None],
        "largest": (torch.rand(64, 64) - 0.5) * 2 * torch.finfo(torch.float32).max,
        "at the midpoints": near[:64] * torch.tensor([1.0, 0.5, 3.0, 0.1, 7e-3])[:, None],
        "many chunks": torch.randn(600, 700),
    }


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", weights())
def test_the_round_trip_has_bitsandbytes_bits(name: str, kind: Any, double: bool) -> None:
    weight = weights()[name]
    section = QuantizationSection(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    codes, state = quantize_4bit(weight.float(), blocksize=64, compress_statistics=double, quant_type=kind)
    flat = weight.reshape(-1)
    state.shape = torch.Size((1, 2 * codes.numel()))  # whole bytes: an odd size makes bitsandbytes compile a kernel
    expected = dequantize_4bit(codes, state).reshape(-1)[: len(flat)]

    absmax = block_absmax(flat)
    found = round_trip(flat, absmax, block_scales(absmax, section), code_table(kind))

    # But for FP4's second zero: bitsandbytes gives it either sign, by the size of the weight.
    assert torch.equal((found + 0.0).view(torch.int32), (expected + 0.0).view(torch.int32))


def test_several_threads_give_the_same_bits() -> None:
    flat = torch.randn(700_001)
    absmax = block_absmax(flat)
    table, threads = code_table("nf4"), torch.get_num_threads()
    alone = round_trip(flat, absmax, absmax, table)
    try:
        torch.set_num_threads(2)
        together = round_trip(flat, absmax, absmax, table)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


def test_small_blocks_write_the_same_files(
    make_base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tied=False)
    adapter = train_a_little(loaded(base), tmp_path / "adapter", target_modules="all-linear")
    merge(adapter, tmp_path / "whole", base, onto="dequantized", verify=False)
    monkeypatch.setattr("qlora_kit.merging.tensors.BLOCK_NUMBERS", SMALL_BLOCK)

    merge(adapter, tmp_path / "blocks", base, onto="dequantized")

    name = "model.safetensors"
    assert (tmp_path / "blocks" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    shutil.rmtree(tmp_path / "whole")
