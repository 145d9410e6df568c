"""The kit's exceptions: each carries a three-part message and the exit code that the command line ends with.

A message says what is wrong and where, what was expected, and what to do. One exception may carry several
faults, so that a user sees all faults of one input at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong, in three parts.

    Attributes:
        what: What is wrong and where (``datasets/sentiment/train.csv:17: the label is empty``).
        expected: What was expected there.
        fix: What the user can do now.
    """

    what: str
    expected: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  expected: {self.expected}\n  do: {self.fix}"


class QloraKitError(Exception):
    """Root of the tree. ``exit_code`` is what the process ends with; ``told``: another process prints the message."""

    exit_code = 2
    told = False

    def __init__(self, what: str, *, expected: str, fix: str) -> None:
        self.faults: tuple[Fault, ...] = (Fault(what, expected, fix),)
        super().__init__(str(self.faults[0]))

    @classmethod
    def of(cls, faults: list[Fault] | tuple[Fault, ...], *, at_most: int | None = None) -> QloraKitError:
        """One exception for all ``faults`` of one input (at least one).

        Args:
            faults: What is wrong.
            at_most: Of more faults than this, the first are told and the rest counted; None tells all.
        """
        first = faults[0]
        if at_most is not None and len(faults) > at_most:
            rest = Fault(f"... and {len(faults) - at_most} more faults of this input", "none", first.fix)
            faults = [*faults[:at_most], rest]
        error = cls(first.what, expected=first.expected, fix=first.fix)
        error.faults = tuple(faults)
        error.args = ("\n".join(str(fault) for fault in faults),)
        return error


class ConfigError(QloraKitError):
    """A key or value of the YAML or of an override is wrong."""


class DataError(QloraKitError):
    """A data file, or rows in it, cannot be used."""


class BaseModelError(QloraKitError):
    """The base model cannot be found, read or used."""


class AdapterError(QloraKitError):
    """An adapter is missing, malformed, or belongs to another base."""


class OutputError(QloraKitError):
    """The place to write to is occupied, not writable, or too small."""


class GuardError(QloraKitError):
    """A guard stopped the work: a non-finite loss, a verification that failed."""

    exit_code = 3


class Interrupted(QloraKitError):
    """The user or the system stopped the process (Ctrl-C, SIGTERM)."""

    exit_code = 130
