"""The vLLM export: what vLLM cannot serve is refused, the base is that of training, and the script is safe."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit.adapters import AdapterContract
from qlora_kit.adapters.trained_base import read_trained_base
from qlora_kit.base_files import BaseRef
from qlora_kit.config import load_config
from qlora_kit.data.preparing import prepare
from qlora_kit.errors import AdapterError, ConfigError, QloraKitError
from qlora_kit.export import ExportResult, export_model
from qlora_kit.export.source import AnswerDefaults
from qlora_kit.export.vllm_script import ServedAdapter, ServedBase, serve_script
from qlora_kit.four_bit import keep_4bit_weights_as_they_are, linear4bit_modules
from qlora_kit.likelihood import answer_nlls
from qlora_kit.models import load_tokenizer
from qlora_kit.reference_answers import encode_answers

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult

FAKE_VLLM = '#!/bin/sh\nfor argument in "$@"; do printf "%s\\n" "$argument"; done > "$SEEN"\npwd >> "$SEEN"\n'


@pytest.fixture(scope="module")
def run(trained_run: tuple[Path, TrainResult]) -> Path:
    return trained_run[0]


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    return export_model(run, "vllm", tmp_path_factory.mktemp("vllm") / "o'ut $(touch x)")


def started(script: Path, folder: Path, *options: str) -> tuple[list[str], str]:
    """The arguments that the script starts vLLM with, and where."""
    (folder / "bin").mkdir()
    (folder / "bin" / "vllm").write_text(FAKE_VLLM)
    (folder / "bin" / "vllm").chmod(0o755)
    seen = folder / "seen"
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SEEN": str(seen)}
    subprocess.run([str(script), *options], env=environment, check=True, cwd=folder)
    lines = seen.read_text().splitlines()
    return lines[:-1], lines[-1]


def test_the_script_serves_the_trained_base_and_the_adapter(exported: ExportResult, tmp_path: Path) -> None:
    arguments, where = started(exported.output_dir / "serve.sh", tmp_path, "--port", "9000")
    assert where == str(exported.output_dir)
    assert arguments[:2] == ["serve", "base"]
    assert arguments[arguments.index("--lora-modules") + 1] == "reviews=adapters/reviews"
    assert arguments[arguments.index("--max-lora-rank") + 1] == "8"
    assert arguments[arguments.index("--max-loras") + 1] == "1"
    assert arguments[-2:] == ["--port", "9000"]
    assert not (exported.output_dir / "x").exists()
    assert not (tmp_path / "x").exists()


def test_adapter_files_are_those_of_training(exported: ExportResult, run: Path) -> None:
    copy = exported.output_dir / "adapters" / "reviews"
    for name in ("adapter_model.safetensors", "adapter_config.json", "qlora_kit.json"):
        assert (copy / name).read_bytes() == (run / name).read_bytes()
    assert not any(path.name.startswith("checkpoint") for path in copy.iterdir())
    base = read_trained_base(exported.output_dir / "base")
    assert base is not None
    assert base.mismatches(AdapterContract.load(run)) == []
    assert exported.verification is not None
    assert exported.verification["base"]["passed"] is True
    readme = (exported.output_dir / "README.md").read_text(encoding="utf-8")
    assert '"content": "Is this review positive, negative or neutral?"' in readme
    assert '"temperature": 0' in readme


def peft_loss(base: Path, adapter: Path, rows: Any, **options: Any) -> float:
    """The mean loss of base + adapter by PEFT, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    keep_4bit_weights_as_they_are(model, torch.float32)
    for layer in linear4bit_modules(model).values():
        layer.compute_dtype = torch.float32
    nlls = answer_nlls(PeftModel.from_pretrained(model, adapter), rows, batch_size=8, pad_token_id=0)
    return sum(nlls) / sum(row.supervised_tokens for row in rows)


