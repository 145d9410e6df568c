"""Bases are found or refused; the 4-bit base holds bitsandbytes' own bits, and no forward pass changes them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qlora_kit.architecture import read_architecture
from qlora_kit.base_files import TINY_FOLDER, BaseRef, read_model_config, resolve_base
from qlora_kit.config import LoraSection, QuantizationSection
from qlora_kit.errors import BaseModelError, ConfigError, Fault
from qlora_kit.four_bit import linear4bit_modules, nf4_code_samples
from qlora_kit.lora_modules import require_lora_modules, require_planned_modules
from qlora_kit.models import (
    adapter_bytes_at_most,
    attach_lora,
    compute_dtype,
    linear_shapes,
    load_base_model,
    load_tokenizer,
    quantization_facts,
    trainable_parameters,
)

NF4 = QuantizationSection()
CPU = torch.device("cpu")
SHAPES = {  # of one layer of random_base: (out_features, in_features)
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}
LAYERS = [f"model.layers.{layer}.{module}" for layer in (0, 1) for module in SHAPES]
CODE_BYTES = 32


def four_bit_hash(model: torch.nn.Module) -> str:
    """Of the packed weights and of every tensor in their quantization states."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = module.weight.quant_state
            tensors = [module.weight.data, *(v for v in state.as_dict().values() if isinstance(v, torch.Tensor))]
            for tensor in tensors:
                digest.update(name.encode() + str((tensor.dtype, tensor.shape)).encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def broken_base(random_base: Path, tmp_path: Path) -> Path:
    """A copy of ``random_base`` to break."""
    folder = tmp_path / "base"
    shutil.copytree(random_base, folder)
    return folder


@pytest.fixture(scope="module")
def nf4_model(random_base: Path) -> PreTrainedModel:
    return load_base_model(resolve_base(str(random_base)), NF4, device=CPU)


# --- finding a base ---


def test_a_base_is_tiny_or_a_folder(random_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base(str(random_base)) == BaseRef(str(random_base), random_base)
    monkeypatch.setattr("qlora_kit.base_files.TINY_FOLDER", random_base)
    assert resolve_base("tiny") == BaseRef("tiny", random_base)
    assert TINY_FOLDER.parts[-3:] == ("qlora_kit", "bases", "tiny")


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "a/b/c"])
def test_what_is_neither_folder_nor_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BaseModelError, match="neither a folder nor a Hub id"):
        resolve_base(name)


def test_a_hub_id_that_is_not_in_the_cache_is_refused_offline() -> None:
    with pytest.raises(BaseModelError, match=r"cannot be had from the Hub(.|\n)*hf download some/where"):
        resolve_base("some/where")


