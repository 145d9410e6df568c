"""What the README tells a newcomer to type works as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from qlora_kit.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_two_commands_are_the_make_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    first = [line.split("#")[0].split() for line in blocks("sh")[0].splitlines()]
    assert first == [["make", "demo"], ["make", "test"]]
    assert {"demo", "test"} <= targets


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    sentiment, translation = capsys.readouterr().out.splitlines()
    assert sentiment in [f"sentiment {label}" for label in ("positive", "negative", "neutral")]
    assert translation == "translation Les petits chats sont sous la table blanche."


def test_the_csv_example_is_checked_and_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text(blocks("csv")[0], encoding="utf-8")
    commands = [line.split("#")[0] for line in blocks("sh")[2].splitlines()]
    assert [shlex.split(command)[1] for command in commands] == ["data", "train"]
    for command in commands:
        words = [word.replace("configs/", f"{ROOT}/configs/") for word in shlex.split(command)[1:]]
        short = ["train.max_steps=1"] if words[0] == "train" else []
        with pytest.raises(SystemExit) as end:
            main([*words, *short])
        assert end.value.code in (None, 0), capsys.readouterr().err
    assert (tmp_path / "runs/mine/qlora_kit.json").is_file()


def test_every_verb_of_the_table_exists(capsys: pytest.CaptureFixture[str]) -> None:
    verbs = set(re.findall(r"`qlora-kit ([a-z]+)", README))
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert all(re.search(rf"\b{verb}\b", help_text) for verb in verbs)
