"""Bases of 4-bit files: loaded as transformers loads them, trained on, merged from what their layers compute with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
)

from qlora_kit.adapters import AdapterContract
from qlora_kit.base_files import resolve_base
from qlora_kit.cli import main
from qlora_kit.config import LoraSection, QuantizationSection, load_config
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, BaseModelError, QloraKitError
from qlora_kit.generation import Sampling
from qlora_kit.lora_modules import require_lora_modules
from qlora_kit.merging import merge_adapter
from qlora_kit.models import (
    adapter_bytes_at_most,
    attach_lora,
    base_quantization,
    load_base_model,
    quantization_facts,
    trainable_parameters,
)
from qlora_kit.training import TrainResult, train

CPU = torch.device("cpu")
IDS = torch.arange(40, 70).reshape(2, 15)
DEFAULT = QuantizationSection()
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DOWN_PROJ = "model.layers.0.mlp.down_proj.weight"
STATE = "quant_state.bitsandbytes__nf4"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def transformers_own(folder: Path) -> PreTrainedModel:
    """The 4-bit checkpoint as transformers alone loads it, computing in fp32."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config["bnb_4bit_compute_dtype"] = "float32"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():  # transformers leaves them in the dtype of the file
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model.eval()


def computed_with(layer: Linear4bit) -> torch.Tensor:
    """The weight that a 4-bit layer multiplies with, seen from outside: its answer to the unit vectors."""
    with torch.no_grad():
        bias, layer.bias = layer.bias, None
        weight = layer(torch.eye(layer.in_features)).T
        layer.bias = bias
    return weight


