"""`qlora-kit plan`: from a config.json alone, without a heavy library, in 80 columns, with lines that fit to paste."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_kit import estimate_memory
from qlora_kit.cli import main
from qlora_kit.config import load_config
from qlora_kit.errors import ConfigError
from qlora_kit.memory.cards import GIB, find_card

ROOT = Path(__file__).resolve().parent.parent
DESIGN_KEYS = {"peak_bytes", "fits", "breakdown", "longest_max_length", "suggestions"}
CONFIG = str(ROOT / "configs" / "qwen2.5-7b-24gb.yaml")
QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "max_position_embeddings": 32768,
    "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that holds the config.json of a 7B model and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    return tmp_path


@pytest.fixture
def plan(base: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON object that `qlora-kit plan` prints for the 7B model and arguments."""

    def run(*arguments: str) -> dict[str, Any]:
        end(["plan", CONFIG, f"model.base={base}", *arguments, "--json"], code=0)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def end(arguments: list[str], *, code: int) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert (ended.value.code or 0) == code


def test_json_holds_the_plan(plan: Callable[..., dict[str, Any]], base: Path) -> None:
    content = plan("--gpu", "RTX 4090")
    assert set(content) >= DESIGN_KEYS
    assert content["fits"] is True
    assert content["peak_bytes"] == sum(content["breakdown"].values())
    found = estimate_memory(load_config(CONFIG, [f"model.base={base}"]), find_card("4090"))
    assert content == json.loads(json.dumps(found.to_json()))


def test_pasted_lines_make_it_fit(plan: Callable[..., dict[str, Any]]) -> None:
    given = ["train.gradient_checkpointing=false", "train.per_device_eval_batch_size=64", "train.packing=false"]
    content = plan(*given, "--gpu", "12GiB")
    assert content["fits"] is False
    for suggestion in content["suggestions"]:
        pasted = yaml.safe_load(suggestion["yaml"])["train"]
        assert pasted == suggestion["train"]
        again = plan(*given, *(f"train.{key}={json.dumps(value)}" for key, value in pasted.items()), "--gpu", "12GiB")
        assert again["fits"] is True
        assert again["peak_bytes"] == suggestion["peak_bytes"]


def test_no_suggestion_keeps_rows_longer_than_the_base_takes(plan: Callable[..., dict[str, Any]]) -> None:
    for gpu in ("12GiB", "24GiB", "H200", "5GiB"):
        content = plan("--gpu", gpu, "train.max_length=40000")
        offered = [*content["suggestions"], *([content["smallest"]] if content["smallest"] else [])]
        assert offered
        assert all(suggestion["train"]["max_length"] <= 32_768 for suggestion in offered)


def test_the_embedding_on_the_host_is_offered_and_its_line_counts(plan: Callable[..., dict[str, Any]]) -> None:
    """A 7B model on a card of 6 GiB: with 1.09 GB less on it."""
    content = plan("--gpu", "6GiB")
    assert content["fits"] is False
    assert all(suggestion["train"]["embedding_on_host"] is True for suggestion in content["suggestions"])
    lines = yaml.safe_load(content["suggestions"][0]["yaml"])["train"]
    again = plan("--gpu", "6GiB", *(f"train.{key}={json.dumps(value)}" for key, value in lines.items()))
    assert again["fits"] is True
    assert again["on_host"]["embedding on the host"] == 2 * 152_064 * 3584
    assert again["breakdown"]["head"] == content["breakdown"]["embedding and head"] // 2
    trained = plan("--gpu", "6GiB", "lora.modules_to_save=[embed_tokens]")
    assert not any("embedding_on_host" in suggestion["train"] for suggestion in trained["suggestions"])


def test_modules_that_the_base_lacks_are_refused(base: Path) -> None:
    """From its config.json, which is all that the plan reads."""
    with pytest.raises(ConfigError, match="the name 'q_prj' matches no matrix") as caught:
        estimate_memory(load_config(CONFIG, [f"model.base={base}", "lora.target_modules=[q_prj]"]), find_card("24GiB"))
    assert caught.value.faults[0].fix == "did you mean [q_proj]?"


def test_the_fused_path_is_counted_on_a_gpu_where_it_is_sure_to_be_used(plan: Callable[..., dict[str, Any]]) -> None:
    off, auto, on = (
        plan("--gpu", "24GiB", "train.packing=true", f"train.fast={mode}") for mode in ("off", "auto", "on")
    )
    assert auto["breakdown"] == off["breakdown"]
    assert on["peak_bytes"] < off["peak_bytes"]
    assert on["longest_max_length"] > off["longest_max_length"]
    assert any("not measured on a GPU" in note for note in on["notes"])
    assert not any("not measured on a GPU" in note for note in auto["notes"])


