"""The limited child process: right, wrong, endless and greedy code."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.code_execution import run_assertions

GOOD = "def double(n):\n    return 2 * n\n"
TESTS = ["assert double(2) == 4", "assert double(-1) == -2"]


def test_passed() -> None:
    result = run_assertions(GOOD, TESTS)
    assert result.passed
    assert result.status == "passed"
    assert result.reason == ""


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
    result = run_assertions(f"with open({str(target)!r}, 'w') as f:\n    f.write('x' * 100)\n", ["assert True"])
    assert result.status == "error"
    assert "OSError" in result.reason
    assert not target.exists() or target.stat().st_size == 0
    assert run_assertions("import os", ["assert 'SECRET' not in os.environ", "assert os.listdir() == []"]).passed


def test_no_tests_check_nothing() -> None:
    with pytest.raises(ValueError, match="no assertions"):
        run_assertions(GOOD, [])
