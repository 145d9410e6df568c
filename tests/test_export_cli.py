"""`qlora-kit export` and `push` as they are typed: JSON alone on stdout, exit codes, and what a person reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_kit.cli import main

if TYPE_CHECKING:
    from qlora_kit.training import TrainResult

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `qlora-kit ARGUMENTS` in an empty current folder, 80 columns wide: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_json_is_one_object_alone(call: Call, trained_run: tuple[Path, TrainResult], tmp_path: Path) -> None:
    code, out, _ = call("export", trained_run[0], "--to", "gguf-lora", "--out", "lora", "--json")
    content = json.loads(out)
    assert code == 0
    assert content.keys() >= {"output_dir", "target", "files", "verification", "remarks"}
    paths = {file["path"]: file["bytes"] for file in content["files"]}
    assert paths["reviews-lora.gguf"] == (tmp_path / "lora" / "reviews-lora.gguf").stat().st_size
    assert content["original_base"]["measured_on"] == "validation_rows"


def test_what_a_person_reads(call: Call, trained_run: tuple[Path, TrainResult]) -> None:
    code, out, err = call("export", trained_run[0], "--to", "bnb-4bit", "--out", "four", "--onto", "dequantized")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    assert " 0 KiB" not in out  # small files in bytes
    text = " ".join(out.split())
    assert "verified: 14 weights are their 4-bit round trip" in text
    assert "loss on 9 validation rows: base" in text
    assert "- advice:" in text
    assert "quantizing" in err


def test_a_mistake_ends_with_2_and_three_parts(
    call: Call, trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    code, out, err = call("export", trained_run[0], "--to", "gguff", "--out", "out")
    assert (code, out) == (2, "")
    assert "error: --to 'gguff'" in err
    assert "expected: one of bnb-4bit, gguf" in err
    assert "do: did you mean 'gguf'?" in err
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_a_push(call: Call, trained_run: tuple[Path, TrainResult]) -> None:
    code, out, err = call("push", trained_run[0], "--to", "me/reviews", "--dry-run")
    assert code == 0
    assert "me/reviews (private)" in out
    assert "adapter_model.safetensors" in out
    assert "README.md:" in out
    written = json.loads(call("push", trained_run[0], "--to", "me/reviews", "--dry-run", "--json")[1])["card"]
    assert written in out  # as it is sent, not wrapped at the terminal's width
    assert "nothing was sent" in err
    code, out, _ = call("push", trained_run[0], "--to", "me/reviews", "--dry-run", "--public", "--json")
    content = json.loads(out)
    assert (content["private"], content["sent"]) == (False, False)
    code, _, err = call("push", trained_run[0], "--to", "reviews")
    assert code == 2
    assert "ORG/NAME" in err
