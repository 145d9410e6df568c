"""The JSONL file of answers: whole or not there, gone on from where a run was stopped, never mixed with another's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qlora_kit.batch.answer_log import AnswerLog
from qlora_kit.errors import OutputError

ROWS = [{"text": f"réponse {number}"} for number in range(5)]


def write(path: Path, rows: list[dict[str, str]], *, key: str = "a", finish: bool = True) -> int:
    """Adds the rows that are missing; returns how many were there."""
    with AnswerLog.open(path, key=key) as log:
        before = log.done
        for row in rows[before:]:
            log.add(row)
        if finish:
            log.finish()
    return before


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_in_order_and_no_file_beside(tmp_path: Path) -> None:
    assert write(tmp_path / "a.jsonl", ROWS) == 0
    assert lines(tmp_path / "a.jsonl") == ROWS
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("cut", range(0, 21, 4))
def test_a_stopped_run_is_gone_on_from_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "a.jsonl"
    write(out, ROWS[:3], finish=False)
    assert not out.exists()
    (partial,) = tmp_path.iterdir()
    content = partial.read_bytes()
    partial.write_bytes(content[: len(content) - cut])
    whole = content[: len(content) - cut].count(b"\n") - 1
    assert write(out, ROWS) == whole
    assert lines(out) == ROWS
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_first_line_that_was_cut_is_a_new_beginning(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS[:1], finish=False)
    (partial,) = tmp_path.iterdir()
    partial.write_bytes(partial.read_bytes()[:9])
    assert write(tmp_path / "a.jsonl", ROWS) == 0
    assert lines(tmp_path / "a.jsonl") == ROWS


def test_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    write(out, ROWS)
    before = out.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        write(out, ROWS)
    assert out.read_bytes() == before
    write(tmp_path / "b.jsonl", ROWS[:2], finish=False)
    with pytest.raises(OutputError, match="other prompts, adapters or settings"):
        write(tmp_path / "b.jsonl", ROWS, key="another")
    assert write(tmp_path / "b.jsonl", ROWS) == 2
    with (
        AnswerLog.open(tmp_path / "c.jsonl", key="a"),
        pytest.raises(OutputError, match="another process"),
    ):
        write(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(OutputError, match="its folder does not exist"):
        write(tmp_path / "nowhere" / "a.jsonl", ROWS)
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(OutputError, match="exists already"),
        AnswerLog.open(tmp_path / "folder", key="a", overwrite=True),
    ):
        pass
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / ".d.jsonl.unfinished").symlink_to(target)
    with pytest.raises(OutputError, match="cannot be written to"):
        write(tmp_path / "d.jsonl", ROWS)
    assert target.read_text() == "mine"


def test_overwrite_replaces_both(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    write(out, ROWS)
    with AnswerLog.open(out, key="b", overwrite=True) as log:
        log.add({"text": "half"})
    assert lines(out) == ROWS  # until the new one is whole
    with AnswerLog.open(out, key="c", overwrite=True) as log:
        assert log.done == 0
        log.add({"text": "new"})
        log.finish()
    assert lines(out) == [{"text": "new"}]