@pytest.fixture(scope="module")
def rows(run_yaml: Path, random_base: Path) -> Any:
    examples = prepare(load_config(run_yaml)).validation
    tokenizer = load_tokenizer(BaseRef("base", random_base))
    return encode_answers(examples, [example.messages for example in examples], tokenizer)


def four_bit() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def test_what_is_served_is_what_was_trained(exported: ExportResult, run: Path, random_base: Path, rows: Any) -> None:
    trained = peft_loss(random_base, run, rows, quantization_config=four_bit())
    served = peft_loss(exported.output_dir / "base", exported.output_dir / "adapters" / "reviews", rows)
    assert served == pytest.approx(trained, abs=1e-4)


def test_the_original_base_is_served_with_its_drift_in_numbers(
    run: Path, random_base: Path, rows: Any, tmp_path: Path
) -> None:
    result = export_model(run, "vllm", tmp_path / "out", onto="original")
    assert result.verification is not None
    drift = result.verification["drift"]["reviews"]
    assert drift["trained_loss"] == pytest.approx(
        peft_loss(random_base, run, rows, quantization_config=four_bit()), abs=1e-4
    )
    assert drift["original_loss"] == pytest.approx(peft_loss(random_base, run, rows), abs=1e-4)
    assert (drift["measured_on"], drift["rows"]) == ("validation_rows", 9)
    assert any("served on the original: KL" in remark for remark in result.remarks)
    assert not (tmp_path / "out" / "base").exists()
    arguments, _ = started(tmp_path / "out" / "serve.sh", tmp_path)
    assert arguments[1] == str(random_base)


def test_a_trained_base_that_is_there_is_used(exported: ExportResult, run: Path, tmp_path: Path) -> None:
    base = exported.output_dir / "base"
    shutil.copytree(run, tmp_path / "second", ignore=shutil.ignore_patterns("checkpoint*"))
    contract = json.loads((run / "qlora_kit.json").read_text())
    (tmp_path / "second" / "qlora_kit.json").write_text(json.dumps({**contract, "name": "second"}))
    result = export_model([run, tmp_path / "second"], "vllm", tmp_path / "out", base=str(base))
    assert not (tmp_path / "out" / "base").exists()
    arguments, _ = started(tmp_path / "out" / "serve.sh", tmp_path)
    assert arguments[1] == str(base.resolve())
    start = arguments.index("--lora-modules")
    assert arguments[start + 1 : start + 3] == ["reviews=adapters/reviews", "second=adapters/second"]
    assert result.sources == ("reviews", "second")