def test_a_base_with_code_of_its_own_is_refused(broken_base: Path) -> None:
    config = json.loads((broken_base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model"}
    (broken_base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="auto_map"):
        resolve_base(str(broken_base))


@pytest.mark.parametrize("text", ["{", "[]", "3", None])
def test_a_base_without_a_sound_config_is_refused(broken_base: Path, text: str | None) -> None:
    if text is None:
        (broken_base / "config.json").unlink()
    else:
        (broken_base / "config.json").write_text(text)
    with pytest.raises(BaseModelError, match=r"config\.json"):
        resolve_base(str(broken_base))


def test_pickled_weights_are_never_a_base(broken_base: Path) -> None:
    torch.save({}, broken_base / "pytorch_model.bin")
    (broken_base / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"no safetensors(.|\n)*never loaded"):
        resolve_base(str(broken_base))


def test_weights_that_are_missing_or_cut_off_are_refused(broken_base: Path) -> None:
    path = broken_base / "model.safetensors"
    whole = load_file(path)
    save_file({k: v for k, v in whole.items() if not k.endswith("1.mlp.up_proj.weight")}, path, {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"1 weights are missing(.|\n)*layers\.1\.mlp\.up_proj"):
        load_base_model(resolve_base(str(broken_base)), NF4, device=CPU)
    save_file({**whole, "model.norm.weight": torch.ones(32)}, path, {"format": "pt"})
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_base_model(resolve_base(str(broken_base)), NF4, device=CPU)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BaseModelError, match="the tensors end at byte"):
        load_base_model(resolve_base(str(broken_base)), NF4, device=CPU)


def test_a_tokenizer_needs_a_chat_template_and_gets_a_pad_token(
    broken_base: Path, tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    assert load_tokenizer(resolve_base(str(broken_base))).padding_side == "left"
    llama = make_tokenizer("llama3", "llama3", eos_token="<|eot_id|>")
    llama.pad_token = None
    llama.save_pretrained(tmp_path / "llama")
    assert load_tokenizer(BaseRef("llama", tmp_path / "llama")).pad_token == "<|eot_id|>"
    (broken_base / "chat_template.jinja").unlink()
    with pytest.raises(BaseModelError, match="no chat template"):
        load_tokenizer(resolve_base(str(broken_base)))


def test_the_generation_defaults_of_a_base_do_not_count(broken_base: Path) -> None:
    defaults = {"do_sample": True, "top_k": 20, "repetition_penalty": 1.05, "suppress_tokens": [5]}
    (broken_base / "generation_config.json").write_text(json.dumps(defaults))
    model = load_base_model(resolve_base(str(broken_base)), NF4, device=CPU)
    assert model.generation_config.suppress_tokens is None
    assert model.generation_config.repetition_penalty in (None, 1.0)


# --- the 4-bit base ---


def test_the_linear_layers_are_4bit_and_nothing_else(nf4_model: PreTrainedModel) -> None:
    assert list(linear4bit_modules(nf4_model)) == LAYERS
    assert all(isinstance(module, Linear4bit) for module in linear4bit_modules(nf4_model).values())
    assert type(nf4_model.lm_head) is torch.nn.Linear
    expected = {name: SHAPES[name.split(".", 3)[3]] for name in LAYERS}
    assert linear_shapes(nf4_model) == {**expected, "lm_head": tuple(nf4_model.lm_head.weight.shape)}
    states = [module.weight.quant_state for module in linear4bit_modules(nf4_model).values()]
    assert all(state.quant_type == "nf4" and state.nested for state in states)
    assert not nf4_model.training


def test_forward_passes_leave_the_4bit_weights_as_they_are(random_base: Path) -> None:
    model = load_base_model(resolve_base(str(random_base)), NF4, device=CPU)
    before = four_bit_hash(model)
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        first = model.eval()(ids).logits
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, first)
    assert four_bit_hash(model) == before
    with torch.no_grad():
        q_proj = model.model.layers[0].self_attn.q_proj.weight
        q_proj.data[0] ^= 1
    assert four_bit_hash(model) != before  # the hash sees a single code


def test_code_samples_are_those_of_bitsandbytes_itself(nf4_model: PreTrainedModel, random_base: Path) -> None:
    weights = load_file(random_base / "model.safetensors")
    samples = nf4_code_samples(nf4_model)
    assert list(samples) == [f"{name}.weight" for name in LAYERS]
    for name, sample in samples.items():
        codes, _ = quantize_4bit(weights[name].float(), quant_type="nf4", compress_statistics=True)
        flat = codes.flatten().tolist()
        assert bytes.fromhex(sample) == bytes(flat[:: len(flat) // CODE_BYTES][:CODE_BYTES])


def test_quantization_facts_say_what_was_asked_for(nf4_model: PreTrainedModel) -> None:
    facts = quantization_facts(NF4, nf4_model)
    assert facts.pop("nf4_codes") == nf4_code_samples(nf4_model)
    measured = {"prequantized": False, "bnb_4bit_compute_dtype": "float32"}
    asked = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert facts == {**asked, **measured}
    plain = QuantizationSection(load_in_4bit=False)
    assert quantization_facts(plain, nf4_model) == {"load_in_4bit": False, **measured}
    assert quantization_facts(NF4) == asked


def test_the_base_in_full_precision_is_the_one_on_disk(random_base: Path) -> None:
    model = load_base_model(resolve_base(str(random_base)), QuantizationSection(load_in_4bit=False), device=CPU)
    assert linear4bit_modules(model) == {}
    weights = load_file(random_base / "model.safetensors")
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_auto_computes_in_fp32_on_a_cpu() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert compute_dtype("float16", CPU) == torch.float16


# --- LoRA on it ---


@pytest.mark.parametrize(
    ("lora", "adapted"),
    [
        (LoraSection(r=3), tuple(SHAPES)),
        (LoraSection(r=5, target_modules=("q_proj", "down_proj")), ("self_attn.q_proj", "mlp.down_proj")),
        (LoraSection(r=2, exclude_modules=("o_proj",)), tuple(name for name in SHAPES if "o_proj" not in name)),
    ],
)
def test_trainable_parameters_are_rank_times_in_and_out(
    random_base: Path, lora: LoraSection, adapted: tuple[str, ...]
) -> None:
    model = attach_lora(load_base_model(resolve_base(str(random_base)), NF4, device=CPU), lora)
    assert trainable_parameters(model) == 2 * sum(lora.r * sum(SHAPES[name]) for name in adapted)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert list(linear4bit_modules(model)) == LAYERS  # PEFT's wrapping does not show


def test_a_new_adapter_changes_no_output(random_base: Path) -> None:
    base = load_base_model(resolve_base(str(random_base)), NF4, device=CPU)
    ids = torch.arange(30).reshape(1, 30)
    with torch.no_grad():
        before = base(ids).logits
        assert torch.equal(attach_lora(base, LoraSection(r=4)).eval()(ids).logits, before)


def test_targets_that_the_base_lacks_are_refused(random_base: Path) -> None:
    model = load_base_model(resolve_base(str(random_base)), NF4, device=CPU)
    with pytest.raises(BaseModelError, match=r"no adapter can be attached(.|\n)*all-linear"):
        attach_lora(model, LoraSection(target_modules=("c_attn",)))


@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ("q_proj", "down_proj"),
        ("self_attn.q_proj",),
        ("model.layers.0.mlp.up_proj",),
        r".*\.(q|v)_proj",
        r"model\.layers\.1\..*_proj",
    ],
)
def test_targets_that_the_base_has_are_taken(random_base: Path, targets: str | tuple[str, ...]) -> None:
    """What passes is what PEFT attaches to."""
    ref, lora = resolve_base(str(random_base)), LoraSection(target_modules=targets)
    require_lora_modules(ref, lora, load_in_4bit=True)
    attach_lora(load_base_model(ref, NF4, device=CPU), lora)


def faults_of_a_plan(ref: BaseRef, lora: LoraSection, *, load_in_4bit: bool) -> tuple[Fault, ...]:
    """What is found from ``config.json`` alone."""
    architecture = read_architecture(read_model_config(ref), where="config.json")
    with pytest.raises(ConfigError) as caught:
        require_planned_modules(ref.id, architecture, lora, load_in_4bit=load_in_4bit)
    return caught.value.faults


@pytest.mark.parametrize(
    ("targets", "bad", "fix"),
    [
        (("q_proj", "v_prj", "c_attn"), ["v_prj", "c_attn"], "did you mean [v_proj]?"),
        (("proj",), ["proj"], ""),
        (("attn.q_proj",), ["attn.q_proj"], "did you mean [q_proj]?"),
        (("self_attn",), ["self_attn"], ""),
        (("input_layernorm",), ["input_layernorm"], ""),
        (("embed_tokens",), ["embed_tokens"], ""),
        ("q_proj", ["q_proj"], "did you mean [q_proj]?"),
        (r".*\.zz_proj", [r".*\.zz_proj"], ""),
    ],
)
def test_targets_that_the_headers_lack_are_named(
    random_base: Path, targets: str | tuple[str, ...], bad: list[str], fix: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        require_lora_modules(resolve_base(str(random_base)), LoraSection(target_modules=targets), load_in_4bit=True)
    faults = caught.value.faults
    assert len(faults) == len(bad)
    ref, lora = resolve_base(str(random_base)), LoraSection(target_modules=targets)
    assert faults_of_a_plan(ref, lora, load_in_4bit=True) == faults
    for fault, name in zip(faults, bad, strict=True):
        assert repr(name) in fault.what
        assert "down_proj, gate_proj, k_proj" in fault.expected
    assert fix in faults[0].fix


@pytest.mark.parametrize(
    ("key", "value", "what", "fix"),
    [
        ("modules_to_save", ("lm_heda",), "the name 'lm_heda' matches no module", "did you mean [lm_head]?"),
        ("modules_to_save", ("q_proj",), "'q_proj' is held in 4-bit codes", "leave it to LoRA"),
        ("modules_to_save", ("mlp",), "'mlp' is held in 4-bit codes", "leave it to LoRA"),
        ("exclude_modules", ("v_prj",), "the name 'v_prj' matches no matrix", "did you mean [v_proj]?"),
        ("exclude_modules", r".*\.visual\..*", "matches no matrix", "remove it"),
        ("rank_pattern", {"k_prj": 4}, "'k_prj' matches no module", "did you mean k_proj?"),
        ("alpha_pattern", {r"layers\.[89]\..*": 4}, "matches no module", "remove it, or name one of the above"),
    ],
)
def test_names_that_would_be_without_effect_are_refused(
    random_base: Path, key: str, value: Any, what: str, fix: str
) -> None:
    """PEFT goes on without them, or trains an adapter that fits no base; codes it cannot train at all."""
    ref, lora = resolve_base(str(random_base)), LoraSection(**{key: value})
    with pytest.raises(ConfigError) as caught:
        require_lora_modules(ref, lora, load_in_4bit=True)
    assert faults_of_a_plan(ref, lora, load_in_4bit=True) == caught.value.faults
    (fault,) = caught.value.faults
    assert fault.what.startswith(f"lora.{key}: ")
    assert what in fault.what
    assert fault.fix.startswith(fix)


@pytest.mark.parametrize(("name", "inner"), [("mlp", "down_proj, gate_proj, up_proj"), ("layers.0", "down_proj, ")])
def test_modules_that_hold_others_are_not_trained_whole(random_base: Path, name: str, inner: str) -> None:
    """Their adapter would bring tensors of modules that its ``modules_to_save`` does not name."""
    ref, lora = resolve_base(str(random_base)), LoraSection(target_modules=("q_proj",), modules_to_save=(name,))
    with pytest.raises(ConfigError) as caught:
        require_lora_modules(ref, lora, load_in_4bit=False)
    (fault,) = caught.value.faults
    assert f"{name!r} holds other modules" in fault.what
    assert f"name those inside it: [{inner}" in fault.fix
    assert faults_of_a_plan(ref, lora, load_in_4bit=False) == (fault,)
    require_lora_modules(ref, LoraSection(modules_to_save=("up_proj",)), load_in_4bit=False)


@pytest.mark.parametrize(
    "chosen",
    [
        {"modules_to_save": ("lm_head", "norm"), "exclude_modules": ("lm_head", "v_proj")},
        {"modules_to_save": ("embed_tokens",), "exclude_modules": r".*\.layers\.0\..*"},
        {"rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"model.layers.0.mlp.up_proj": 4}},
    ],
)
def test_names_that_have_an_effect_are_taken(random_base: Path, chosen: dict[str, Any]) -> None:
    ref, lora = resolve_base(str(random_base)), LoraSection(**chosen)
    require_lora_modules(ref, lora, load_in_4bit=True)

    def trained(section: LoraSection) -> dict[str, torch.Size]:
        attached = attach_lora(load_base_model(ref, NF4, device=CPU), section)
        return {name: weight.shape for name, weight in attached.named_parameters() if weight.requires_grad}

    assert trained(lora) != trained(LoraSection())


def test_the_bound_of_an_adapters_size_is_one(random_base: Path) -> None:
    """Checked against PEFT's own count: never too small, and not many times too large."""
    ref = resolve_base(str(random_base))
    model = attach_lora(load_base_model(ref, QuantizationSection(), device=torch.device("cpu")), LoraSection(r=4))
    actual = 4 * trainable_parameters(model)
    assert actual <= adapter_bytes_at_most(ref, LoraSection(r=4)) <= 3 * actual
