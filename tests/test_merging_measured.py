"""What a merge measures in little memory: logits a layer at a time, the choice by validation rows, sampled codes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_kit.adapters import AdapterContract
from qlora_kit.checkpoint import ShardWriter, TensorSource, TensorSpec
from qlora_kit.cli import main
from qlora_kit.config import QuantizationSection, load_config
from qlora_kit.data.encoding import encode_conversation
from qlora_kit.data.preparing import prepare
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, BaseModelError, OutputError
from qlora_kit.four_bit import code_sample
from qlora_kit.generation import Sampling
from qlora_kit.likelihood import Loss, LossDifference, answer_nlls
from qlora_kit.merging import answering, choosing, merge_adapter
from qlora_kit.merging.layerwise import Sequences, layerwise_logits
from qlora_kit.merging.same_codes import sampled_codes
from qlora_kit.merging.tensor_check import WrittenTensors
from qlora_kit.training import TrainResult

FAMILIES = {
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": False},
    "llama": {"model_type": "llama", "attention_bias": True, "tie_word_embeddings": False},
    "mistral-window": {"model_type": "mistral", "sliding_window": 8, "tie_word_embeddings": False},
    "gemma2-softcap": {"model_type": "gemma2", "head_dim": 16, "final_logit_softcapping": 2.0, "sliding_window": 8},
}
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_layer_by_layer_are_transformers_own(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SIZES, **FAMILIES[family]})).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("qlora_kit.merging.tensors.BLOCK_NUMBERS", 1000)
    ids = [list(range(20, 32)), list(range(40, 45)), list(range(60, 79))]

    with WrittenTensors(tmp_path) as weights:
        found = layerwise_logits(tmp_path, weights, Sequences(ids, [3, 5, 19]))

    for row, kept, logits in zip(ids, (3, 5, 19), found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([row])).logits[0, -kept:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_missing_and_misshapen_weights_are_named(random_base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    changes = {
        "no tensor 'model.layers.2": {"num_hidden_layers": 3, "layer_types": None},
        "is the shape": {"vocab_size": 9},
        "cannot build": {"num_hidden_layers": 3, "layer_types": ["full_attention"]},
    }
    for pattern, change in changes.items():
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with WrittenTensors(folder) as weights, pytest.raises(BaseModelError, match=pattern):
            layerwise_logits(folder, weights, Sequences([[1, 2]], [1]))


def test_auto_measures_both_ways_on_the_validation_rows(
    trained_run: tuple[Path, TrainResult], random_model: PreTrainedModel, tmp_path: Path
) -> None:
    adapter = trained_run[0]

    result = merge_adapter(adapter, tmp_path / "out")

    choice = result.choice
    assert choice is not None
    assert choice.rows == 9
    assert choice.difference is not None
    assert result.onto == "dequantized"  # nine rows decide nothing
    # The independent reference: the engine's live adapter, and the written model, by whole-model likelihood.
    config = load_config(adapter / "config.yaml")
    engine = Engine(str(AdapterContract.load(adapter).base.id))
    rows = [
        encode_conversation(example.messages, engine.tokenizer, loss_on="last")
        for example in prepare(config).validation
    ]
    assert choice.tokens == sum(row.supervised_tokens for row in rows)
    name = engine.load(str(adapter))
    with engine.using(name) as live:
        expected = sum(answer_nlls(live, rows, batch_size=4, pad_token_id=0)) / choice.tokens
    assert choice.live_loss == pytest.approx(expected, rel=1e-4)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    found = sum(answer_nlls(written, rows, batch_size=4, pad_token_id=0)) / choice.tokens
    assert choice.candidates["dequantized"].loss == pytest.approx(found, rel=1e-4)
    costs = {onto: cost.against_live.kl for onto, cost in choice.candidates.items()}
    assert costs["dequantized"] < costs["original"] / 10
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["choice"]["candidates"]["original"]["loss"] == choice.candidates["original"].loss
    assert "9 validation rows" in (tmp_path / "out" / "README.md").read_text()


def test_auto_takes_the_original_weights_where_rows_show_they_are_better(
    trained_run: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[Loss, Loss]] = []

    def lower(loss: Loss, other: Loss) -> LossDifference:
        measured.append((loss, other))
        return LossDifference(-0.2, (-0.3, -0.1), 50)

    monkeypatch.setattr(choosing, "loss_difference", lower)
    result = merge_adapter(trained_run[0], tmp_path / "out")
    assert result.onto == "original"
    assert result.choice is not None
    costs = result.choice.candidates
    assert [loss.mean for loss in measured[0]] == [costs["original"].loss, costs["dequantized"].loss]
    assert result.verification is not None
    assert result.verification.drift != result.verification.logits


def test_auto_says_why_nothing_was_measured(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(trained_run[0], tmp_path / "adapter"))
    unverified = merge_adapter(adapter, tmp_path / "one", verify=False)
    assert unverified.choice is not None
    assert "nothing was to be measured" in unverified.choice.reason
    (adapter / "config.yaml").unlink()
    result = merge_adapter(adapter, tmp_path / "two")
    assert result.choice is not None
    assert "no config.yaml beside the adapter" in result.choice.reason
    assert result.onto == "dequantized"
    assert merge_adapter(adapter, tmp_path / "three", onto="original", verify=False).choice is None


def test_other_codes_are_refused_without_verification_too(
    trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trained_run[0], tmp_path / "adapter"))
    content = json.loads((adapter / "qlora_kit.json").read_text())
    codes = content["quantization"]["nf4_codes"]
    name = next(iter(codes))
    codes[name] = f"{int(codes[name][:2], 16) ^ 1:02x}{codes[name][2:]}"
    (adapter / "qlora_kit.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="NF4 codes"):
        merge_adapter(adapter, tmp_path / "out", verify=False)


@pytest.mark.parametrize("shape", [(300, 200), (37, 62), (3, 5), (1, 64), (64, 64)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_sampled_codes_are_those_of_the_whole_weight(shape: tuple[int, int], kind: str, tmp_path: Path) -> None:
    weight = torch.randn(shape, dtype=torch.bfloat16)
    with ShardWriter(tmp_path, {"w": TensorSpec("BF16", shape)}) as writer:
        writer.write("w", weight)
    codes, _ = quantize_4bit(weight.float(), blocksize=64, quant_type=kind)
    with TensorSource(tmp_path) as source:
        assert sampled_codes(source, "w", kind) == code_sample(codes)


def test_a_merge_into_4_bits_in_place_is_refused_with_the_reason(
    trained_run: tuple[Path, TrainResult], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for onto, expected in (("quantized", "rounded away"), ("nowhere", "dequantized, original, auto")):
        with pytest.raises(SystemExit) as ended:
            main(["merge", str(trained_run[0]), "--out", str(tmp_path / "out"), "--onto", onto])
        assert ended.value.code == 2
        assert expected in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_run_again_it_is_there_at_once(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    adapter, out = trained_run[0], tmp_path / "out"
    first = merge_adapter(adapter, out)
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "README.md").write_text("my own words")

    again = merge_adapter(adapter, out)

    assert again.already_there
    costs = {"seconds": 0.0, "peak_rss_bytes": 0, "already_there": False}
    assert replace(again, **costs) == replace(first, **costs)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir() if path.suffix != ".md"} == {
        name: time for name, time in times.items() if not name.endswith(".md")
    }
    assert merge_adapter(adapter, out, verify=False).already_there  # more than was asked for
    with pytest.raises(OutputError, match="not empty"):
        merge_adapter(adapter, out, max_shard_bytes=10**6)
    made = merge_adapter(adapter, out, overwrite=True)
    assert not made.already_there
    assert "my own words" not in (out / "README.md").read_text()


def test_the_written_model_is_measured_on_the_validation_rows(
    trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    adapter = trained_run[0]
    config = load_config(adapter / "config.yaml")

    result = merge_adapter(adapter, tmp_path / "out", onto="original")

    assert result.verification is not None
    found = result.verification.on_rows
    assert not isinstance(found, str)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    engine = Engine(str(AdapterContract.load(adapter).base.id))
    examples = prepare(config).validation
    rows = [encode_conversation(example.messages, engine.tokenizer, loss_on="last") for example in examples]
    tokens = sum(row.supervised_tokens for row in rows)
    assert found.rows == len(rows) == 9
    assert found.loss == pytest.approx(sum(answer_nlls(written, rows, batch_size=4, pad_token_id=0)) / tokens, rel=1e-4)
    with engine.using(engine.load(str(adapter))) as live:
        trained = sum(answer_nlls(live, rows, batch_size=4, pad_token_id=0)) / tokens
    assert found.trained_loss == pytest.approx(trained, rel=1e-4)
    assert found.drift is not None
    assert found.drift.mean_abs > 10 * found.logits.mean_abs  # 4-bit and 16-bit weights are far apart
    assert found.logits.mean_abs == pytest.approx(found.noise.mean_abs, rel=1)


def test_the_answers_of_merged_and_live_model_are_scored(
    trained_run: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained_run[0]
    config = load_config(adapter / "config.yaml")

    verification = merge_adapter(adapter, tmp_path / "out").verification

    assert verification is not None
    found = verification.answers
    assert (found.reason, found.metric, found.rows) == ("", "accuracy", 9)
    # The independent reference: the engine's own answers, and those of the merged model alone, compared as texts.
    engine = Engine(str(AdapterContract.load(adapter).base.id))
    name = engine.load(str(adapter))
    labels = [example.messages[-1].content for example in prepare(config).validation]
    turns = [example.messages[:-1] for example in prepare(config).validation]
    limit = Sampling(max_new_tokens=config.eval.max_new_tokens or 4)
    live = [answer.text.strip() for answer in engine.generate(turns, adapter=name, sampling=limit)]
    merged_engine = Engine(str(tmp_path / "out"), quantization=QuantizationSection(load_in_4bit=False))
    merged = [answer.text.strip() for answer in merged_engine.generate(turns, sampling=limit)]
    assert found.live == pytest.approx(sum(map(str.__eq__, live, labels)) / 9)
    assert found.merged == pytest.approx(sum(map(str.__eq__, merged, labels)) / 9)
    assert found.same_answers == pytest.approx(sum(map(str.__eq__, live, merged)) / 9)

    monkeypatch.setattr(answering, "MAX_CPU_BYTES", 1000)
    large = merge_adapter(adapter, tmp_path / "large")
    assert large.verification is not None
    assert "the model takes" in large.verification.answers.reason
    report = json.loads((tmp_path / "large" / "merge_report.json").read_text())
    assert report["verification"]["generated_metric"].startswith("not checked: the model takes")
    assert "were not checked: the model takes" in (tmp_path / "large" / "README.md").read_text()


def test_validation_files_that_are_not_those_of_training_are_not_measured(
    trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(trained_run[0], tmp_path / "adapter"))
    content = json.loads((adapter / "qlora_kit.json").read_text())
    for row in content["data"]:
        row["sha256"] = "0" * 64
    (adapter / "qlora_kit.json").write_text(json.dumps(content))
    result = merge_adapter(adapter, tmp_path / "out")
    assert result.verification is not None
    assert "validation.jsonl is not the one of training" in str(result.verification.on_rows)
    assert "validation.jsonl is not the one of training" in result.verification.answers.reason
    assert result.choice is not None
    assert "validation.jsonl is not the one of training" in result.choice.reason


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_on_each_device_are_verified_on_the_cpu(
    device: str, trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    """The check of the tensors stays on the CPU, so that it is independent of the device's products."""
    result = merge_adapter(trained_run[0], tmp_path / "out", device=device)
    assert result.verification is not None
    assert result.verification.passed
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["device"] == device
