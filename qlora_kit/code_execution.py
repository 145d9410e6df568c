"""Run a generated function and its assertions in a limited child process, and say whether they hold.

This is a limited child process, **not a sandbox against malice**: an isolated interpreter with an empty environment,
a temporary working directory, limits on CPU, memory, files and processes, and a deadline. It stops mistakes (endless
loops, huge lists, files, forks); code that sets out to do harm can still read what the user can read. Run untrusted
models inside a container or a virtual machine.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_kit.errors import QloraKitError

MEMORY_BYTES = 512 * 1024**2
OUTPUT_BYTES = 16_384
_CHILD = Path(__file__).with_name("assertion_child.py")

Status = Literal["passed", "failed", "timeout", "error"]


@dataclass(frozen=True)
class ExecutionResult:
    """What came of one run.

    Attributes:
        status: ``passed``: all assertions hold; ``failed``: one is false; ``timeout``: the deadline passed;
            ``error``: the code or an assertion raised, or the process died.
        reason: The assertion or exception; empty when passed.
    """

    status: Status
    reason: str

    @property
    def passed(self) -> bool:
        """Whether all assertions hold."""
        return self.status == "passed"


def run_assertions(code: str, tests: Sequence[str], *, timeout_seconds: float = 5.0) -> ExecutionResult:
    """Run ``code``, then each assertion line of ``tests`` in its namespace.

    Raises:
        QloraKitError: The system has no process limits (not POSIX).
        ValueError: There are no tests: nothing would be checked.
    """
    if not tests:
        raise ValueError("no assertions to run")
    if os.name != "posix":
        raise QloraKitError(
            "generated code cannot be run on this system",
            expected="a POSIX system, which can limit a process",
            fix="evaluate code on Linux, or leave the metric pass@1 out",
        )
    job = {
        "code": code,
        "tests": list(tests),
        "cpu_seconds": math.ceil(timeout_seconds) + 1,
        "memory_bytes": MEMORY_BYTES,
    }
    with tempfile.TemporaryDirectory(prefix="qlora-kit-code-") as folder:
        return _run_child(json.dumps(job).encode(), Path(folder), timeout_seconds)


def _run_child(job: bytes, folder: Path, timeout_seconds: float) -> ExecutionResult:
    # -I: no user site, no PYTHON* variables, no current directory on the path; -S: no installed packages.
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(job, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        return ExecutionResult("timeout", f"no verdict after {timeout_seconds:g} seconds")
    finally:
        if process.poll() is None:  # past the deadline, or interrupted: end the child and whatever it started
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return _read_verdict(output[:OUTPUT_BYTES], process.returncode)


def _read_verdict(output: bytes, returncode: int) -> ExecutionResult:
    try:
        status, reason = json.loads(output)
    except ValueError:  # no verdict, or not one of the child's
        if returncode == -signal.SIGXCPU or returncode == -signal.SIGKILL:
            return ExecutionResult("timeout", "the CPU limit was reached")
        return ExecutionResult("error", f"the process ended without a verdict (code {returncode})")
    if status not in ("passed", "failed", "error") or not isinstance(reason, str):
        return ExecutionResult("error", "the process wrote something else than a verdict")
    return ExecutionResult(status, reason)
