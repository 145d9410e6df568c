"""Run a generated function and its assertions in a limited child process, and say whether they hold.

This is a limited child process, **not a sandbox against malice**: an isolated interpreter with an empty environment,
a temporary working directory, limits on CPU, memory, written bytes and processes, a deadline, and an audit hook that
refuses to start a process, to connect, and to create, write, rename or delete a file. It stops mistakes (endless loops,
huge lists, forks, a stray ``os.remove``). Code that sets out to do harm can still read what the user can read, get
round the hook, and claim to have passed: run untrusted models inside a container or a virtual machine.
"""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_kit.errors import QloraKitError

MEMORY_BYTES = 512 * 1024**2
OUTPUT_BYTES = 16_384
CODE_PROCESSES = 8
_FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:\n?```|\Z)", re.DOTALL)
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
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryFile() as stdin:
        stdin.write(job)
        stdin.seek(0)
        # -I: no user site, no PYTHON* variables, no current directory on the path; -S: no installed packages.
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
    with process:
        try:
            output = _read_output(process, deadline)
            if len(output) > OUTPUT_BYTES:
                return ExecutionResult("error", f"the process wrote more than {OUTPUT_BYTES} bytes")
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return ExecutionResult("timeout", f"no verdict after {timeout_seconds:g} seconds")
        finally:
            if process.poll() is None:  # past a limit, or interrupted: end the child and whatever it started
                os.killpg(process.pid, signal.SIGKILL)
    return _read_verdict(output, process.returncode)


def _read_output(process: subprocess.Popen[bytes], deadline: float) -> bytes:
    """What the process writes until it closes its output, at most one byte more than ``OUTPUT_BYTES``.

    Raises:
        subprocess.TimeoutExpired: The deadline, on the monotonic clock, passed.
    """
    output = b""
    pipe = process.stdout
    if pipe is None:
        raise ValueError("the process has no pipe to read from")
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(output) <= OUTPUT_BYTES:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise subprocess.TimeoutExpired(process.args, 0)
            chunk = os.read(pipe.fileno(), OUTPUT_BYTES + 1 - len(output))
            if not chunk:
                break
            output += chunk
    return output


def _read_verdict(output: bytes, returncode: int) -> ExecutionResult:
    if not output:
        if returncode in (-signal.SIGXCPU, -signal.SIGKILL):
            return ExecutionResult("timeout", "the CPU limit was reached")
        return ExecutionResult("error", f"the process ended without a verdict (code {returncode})")
    try:
        verdict = json.loads(output)
    except (ValueError, RecursionError):
        verdict = None
    match verdict:
        case ["passed" | "failed" | "error" as status, str(reason)]:
            return ExecutionResult(status, reason.encode("utf-8", "replace").decode())  # no lone surrogates
    return ExecutionResult("error", "the process wrote something else than a verdict")


def code_of(answer: str) -> str:
    """The code in an answer: its first Markdown block where it has one, as chat models write it, else the whole."""
    block = _FENCED.search(answer)
    return answer if block is None else block.group(1)


def run_answers(
    answers: Sequence[str], tests: Sequence[Sequence[str]], progress: Callable[[int], None] | None = None
) -> list[ExecutionResult]:
    """Run each answer's code with its row's assertions, a few child processes at a time.

    Args:
        answers: What the model wrote; see ``code_of``.
        tests: The assertions of each row.
        progress: Called with the number of rows done.
    """
    results: list[ExecutionResult] = []
    with ThreadPoolExecutor(min(CODE_PROCESSES, os.cpu_count() or 1)) as pool:
        for result in pool.map(run_assertions, map(code_of, answers), tests):  # an exception cancels what waits
            results.append(result)
            if progress is not None:
                progress(len(results))
    return results
