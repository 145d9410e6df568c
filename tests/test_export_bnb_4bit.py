"""The 4-bit export: transformers loads its codes as they are, and the figures are those of the loaded models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.base_files import BaseRef
from qlora_kit.config import load_config
from qlora_kit.data.preparing import prepare
from qlora_kit.errors import BaseModelError, GuardError
from qlora_kit.export import export_model
from qlora_kit.export.bnb_4bit_files import require_same_weights, write_bnb_4bit
from qlora_kit.export.second_rounding import RowLosses, _advice
from qlora_kit.four_bit import keep_4bit_weights_as_they_are, linear4bit_modules
from qlora_kit.likelihood import LossDifference, answer_nlls
from qlora_kit.models import load_tokenizer
from qlora_kit.reference_answers import encode_answers

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult


@pytest.fixture(scope="module")
def merged(merged_run: Path) -> Path:
    return merged_run


@pytest.fixture(scope="module")
def exported(
    trained_run: tuple[Path, TrainResult], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The adapter's export, merged on the way, and its report."""
    result = export_model(trained_run[0], "bnb-4bit", tmp_path_factory.mktemp("bnb") / "out", onto="dequantized")
    return result.output_dir, result.to_json()


def settings(quant_type: str, *, double: bool) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


@pytest.mark.parametrize(("quant_type", "double"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_transformers_loads_the_codes_that_it_would_have_made(
    quant_type: str, double: bool, merged: Path, tmp_path: Path
) -> None:
    write_bnb_4bit(merged, tmp_path, quant_type=quant_type, double_quant=double)  # type: ignore[arg-type]
    assert require_same_weights(merged, tmp_path, quant_type=quant_type, double_quant=double) == 14  # type: ignore[arg-type]
    stored = load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(merged, quantization_config=settings(quant_type, double=double))
    others = dict(quantized.named_parameters())
    seen = 0
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter.data, others[name].data), name
        if parameter.dtype == torch.uint8:
            seen += 1
            assert parameter.data.numpy().tobytes() == stored[name].numpy().tobytes()
            state, other = parameter.quant_state, others[name].quant_state
            assert torch.equal(state.absmax, other.absmax)
            assert state.nested is double
            if double:
                assert torch.equal(state.state2.absmax, other.state2.absmax)
                assert torch.equal(state.offset, other.offset)
    assert seen == 14


def test_shards_hold_the_same_tensors(merged: Path, tmp_path: Path) -> None:
    for name, size in (("one", 10**9), ("many", 20_000)):
        (tmp_path / name).mkdir()
        write_bnb_4bit(merged, tmp_path / name, quant_type="nf4", double_quant=True, max_shard_bytes=size)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    together = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")


def test_the_report_says_what_the_loaded_models_do(
    exported: tuple[Path, dict[str, Any]], merged: Path, run_yaml: Path, random_base: Path
) -> None:
    folder, report = exported
    rounding = report["verification"]["second_rounding"]
    assert rounding["measured_on"] == "validation_rows"
    losses = rounding["losses"]
    tokenizer = load_tokenizer(BaseRef("base", random_base))
    examples = prepare(load_config(run_yaml)).validation
    rows = encode_answers(examples, [example.messages for example in examples], tokenizer)
    models = {
        "base": AutoModelForCausalLM.from_pretrained(random_base, quantization_config=settings("nf4", double=True)),
        "merged": AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
        "rounded": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    }
    for name, model in models.items():
        keep_4bit_weights_as_they_are(model, torch.float32)
        for layer in linear4bit_modules(model).values():
            layer.compute_dtype = torch.float32
        nlls = answer_nlls(model, rows, batch_size=8, pad_token_id=0)
        mean = sum(nlls) / sum(row.supervised_tokens for row in rows)
        assert losses[name] == pytest.approx(mean, abs=1e-4), name
    assert losses["rows"] == 9
    assert losses["difference"] == pytest.approx(losses["rounded"] - losses["merged"], abs=1e-9)
    assert rounding["logits"]["kl"] > 0
    written = json.loads((folder / "export_report.json").read_text())
    assert written["verification"] == json.loads(json.dumps(report["verification"]))
    assert not (folder / "merged").exists()


def test_an_fp4_adapter_stays_fp4_and_the_report_says_so(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run[0], run, ignore=shutil.ignore_patterns("checkpoint*"))
    contract = json.loads((run / "qlora_kit.json").read_text())
    contract["quantization"] |= {"bnb_4bit_quant_type": "fp4", "nf4_codes": {}}
    (run / "qlora_kit.json").write_text(json.dumps(contract))
    result = export_model(run, "bnb-4bit", tmp_path / "out", onto="dequantized")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (result.quant, written["bnb_4bit_quant_type"]) == ("fp4", "fp4")


def test_a_merged_folder_is_measured_on_fixed_conversations(merged: Path, tmp_path: Path) -> None:
    result = export_model(merged, "bnb-4bit", tmp_path / "out")
    assert result.verification is not None
    rounding = result.verification["second_rounding"]
    assert (rounding["measured_on"], rounding["losses"]) == ("probes", None)
    assert "adapter" in rounding["reason"]
    assert 0 < rounding["logits"]["top1_agreement"] <= 1


@pytest.mark.parametrize(
    ("difference", "interval", "expected"),
    [
        (0.5, (0.4, 0.6), "worse than the base; do not ship"),
        (0.3, (0.2, 0.4), "from 0.6000 to 0.9000 nats a token; the adapter had gained 0.4000 over the base: serve"),
        (0.004, (0.002, 0.006), "little; ship these files"),
        (0.004, (-0.01, 0.02), "no cost can be told from chance"),
        (-0.2, (-0.3, -0.1), "can be shipped"),
    ],
)
def test_advice_follows_from_the_figures(difference: float, interval: tuple[float, float], expected: str) -> None:
    losses = RowLosses(20, 100, base=1.0, live=0.6, merged=0.6, rounded=0.6 + difference, difference=difference,
                       difference_ci95=interval)  # fmt: skip
    assert expected in _advice(losses, LossDifference(difference, interval, 20))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_one_wrong_number_is_found(
    name: str, exported: tuple[Path, dict[str, Any]], merged: Path, tmp_path: Path
) -> None:
    shutil.copytree(exported[0], tmp_path / "copy")
    path = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(path)
    flat = tensors[name].view(-1)
    flat[7] = flat[7] ^ 16 if flat.dtype == torch.uint8 else flat[7] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(GuardError, match=r"1 tensors are not those of the checkpoint"):
        require_same_weights(merged, tmp_path / "copy", quant_type="nf4", double_quant=True)


def test_a_checkpoint_that_is_not_finite_is_refused(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "bad")
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.inf
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match="NaN or infinite"):
        export_model(tmp_path / "bad", "bnb-4bit", tmp_path / "out")
    assert not (tmp_path / "out").exists()
