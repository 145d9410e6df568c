"""A merge that is killed leaves nothing or everything; run again, it is there at once or made whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "kill_merge.py"


def kill(*options: str) -> list[dict[str, Any]]:
    """The records of ``kill_merge.py``, the counts last."""
    process = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_a_killed_merge_leaves_nothing_or_everything() -> None:
    counts = kill("--random", "2", "--every", "9")[-1]
    assert counts["good"] == counts["moments"] == counts["killed"] >= 4


@pytest.mark.faults
def test_at_any_moment() -> None:
    counts = kill("--random", "24", "--every", "1")[-1]
    assert counts["good"] == counts["moments"] == counts["killed"] >= 40
