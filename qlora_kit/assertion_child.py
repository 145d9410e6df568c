"""The process that ``code_execution`` starts: read a job from stdin, limit itself, run it, write the verdict to stdout.

It imports the standard library only, and is run as a file by an isolated interpreter.
"""

from __future__ import annotations

import json
import os
import resource
import sys

REASON_CHARACTERS = 500
_REFUSED_EVENTS = ("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "subprocess.", "socket.", "ctypes.")


def limit_resources(cpu_seconds: int, memory_bytes: int) -> None:
    """Limit CPU time, address space, written files and new processes, for good."""
    for kind, amount in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (amount, amount))


def refuse(event: str, arguments: tuple[object, ...]) -> None:
    """Audit hook: no process and no connection is started, not even by the superuser, whom RLIMIT_NPROC ignores."""
    if event.startswith(_REFUSED_EVENTS):
        raise PermissionError(f"{event} is not allowed here")


def run(code: str, tests: list[str]) -> tuple[str, str]:
    """Status (passed, failed or error) and reason of running ``code`` and then each assertion."""
    names: dict[str, object] = {"__name__": "answer"}
    place = "the code"
    try:
        exec(compile(code, "<answer>", "exec"), names)
        for test in tests:
            place = test
            try:
                exec(compile(test, "<test>", "exec"), names)
            except AssertionError:
                return "failed", f"false: {test}"
    except BaseException as error:  # whatever the code raises, SystemExit included, is the verdict
        return "error", f"{type(error).__name__} in {place}: {error}"
    return "passed", ""


def main() -> None:
    """Run one job."""
    job = json.load(sys.stdin)
    verdict = os.dup(1)
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # what the code prints goes nowhere, so that the verdict stands alone
        os.dup2(silence, descriptor)
    limit_resources(job["cpu_seconds"], job["memory_bytes"])
    sys.addaudithook(refuse)
    status, reason = run(job["code"], job["tests"])
    os.write(verdict, json.dumps([status, reason[:REASON_CHARACTERS]]).encode())
    os._exit(0)  # nothing that the code registered runs after the verdict


if __name__ == "__main__":
    main()
