"""The process that ``code_execution`` starts: read a job from stdin, limit itself, run it, write the verdict to stdout.

It imports the standard library only, and is run as a file by an isolated interpreter.
"""

from __future__ import annotations

import json
import os
import posix
import resource
import sys

REASON_CHARACTERS = 500
_REFUSED_EVENTS = (  # beginnings of the names of audit events (https://docs.python.org/3/library/audit_events.html)
    *("os.fork", "os.exec", "os.posix_spawn", "os.system", "os.kill", "subprocess.", "socket.", "ctypes.", "syslog."),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink", "shutil.", "tempfile."),
    *("os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr"),
    *("resource.setrlimit", "resource.prlimit", "sqlite3."),
)
_REFUSED_IMPORTS = ("_dbm", "_gdbm", "readline")  # they create files without an audit event
_UNAUDITED = ("mkfifo", "mknod", "chroot")
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


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
    """Audit hook: no process, no connection, and no file created, changed, moved or deleted, whoever the user is."""
    if event == "open":
        _, mode, flags = arguments
        refused = (isinstance(flags, int) and flags & _WRITE_FLAGS) or (
            isinstance(mode, str) and set(mode) & set("wax+")
        )
    elif event == "import":
        refused = arguments[0] in _REFUSED_IMPORTS
    else:
        refused = event.startswith(_REFUSED_EVENTS)
    if refused:
        what = "writing a file" if event == "open" else event
        raise PermissionError(f"{what} is not allowed here")


def restrict() -> None:
    """Refuse from here on what ``refuse`` names, and take away what raises no audit event."""
    for module in (os, posix):
        for name in _UNAUDITED:
            vars(module).pop(name, None)
    sys.addaudithook(refuse)


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
    restrict()
    status, reason = run(job["code"], job["tests"])
    os.write(verdict, json.dumps([status, reason[:REASON_CHARACTERS]]).encode())
    os._exit(0)  # nothing that the code registered runs after the verdict


if __name__ == "__main__":
    main()