def test_overrides_and_the_longest_length_hold(plan: Callable[..., dict[str, Any]]) -> None:
    longest = plan("--gpu", "12GiB")["longest_max_length"]
    assert plan("--gpu", "12GiB", f"train.max_length={longest}")["fits"] is True
    assert plan("--gpu", "12GiB", f"train.max_length={longest + 64}")["fits"] is False


def test_rows_longer_than_the_base_takes_are_told(plan: Callable[..., dict[str, Any]]) -> None:
    def told(length: int) -> str:
        return " ".join(plan("--gpu", "24GiB", f"train.max_length={length}")["notes"])

    assert "max_length is 32,769, and the base takes 32,768 tokens" in told(32769)
    assert "the base takes" not in told(32768)


def test_where_nothing_fits_it_says_what_would(
    plan: Callable[..., dict[str, Any]], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = plan("--gpu", "5GiB")
    assert (content["fits"], content["suggestions"], content["longest_max_length"]) == (False, [], 0)
    assert content["smallest"]["peak_bytes"] > 5 * GIB
    again = plan(
        "--gpu",
        content["smallest_card"],
        *(f"train.{k}={json.dumps(v)}" for k, v in content["smallest"]["train"].items()),
    )
    assert again["fits"] is True
    end(["plan", CONFIG, f"model.base={base}", "--gpu", "5GiB"], code=0)
    text = capsys.readouterr().out
    assert "nothing fits into 5.00 GiB" in text
    assert f"what would do: {content['smallest_card']} (8.00 GiB) or larger, or a smaller base" in text


def test_the_margin_is_seen(
    plan: Callable[..., dict[str, Any]], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = plan("--gpu", "12GiB")
    assert content["margin_bytes"] == content["peak_bytes"] // 20
    end(["plan", CONFIG, f"model.base={base}", "--gpu", "12GiB"], code=0)
    assert "margin, 5%" in capsys.readouterr().out


def test_a_base_in_4_bits_brings_its_own_settings(plan: Callable[..., dict[str, Any]], base: Path) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": False}
    before = plan("--gpu", "24GiB")["breakdown"]["linear layers"]
    (base / "config.json").write_text(json.dumps({**QWEN_7B, "quantization_config": settings}))
    after = plan("--gpu", "24GiB", "quantization.load_in_4bit=false")["breakdown"]["linear layers"]
    assert after / before == pytest.approx(0.5625 / 0.5159, rel=1e-3)


def test_the_embedded_base_is_planned_too(capsys: pytest.CaptureFixture[str]) -> None:
    end(["plan", str(ROOT / "configs" / "sentiment.yaml"), "--gpu", "8GiB", "--json"], code=0)
    content = json.loads(capsys.readouterr().out)
    assert content["fits"] is True
    assert content["peak_bytes"] < 3 * GIB


@pytest.mark.parametrize("gpu", ["RTX 4090", "8GiB", "4GiB"])
def test_the_text_fits_80_columns(
    gpu: str, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    end(["plan", CONFIG, f"model.base={base}", "--gpu", gpu, "train.max_length=4096", "lora.use_dora=true"], code=0)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:])) <= 80
    text = "\n".join(lines)
    for part in ("predicted, not measured", "linear layers", "█", "peak", "margin", "longest max_length", "DoRA"):
        assert part in text
    assert ("does not fit" in text) is (gpu != "RTX 4090")


def test_nothing_heavy_is_imported(base: Path) -> None:
    program = (
        "import sys\nfrom qlora_kit.cli import main\n"
        f"try:\n    main(['plan', {CONFIG!r}, {f'model.base={base}'!r}, '--gpu', '24GiB', '--json'])\n"
        "except SystemExit:\n    pass\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'trl', 'datasets'} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    first, second = process.stdout.splitlines()
    assert json.loads(first)["fits"] is True
    assert second == ""


@pytest.mark.parametrize(
    ("changes", "arguments", "told"),
    [
        ({}, ["--gpu", "RTX 9999"], "24GiB"),
        ({"model_type": "gpt2"}, ["--gpu", "24GiB"], "model_type"),
        ({"hidden_size": 0}, ["--gpu", "24GiB"], "hidden_size"),
        ({}, ["--gpu", "24GiB", "train.optim=adam"], "train.optim"),
        (
            {},
            ["--gpu", "24GiB", "train.gradient_checkpointing=true", "train.checkpointed_layers=29"],
            "checkpointed_layers is 29, and",
        ),
    ],
)
def test_mistakes_end_with_2(
    changes: dict[str, Any], arguments: list[str], told: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "config.json").write_text(json.dumps({**QWEN_7B, **changes}))
    end(["plan", CONFIG, f"model.base={base}", *arguments], code=2)
    message = capsys.readouterr().err
    assert told in message
    assert "expected: " in message and "do: " in message