@pytest.fixture(scope="module")
def sixteen_bit(
    random_model: PreTrainedModel, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A 16-bit base of ``random_base``'s shape; its weights are small, so that one rounding stays one rounding."""
    folder = tmp_path_factory.mktemp("sixteen")
    copy = Qwen2ForCausalLM(random_model.config)
    copy.load_state_dict({name: weight / 4 for name, weight in random_model.state_dict().items()})
    copy.to(torch.bfloat16).save_pretrained(folder)
    chatml_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_base(sixteen_bit: Path, chatml_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Writes a 4-bit checkpoint of ``sixteen_bit`` as transformers saves it: ``make_base(folder, ...)``."""

    def make(folder: Path, *, max_shard_size: str = "5GB", **settings: Any) -> Path:
        chosen = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **settings}
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **chosen)
        model = AutoModelForCausalLM.from_pretrained(
            sixteen_bit, quantization_config=quantization, dtype=torch.bfloat16
        )
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        chatml_tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def four_bit(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def run(four_bit: Path, run_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """A run of two steps on ``four_bit``. Not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "reviews"
    overrides = [f"model.base={four_bit}", f"output_dir={folder}", "train.max_steps=2"]
    return folder, train(load_config(run_yaml, overrides))


# --- loading ---


def test_its_logits_are_those_of_transformers_own_load(four_bit: Path, sixteen_bit: Path) -> None:
    engine = Engine(str(four_bit))
    with engine.using(None) as model:
        out = logits(model)
    assert torch.equal(out, logits(transformers_own(four_bit)))
    # The weights are those that the 16-bit model is quantized to while loading.
    assert torch.equal(out, logits(load_base_model(resolve_base(str(sixteen_bit)), DEFAULT, device=CPU)))


def test_forward_and_backward_pass_use_the_same_weights(four_bit: Path) -> None:
    model = load_base_model(resolve_base(str(four_bit)), DEFAULT, device=CPU)
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.zeros(1, layer.in_features, requires_grad=True)
    layer(x)[0, 5].backward()
    assert torch.equal(x.grad[0], computed_with(layer)[5])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_the_files_say_how_they_were_quantized(
    kind: str, double: bool, make_base: Callable[..., Path], tmp_path: Path
) -> None:
    ref = resolve_base(
        str(make_base(tmp_path, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double, max_shard_size="40KB"))
    )
    found = base_quantization(ref, DEFAULT)
    assert (found.load_in_4bit, found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == (True, kind, double)
    model = load_base_model(ref, DEFAULT, device=CPU)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(logits(model), logits(transformers_own(tmp_path)))
    asked = QuantizationSection(bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
    assert base_quantization(ref, asked) == asked


def test_what_is_asked_for_by_name_must_agree(four_bit: Path) -> None:
    ref = resolve_base(str(four_bit))
    for asked, pattern in (
        ({"load_in_4bit": False}, r"quantization\.load_in_4bit is false(.|\n)*load_in_4bit: true"),
        ({"bnb_4bit_quant_type": "fp4"}, r"bnb_4bit_quant_type is fp4(.|\n)*leave quantization\.bnb_4bit_quant_type"),
        ({"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant is false"),
    ):
        with pytest.raises(BaseModelError, match=pattern):
            load_base_model(ref, QuantizationSection(**asked), device=CPU)
        with pytest.raises(BaseModelError, match=pattern):
            Engine(str(four_bit), quantization=QuantizationSection(**asked))
    bfloat16 = QuantizationSection(bnb_4bit_compute_dtype="bfloat16")
    assert load_base_model(ref, bfloat16, device=CPU).model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"quant_method": "gptq", "bits": 4}, "by 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "int4"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, "not quantized as"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "not quantized as"),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "llm_int8_skip_modules": ["lm_head", "o_proj"],
            },
            r"2 weights are not(.|\n)*o_proj",
        ),
        (None, r"14 weights are not quantized"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    settings: dict[str, Any] | None, pattern: str, four_bit: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(four_bit, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match=pattern):
        load_base_model(resolve_base(str(folder)), DEFAULT, device=CPU)


def _replaced_state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    state = json.loads(bytes(tensors[f"{Q_PROJ}.{STATE}"].tolist()))
    tensors[f"{Q_PROJ}.{STATE}"] = torch.tensor(list(json.dumps({**state, **changes}).encode()), dtype=torch.uint8)


def _without_state(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(f"{Q_PROJ}.")]:
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.absmax"), rf"{Q_PROJ}\.absmax' is missing"),
        (lambda t: t.pop(f"{Q_PROJ}.nested_absmax"), rf"{Q_PROJ}\.nested_absmax' is missing"),
        (lambda t: t.pop(f"{Q_PROJ}.quant_map"), rf"{Q_PROJ}\.quant_map' is missing"),
        (lambda t: t.pop(f"{Q_PROJ}.{STATE}"), rf"{Q_PROJ}' has 0 tensors quant_state"),
        (lambda t: t.pop(Q_PROJ), rf"{Q_PROJ}\.\w+' belongs to no weight"),
        (_without_state, rf"{Q_PROJ}' has 0 tensors quant_state"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:1024].clone()}), r"holds 1024 of U8(.|\n)*2048 numbers of U8"),
        (
            lambda t: t.update({f"{Q_PROJ}.absmax": t[f"{Q_PROJ}.absmax"][:32].clone()}),
            r"absmax' holds 32 of U8(.|\n)*64 numbers of U8",
        ),
        (lambda t: t.update({f"{Q_PROJ}.absmax": torch.ones(64)}), r"absmax' holds 64 of F32"),
        (lambda t: _replaced_state(t, shape=[64, 32]), r"q_proj\.weight' holds 2048 of U8(.|\n)*1024 numbers"),
        (lambda t: _replaced_state(t, shape=[32, 128]), r"have another shape: model\S+q_proj\.weight is \[32, 128\]"),
        (lambda t: _replaced_state(t, blocksize=63), "blocksize is 63"),
        (lambda t: _replaced_state(t, dtype="load"), "dtype is 'load'"),
        (lambda t: _replaced_state(t, quant_type="fp4"), "quant_type is 'fp4'"),
        (lambda t: t.update({f"{Q_PROJ}.{STATE}": torch.zeros(9, dtype=torch.uint8)}), "cannot be used"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), "have another shape: model.norm.weight"),
    ],
)
def test_files_that_are_not_whole_are_refused_by_name_before_loading(
    change: Callable[[dict[str, torch.Tensor]], object],
    pattern: str,
    four_bit: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(four_bit, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(BaseModelError, match=pattern) as caught:
        load_base_model(resolve_base(str(folder)), DEFAULT, device=CPU)
    name = "model.norm.weight" if "norm" in pattern else Q_PROJ
    assert all(name in fault.what for fault in caught.value.faults)


def test_headers_count_the_weights_as_they_were(four_bit: Path, sixteen_bit: Path) -> None:
    ref = resolve_base(str(four_bit))
    require_lora_modules(ref, LoraSection(target_modules=("q_proj", "down_proj")), load_in_4bit=True)
    model = attach_lora(load_base_model(ref, DEFAULT, device=CPU), LoraSection(r=4))
    bound = adapter_bytes_at_most(ref, LoraSection(r=4))
    assert (
        4 * trainable_parameters(model)
        <= bound
        == adapter_bytes_at_most(resolve_base(str(sixteen_bit)), LoraSection(r=4))
    )


def test_info_tells_it(four_bit: Path, sixteen_bit: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for base in (four_bit, sixteen_bit):
        with pytest.raises(SystemExit) as ended:
            main(["info", str(base), "--json"])
        assert ended.value.code in (None, 0)
        told.append(json.loads(capsys.readouterr().out))
    quantized, plain = told
    assert quantized.pop("quantization") == "4 bits already: bitsandbytes nf4, double quantization"
    assert plain.pop("quantization") is None
    assert quantized == plain  # parameters, shapes, and that the files agree with the config
    with pytest.raises(SystemExit):
        main(["info", str(four_bit)])
    assert "4 bits already" in capsys.readouterr().out


# --- adapters of it ---


def test_training_records_the_base_as_it_is(run: tuple[Path, TrainResult], four_bit: Path, sixteen_bit: Path) -> None:
    contract = AdapterContract.load(run[0])
    assert run[1].steps == 2
    facts = dict(contract.quantization)
    model = load_base_model(resolve_base(str(sixteen_bit)), DEFAULT, device=CPU)
    assert facts.pop("nf4_codes") == quantization_facts(DEFAULT, model)["nf4_codes"]
    assert facts == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "prequantized": True,
        "bnb_4bit_compute_dtype": "float32",
    }


def test_the_saved_config_says_how_the_files_are_quantized(
    make_base: Callable[..., Path], run_yaml: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", bnb_4bit_use_double_quant=False)
    overrides = [f"model.base={base}", f"output_dir={tmp_path / 'run'}", "train.max_steps=1"]
    train(load_config(run_yaml, overrides))
    assert load_config(tmp_path / "run" / "config.yaml").quantization.bnb_4bit_use_double_quant is False
    assert AdapterContract.load(tmp_path / "run").quantization["bnb_4bit_use_double_quant"] is False


def test_the_adapter_swaps_and_answers_as_with_peft_alone(run: tuple[Path, TrainResult], four_bit: Path) -> None:
    engine = Engine(str(four_bit))
    with engine.using(None) as model:
        before = logits(model)
    name = engine.load(str(run[0]))
    expected = logits(PeftModel.from_pretrained(transformers_own(four_bit), run[0]).eval())
    with engine.using(name) as model:
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert engine.ask("Nice soup.", adapter=name, sampling=Sampling(3)).completion_tokens <= 3
    with engine.using(None) as model:
        assert torch.equal(logits(model), before)
    assert not torch.allclose(expected, before, atol=1e-3)


def test_adapters_of_the_16_bit_model_and_of_the_4_bit_files_are_told_apart(
    run: tuple[Path, TrainResult], trained_run: tuple[Path, TrainResult], four_bit: Path, sixteen_bit: Path
) -> None:
    for base, adapter, pattern in (
        (sixteen_bit, run[0], r"trained on files of 4-bit weights(.|\n)*at hand are files of unquantized weights"),
        (four_bit, trained_run[0], r"trained on files of unquantized weights(.|\n)*at hand are files of 4-bit"),
    ):
        with pytest.raises(AdapterError, match=pattern):
            Engine(str(base)).load(str(adapter))


# --- merging ---


def merged_by_hand(four_bit: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Each weight of the written model in bf16: what the 4-bit layers compute with, and PEFT's own delta."""
    base = transformers_own(four_bit)
    weights = {name: parameter.data.to(torch.bfloat16) for name, parameter in base.named_parameters()}
    used = {
        f"{name}.weight": computed_with(module)
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit)
    }
    adapted = PeftModel.from_pretrained(base, adapter)
    for name, layer in adapted.base_model.model.named_modules():
        if f"{name}.weight" in used and hasattr(layer, "get_delta_weight"):
            used[f"{name}.weight"] += layer.get_delta_weight("default").detach()
    return {**weights, **{name: weight.to(torch.bfloat16) for name, weight in used.items()}}


@pytest.mark.parametrize("skip", [None, ["lm_head", "model.layers.0.mlp.down_proj"]], ids=["plain", "skipping"])
def test_a_merge_adds_to_what_the_layers_compute_with(
    skip: list[str] | None,
    run: tuple[Path, TrainResult],
    four_bit: Path,
    sixteen_bit: Path,
    make_base: Callable[..., Path],
    tmp_path: Path,
) -> None:
    adapter, base, settings = run[0], four_bit, {}
    if skip is not None:  # a base that left a layer as it was; the adapter has no contract for it
        base = make_base(tmp_path / "base", llm_int8_skip_modules=skip)
        adapter = Path(shutil.copytree(adapter, tmp_path / "adapter"))
        (adapter / "qlora_kit.json").unlink()
        settings = {"base": str(base), "onto": "dequantized"}

    result = merge_adapter(adapter, tmp_path / "out", **settings)

    written = load_file(tmp_path / "out" / "model.safetensors")
    expected = merged_by_hand(base, adapter)
    if skip is not None:
        delta = PeftModel.from_pretrained(transformers_own(base), adapter).base_model.model
        change = delta.model.layers[0].mlp.down_proj.get_delta_weight("default").detach()
        original = load_file(sixteen_bit / "model.safetensors")[DOWN_PROJ]
        expected[DOWN_PROJ] = (original.float() + change).to(torch.bfloat16)
    assert written.keys() == expected.keys() == load_file(sixteen_bit / "model.safetensors").keys()
    for name, tensor in written.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert result.onto == "dequantized"
    assert result.base_match == (None if skip else "fingerprint")
    assert result.weight_bytes == sum(tensor.nbytes for tensor in written.values())
    assert result.verification is not None
    assert result.verification.passed
    assert result.verification.tensors.merged == 14


def test_weights_that_are_not_adapted_become_what_the_layers_compute_with(
    four_bit: Path, run_yaml: Path, tmp_path: Path
) -> None:
    overrides = [f"model.base={four_bit}", f"output_dir={tmp_path / 'run'}", "train.max_steps=1"]
    train(load_config(run_yaml, [*overrides, "lora.target_modules=[q_proj]"]))
    result = merge_adapter(tmp_path / "run", tmp_path / "out")
    expected = merged_by_hand(four_bit, tmp_path / "run")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert result.verification is not None
    assert (result.verification.tensors.merged, result.verification.tensors.round_trips) == (2, 12)


def test_onto_the_16_bit_model_the_codes_excuse_the_fingerprint(
    run: tuple[Path, TrainResult], sixteen_bit: Path, tmp_path: Path
) -> None:
    result = merge_adapter(run[0], tmp_path / "out", base=str(sixteen_bit), onto="original")

    source = load_file(sixteen_bit / "model.safetensors")
    adapted = PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(sixteen_bit, dtype=torch.float32), run[0])
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in adapted.merge_and_unload().state_dict().items()}
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, expected[name] if "proj.weight" in name else source[name]), name
    assert result.base_match == "nf4_codes"
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["base_match"] == "nf4_codes"
    assert "quantizes to the 4-bit codes" in (tmp_path / "out" / "README.md").read_text()
    assert result.verification is not None
    assert result.verification.drift is not None
    assert result.verification.drift.mean_abs > 10 * result.verification.logits.mean_abs


