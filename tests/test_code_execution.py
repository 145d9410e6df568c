"""The limited child process: right, wrong, endless and greedy code."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.code_execution import run_assertions

GOOD = "def double(n):\n    return 2 * n\n"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]
NOTHING_ASKED = ["assert True"]
"""Holds in the child whatever the code was: the code itself has to fail."""


def test_passed() -> None:
    result = run_assertions(GOOD, TESTS)
    assert result.passed
    assert result.status == "passed"
    assert result.reason == ""
    assert run_assertions("x = 1", NOTHING_ASKED).passed


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("def double(n):\n    return n + 2\n", "failed", "false: assert double(-1) == -2"),
        ("def double(n)\n", "error", "SyntaxError in the code"),
        ("", "error", "NameError in assert double(2) == 4"),
        ("import sys\nsys.exit(0)\n", "error", "SystemExit in the code"),
        ("import os\nos._exit(0)\n", "error", "without a verdict"),
        ("raise AssertionError('x')", "error", "AssertionError in the code"),
        ("print('passed')\n" * 50, "error", "NameError"),
        ("import numpy", "error", "ModuleNotFoundError"),
        ("import qlora_kit", "error", "ModuleNotFoundError"),
        ("x = bytearray(10**10)", "error", "MemoryError"),
        ("def f(): return f()\nf()", "error", "RecursionError"),
        ("import os\nos.fork()", "error", "PermissionError"),
        ("import subprocess\nsubprocess.run(['ls'])", "error", "PermissionError"),
        ("import socket\nsocket.socket()", "error", "PermissionError"),
        ("raise ValueError('x' * 100000)", "error", "ValueError"),
    ],
)
def test_wrong_code(code: str, status: str, reason: str) -> None:
    result = run_assertions(code, TESTS)
    assert (result.status, result.passed) == (status, False)
    assert reason in result.reason
    assert len(result.reason) <= 500


def test_endless_code_is_ended() -> None:
    for code in ("while True: pass", "import time\ntime.sleep(60)"):
        result = run_assertions(code, TESTS, timeout_seconds=0.5)
        assert result.status == "timeout"
        assert "0.5 seconds" in result.reason


def test_nothing_is_written_and_nothing_is_inherited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x")
    target = tmp_path / "out.txt"
    result = run_assertions(f"with open({str(target)!r}, 'w') as f:\n    f.write('x' * 100)\n", NOTHING_ASKED)
    assert result.status == "error"
    assert "PermissionError" in result.reason
    assert not target.exists()
    assert run_assertions("import os", ["assert 'SECRET' not in os.environ", "assert os.listdir() == []"]).passed


@pytest.mark.parametrize(
    "statement",
    [
        "os.remove(FILE)",
        "os.unlink(FILE)",
        "pathlib.Path(FILE).unlink()",
        "os.rename(FILE, NEW)",
        "os.replace(FILE, NEW)",
        "os.rmdir(EMPTY)",
        "os.mkdir(NEW)",
        "os.truncate(FILE, 0)",
        "os.chmod(FILE, 0)",
        "os.chown(FILE, os.getuid(), os.getgid())",
        "os.link(FILE, NEW)",
        "os.symlink(FILE, NEW)",
        "os.utime(FILE, (0, 0))",
        "os.mkfifo(NEW)",
        "os.mknod(NEW)",
        "open(FILE, 'w')",
        "open(FILE, 'r+')",
        "open(NEW, 'x')",
        "open(NEW, 'ab')",
        "os.open(NEW, os.O_CREAT)",
        "os.open(FILE, os.O_RDONLY | os.O_TRUNC)",
        "pathlib.Path(NEW).touch()",
        "pathlib.Path(FILE).touch()",
        "shutil.rmtree(EMPTY)",
        "shutil.copy(FILE, NEW)",
        "shutil.move(FILE, NEW)",
        "tempfile.mkdtemp(dir=os.path.dirname(FILE))",
        "sqlite3.connect(NEW)",
        "dbm.open(NEW, 'c')",
    ],
)
def test_no_file_is_touched(tmp_path: Path, statement: str) -> None:
    file, empty, new = tmp_path / "file.txt", tmp_path / "empty", tmp_path / "new"
    file.write_text("precious")
    empty.mkdir()
    before = file.stat()
    module = statement.split(".")[0] if not statement.startswith("open") else "os"
    code = f"import os, {module}\nFILE, EMPTY, NEW = {str(file)!r}, {str(empty)!r}, {str(new)!r}\n{statement}\n"
    result = run_assertions(code, NOTHING_ASKED)
    assert result.status == "error"
    assert result.reason.startswith(
        "AttributeError" if "os.mk" in statement and "mkdir" not in statement else "PermissionError"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.txt"]
    after = file.stat()
    assert file.read_text() == "precious"
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, before.st_nlink)


def test_files_can_be_read_and_modules_imported(tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("words")
    code = f"import collections, decimal, random, re, statistics\ntext = open({str(file)!r}).read()\n"
    assert run_assertions(code, ["assert text == 'words'"]).passed


FORGED = (
    "import os\nfor descriptor in range(3, 10):\n    try:\n        os.write(descriptor, {data})\n    except OSError:\n"
)
FORGED += "        pass\nos._exit(0)\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("b'3'", "something else than a verdict"),
        ("b'null'", "something else than a verdict"),
        ("b'[1]'", "something else than a verdict"),
        ("b'[[], {}]'", "something else than a verdict"),
        ('b\'{"passed": 1, "x": 2}\'', "something else than a verdict"),
        ("b'[\"passed\", 1]'", "something else than a verdict"),
        ("b'\\xff'", "something else than a verdict"),
        ("b'[' * 16000", "something else than a verdict"),
        ("b'x' * 10**8", "more than 16384 bytes"),
    ],
)
def test_what_is_no_verdict_is_an_error(data: str, reason: str) -> None:
    result = run_assertions(FORGED.format(data=data), TESTS)
    assert result.status == "error"
    assert reason in result.reason


def test_a_reason_can_be_written_as_utf8() -> None:
    result = run_assertions("raise ValueError('\\ud800')", TESTS)
    assert (result.status, result.reason) == ("error", "ValueError in the code: ?")


def test_a_long_job_is_read_whole() -> None:
    assert run_assertions(GOOD + "#" * 10**6, TESTS).passed


def test_no_tests_check_nothing() -> None:
    with pytest.raises(ValueError, match="no assertions"):
        run_assertions(GOOD, [])
