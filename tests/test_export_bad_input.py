"""Exports that cannot be: told in three parts before anything is written, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file, save_file

from qlora_kit.errors import AdapterError, BaseModelError, ConfigError, GuardError, OutputError, QloraKitError
from qlora_kit.export import TARGETS, export_model
from qlora_kit.export.bnb_4bit_files import write_bnb_4bit

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult


@pytest.fixture(scope="module")
def run(trained_run: tuple[Path, TrainResult]) -> Path:
    return trained_run[0]


@pytest.fixture(scope="module")
def merged(merged_run: Path) -> Path:
    return merged_run


@pytest.fixture(scope="module")
def four_bit(merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four_bit")
    write_bnb_4bit(merged, folder, quant_type="nf4", double_quant=True)
    shutil.copyfile(merged / "merge_report.json", folder / "merge_report.json")
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "out"


def refused(out: Path, error: type[QloraKitError], match: str, *arguments: Any, **options: Any) -> QloraKitError:
    with pytest.raises(error, match=match) as caught:
        export_model(*arguments, out=out, **options)
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)
    assert list(out.parent.iterdir()) == []
    return caught.value


@pytest.mark.parametrize(
    ("what", "to", "options", "match"),
    [
        ("run", "gguff", {}, "--to 'gguff'"),
        ("run", "", {}, "--to ''"),
        ("run", "bnb-4bit", {"quant": "q8_0"}, "bnb-4bit has no such quantization"),
        ("run", "gguf", {"quant": "nf4"}, "gguf has no such quantization"),
        ("run", "gguf-lora", {"quant": "q8_0"}, "gguf-lora has no such quantization"),
        ("run", "vllm", {"quant": "f16"}, "vllm has no such quantization"),
        ("run", "base", {"quant": "f16"}, "base has no such quantization"),
        ("run", "bnb-4bit", {"check": True}, "--check with --to bnb-4bit: has no effect"),
        ("run", "gguf", {"separate": True}, "--separate with --to gguf: has no effect"),
        ("run", "base", {"onto": "original"}, "the original base is there already"),
        ("merged", "gguf", {"base": "tiny"}, "--base: only adapters have a base"),
        ("merged", "bnb-4bit", {"onto": "original"}, "--onto: only adapters have a base"),
        ("merged", "gguf-lora", {}, "is a merged folder, which is not exported to gguf-lora"),
        ("merged", "vllm", {}, "is a merged folder, which is not exported to vllm"),
        ("merged", "base", {}, "is a merged folder, which is not exported to base"),
        ("random_base", "gguf-lora", {}, "is a base, which is not exported to gguf-lora"),
        ("random_base", "vllm", {}, "is a base, which is not exported to vllm"),
        ("merged", "vllm", {"quant": "f16", "check": True}, "which is not exported to vllm"),
    ],
)
def test_options_without_meaning(
    what: str, to: str, options: dict[str, Any], match: str, request: pytest.FixtureRequest, out: Path
) -> None:
    refused(out, ConfigError, match, request.getfixturevalue(what), to, **options)


def test_every_fault_of_an_order_is_told_at_once(merged: Path, out: Path) -> None:
    error = refused(out, ConfigError, "vllm", merged, "vllm", quant="f16", check=True, base="tiny")
    assert len(error.faults) == 4


def test_a_source_given_twice_and_a_quantization_in_capitals(run: Path, out: Path) -> None:
    error = refused(out, ConfigError, "two sources have the name", [run, run], "vllm")
    assert error.faults[0].fix == "name it once"
    error = refused(out, ConfigError, "no such quantization", run, "gguf", quant="Q4_K_M")
    assert error.faults[0].fix == "did you mean 'q4_k_m'?"


def test_nothing_to_export(out: Path) -> None:
    refused(out, ConfigError, "nothing to export", [], "gguf")


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ("nobody", AdapterError, "'nobody' is no adapter of .*store, no folder and no base"),
        ("", AdapterError, "is empty"),
        ("../escape", AdapterError, "is no adapter"),
        ("two words", AdapterError, "is no adapter"),
        ("/nowhere/at/all", AdapterError, "is no adapter"),
        ("org/name", BaseModelError, "cannot be had from the Hub"),
        ("org/name@x y", BaseModelError, "is no revision"),
    ],
)
def test_sources_that_are_nothing(
    source: str, error: type[QloraKitError], match: str, tmp_path: Path, out: Path
) -> None:
    refused(out, error, match, source, "gguf", store=tmp_path / "store")


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ({}, AdapterError, "the folder holds no adapter, no merged model and no base"),
        ({"merge_report.json": "{"}, BaseModelError, "merge_report.json"),
        ({"merge_report.json": '{"adapter": 3}'}, BaseModelError, "is not a report of a merge"),
        ({"merge_report.json": '{"stop_token_ids": ["x"]}'}, BaseModelError, "is not a report of a merge"),
        ({"merge_report.json": "{}"}, BaseModelError, "config.json"),
        ({"config.json": "{}"}, BaseModelError, "no safetensors weights"),
        ({"config.json": '{"auto_map": {"AutoModel": "x.py"}}'}, BaseModelError, "auto_map"),
        ({"adapter_config.json": "{}"}, AdapterError, "adapter_model.safetensors"),
    ],
)
def test_folders_that_are_broken(
    files: dict[str, str], error: type[QloraKitError], match: str, tmp_path: Path, out: Path
) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    refused(out, error, match, folder, "bnb-4bit")


@pytest.mark.parametrize("to", ["bnb-4bit", "gguf", "ollama"])
def test_weights_that_are_in_4_bits_already(to: str, four_bit: Path, out: Path) -> None:
    refused(out, BaseModelError, "hold 4-bit weights already", four_bit, to)


@pytest.mark.parametrize("to", ["bnb-4bit", "gguf", "ollama", "gguf-lora", "vllm", "base"])
def test_an_adapter_whose_base_changed(to: str, run: Path, random_base: Path, tmp_path: Path, out: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(random_base, other)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    refused(out, AdapterError, "fingerprint", run, to, base=str(other))


@pytest.mark.parametrize("to", sorted(TARGETS))
def test_an_adapter_that_is_not_finite(to: str, run: Path, tmp_path: Path, out: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(run, bad, ignore=shutil.ignore_patterns("checkpoint*"))
    tensors = load_file(bad / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, bad / "adapter_model.safetensors", {"format": "pt"})
    refused(out, AdapterError, "NaN or infinite", bad, to)


@pytest.mark.parametrize("to", ["bnb-4bit", "vllm"])
def test_an_occupied_folder_is_refused_with_the_ways_on(to: str, run: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty") as caught:
        export_model(run, to, out)
    assert "--overwrite" in caught.value.faults[0].fix
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_overwriting_replaces_the_whole_folder_of_an_export_alone(merged: Path, out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="did not write the folder"):
        export_model(merged, "gguf", out, quant="f16", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    (out / "export_report.json").write_text("{}")
    export_model(merged, "gguf", out, quant="f16", overwrite=True)
    assert {path.name for path in out.iterdir()} == {"merged-f16.gguf", "export_report.json"}


def test_output_inside_a_source(merged: Path) -> None:
    before = sorted(merged.iterdir())
    with pytest.raises(OutputError, match="lies in, or holds"):
        export_model(merged, "gguf", merged / "out")
    assert sorted(merged.iterdir()) == before


def test_a_target_that_is_a_file(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is not a folder"):
        export_model(run, "vllm", tmp_path / "file")


@pytest.mark.parametrize(
    ("to", "quant", "change", "match"),
    [
        ("gguf", "q4_k_m", {}, "llama-quantize"),
        ("ollama", "q6_k", {}, "llama-quantize"),
        ("gguf", "f16", {"model_type": "phi3"}, "phi3"),
        ("ollama", "f16", {"hidden_act": "relu"}, "relu"),
    ],
)
def test_what_gguf_cannot_hold_is_told_before_anything_is_merged(
    to: str,
    quant: str,
    change: dict[str, Any],
    match: str,
    merged: Path,
    tmp_path: Path,
    out: Path,
    broken_writer: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    shutil.copytree(merged, tmp_path / "source")
    content = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**content, **change}))
    for module in ("llama_cpp", "ollama"):
        broken_writer(f"qlora_kit.export.{module}.whole_model")
    refused(out, QloraKitError, match, tmp_path / "source", to, quant=quant)


def test_a_template_that_ollama_cannot_say_is_told_before_anything_is_merged(
    merged: Path, tmp_path: Path, out: Path, broken_writer: Callable[[str], None]
) -> None:
    shutil.copytree(merged, tmp_path / "source")
    twice = "{% for m in messages %}{{ m.content }}{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "source" / "chat_template.jinja").write_text(twice)
    broken_writer("qlora_kit.export.ollama.whole_model")
    refused(out, BaseModelError, "cannot be written as one of Ollama's", tmp_path / "source", "ollama", quant="f16")


@pytest.fixture
def broken_writer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a step of the export fail, as a full disk or a bug would."""

    def fail(step: str) -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise GuardError("a step failed", expected="none", fix="none")

        monkeypatch.setattr(step, broken)

    return fail


@pytest.mark.parametrize(
    ("to", "step"),
    [
        ("bnb-4bit", "qlora_kit.export.bnb_4bit.measure_second_rounding"),
        ("gguf", "qlora_kit.export.llama_cpp.write_gguf"),
        ("ollama", "qlora_kit.export.ollama.write_modelfile"),
        ("vllm", "qlora_kit.export.vllm.serve_script"),
        ("base", "qlora_kit.export.exporting.write_json"),
    ],
)
def test_a_late_failure_leaves_nothing(
    to: str, step: str, run: Path, out: Path, broken_writer: Callable[[str], None]
) -> None:
    broken_writer(step)
    refused(out, GuardError, "a step failed", run, to)


def test_a_base_by_name_is_exported_as_the_trained_base(random_base: Path, out: Path) -> None:
    result = export_model(random_base, "base", out, onto="dequantized")
    report = json.loads((out / "merge_report.json").read_text())
    assert report["kind"] == "trained_base"
    assert result.verification is not None
    assert result.verification["passed"] is True
    assert (out / "model.safetensors").is_file()