def refused(error: type[QloraKitError], pattern: str, adapter: Path, out: Path, **settings: Any) -> None:
    with pytest.raises(error, match=pattern):
        merge_adapter(adapter, out, **settings)
    assert not out.exists()


def test_onto_original_needs_the_right_16_bit_model(
    run: tuple[Path, TrainResult], four_bit: Path, sixteen_bit: Path, random_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(AdapterError, r"files hold 4-bit weights(.|\n)*--base with that model", run[0], out, onto="original")
    refused(BaseModelError, "quantized already", run[0], out, onto="original", base=str(four_bit))
    refused(AdapterError, "at hand are files of unquantized", run[0], out, base=str(sixteen_bit))
    other = Path(shutil.copytree(sixteen_bit, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors[DOWN_PROJ] = -tensors[DOWN_PROJ]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    pattern = rf"1 of 14 weights quantize to other(.|\n)*{re.escape(DOWN_PROJ)}"
    refused(BaseModelError, pattern, run[0], out, onto="original", base=str(other))
    no_samples = Path(shutil.copytree(run[0], tmp_path / "adapter"))
    content = json.loads((no_samples / "qlora_kit.json").read_text())
    del content["quantization"]["nf4_codes"]
    (no_samples / "qlora_kit.json").write_text(json.dumps(content))
    refused(AdapterError, "holds no samples", no_samples, out, onto="original", base=str(sixteen_bit))