def changed_contract(run: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint*"))
    contract = json.loads((run / "qlora_kit.json").read_text())
    (folder / "qlora_kit.json").write_text(json.dumps({**contract, "name": folder.name, **changes}))
    return folder


def test_adapters_that_were_trained_on_other_weights_are_no_server_of_one_base(run: Path, tmp_path: Path) -> None:
    trained = json.loads((run / "qlora_kit.json").read_text())["quantization"]
    quantization = {**trained, "bnb_4bit_use_double_quant": False, "nf4_codes": {}}
    other = changed_contract(run, tmp_path / "single", quantization=quantization)
    with pytest.raises(AdapterError, match=r"belongs on .* nf4 computes with it") as caught:
        export_model([run, other], "vllm", tmp_path / "out")
    assert "export them apart" in caught.value.faults[0].fix
    assert not (tmp_path / "out").exists()


def peft_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    chosen = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "down_proj"],
        "init_lora_weights": False,
        **settings,
    }
    get_peft_model(model, LoraConfig(**chosen)).save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"use_dora": True}, ["use_dora is true, and vLLM has no DoRA"]),
        ({"modules_to_save": ["lm_head"]}, ["modules_to_save is ['lm_head']"]),
        ({"bias": "lora_only"}, ["bias is 'lora_only'"]),
        ({"r": 600}, ["r asks for rank 600, and vLLM serves at most 512"]),
        ({"trainable_token_indices": [3, 4]}, ["trainable_token_indices is"]),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, ["use_dora", "modules_to_save"]),
        ({"target_modules": ["q_proj", "lm_head"]}, ["adapts lm_head, which vLLM does not for"]),
    ],
)  # fmt: skip
def test_what_vllm_cannot_serve_is_refused(
    settings: dict[str, Any], refused: list[str], random_base: Path, tmp_path: Path
) -> None:
    adapter = peft_adapter(random_base, tmp_path / "plain", **settings)
    with pytest.raises(AdapterError) as caught:
        export_model(adapter, "vllm", tmp_path / "out", base=str(random_base), onto="original")
    assert len(caught.value.faults) == len(refused)
    for part, fault in zip(refused, caught.value.faults, strict=True):
        assert part in fault.what
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_contract_needs_a_word_on_its_base(random_base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(random_base, tmp_path / "plain", use_rslora=True, rank_pattern={"q_proj": 2})
    with pytest.raises(QloraKitError, match="no contract"):
        export_model(adapter, "vllm", tmp_path / "out", base=str(random_base))
    result = export_model(adapter, "vllm", tmp_path / "out", base=str(random_base), onto="dequantized")
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()
    assert result.sources == ("plain",)
    assert "needs vLLM 0.33 or newer" in (tmp_path / "out" / "serve.sh").read_text()


def test_a_gguf_adapter_without_contract_goes_the_way_that_its_refusal_names(random_base: Path, tmp_path: Path) -> None:
    adapter = peft_adapter(random_base, tmp_path / "plain", use_rslora=True)
    with pytest.raises(QloraKitError, match="no contract") as caught:
        export_model(adapter, "gguf-lora", tmp_path / "out", base=str(random_base))
    assert "--onto" in caught.value.faults[0].fix
    for onto in ("dequantized", "original"):
        export_model(adapter, "gguf-lora", tmp_path / onto, base=str(random_base), onto=onto)
        assert (tmp_path / onto / "plain-lora.gguf").is_file()


def test_two_adapters_of_one_name_are_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two sources have the name 'reviews'"):
        export_model([run, run], "vllm", tmp_path / "out")


@pytest.mark.parametrize("model", ["/a b/c", "/it's", "/$(touch x)/`touch y`", '/"quoted"', "/a;b&&c|d"])
def test_the_script_is_safe_whatever_the_base_is_called(model: str, tmp_path: Path) -> None:
    adapter = ServedAdapter("reviews", "adapters/reviews", 4, False, AnswerDefaults())
    script = tmp_path / "serve.sh"
    script.write_text(serve_script(ServedBase(model, "main; rm -rf x", "na'me"), [adapter]))
    script.chmod(0o755)
    arguments, _ = started(script, tmp_path)
    assert arguments[1] == model
    assert arguments[arguments.index("--revision") + 1] == "main; rm -rf x"
    assert arguments[arguments.index("--served-model-name") + 1] == "na'me"
    assert {path.name for path in tmp_path.iterdir()} == {"serve.sh", "bin", "seen"}


@pytest.mark.parametrize(("version", "code"), [("0.32.1", 2), ("0.33.0+cu128", 0), ("1.0.0rc1", 0)])
def test_patterns_need_a_vllm_that_follows_them(version: str, code: int, tmp_path: Path) -> None:
    adapter = ServedAdapter("reviews", "adapters/reviews", 4, True, AnswerDefaults())
    script = tmp_path / "serve.sh"
    script.write_text(serve_script(ServedBase("base", None, "base"), [adapter]))
    info = tmp_path / "lib" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (tmp_path / "vllm").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "vllm").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path / "lib")}
    found = subprocess.run(["sh", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == code
    assert ("needs vLLM 0.33" in found.stderr) is (code == 2)


def test_several_sources_are_for_vllm_alone(run: Path, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="several sources"):
        export_model([run, make_adapter("other")], "gguf", tmp_path / "out")


@pytest.fixture
def make_adapter(run: Path, tmp_path: Path) -> Callable[..., Path]:
    return lambda name: changed_contract(run, tmp_path / name)
