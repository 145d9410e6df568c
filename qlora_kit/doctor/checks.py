"""What one check of `doctor` found, and what all of them say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

ENVIRONMENT = 2
DEVIATION = 3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        ok: False where something is wrong; None where it does not apply here or was not measured.
        detail: What was found.
        fix: What to do where ``ok`` is False.
        exit_code: What the command ends with because of it: ``ENVIRONMENT`` where the kit cannot work like this,
            ``DEVIATION`` where it would compute something wrong, 0 for a warning.
    """

    name: str
    ok: bool | None
    detail: str
    fix: str | None = None
    exit_code: int = 0

    @property
    def mark(self) -> str:
        """``ok``, ``warning``, ``FAILED`` or ``-``."""
        if self.ok is None:
            return "-"
        if self.ok:
            return "ok"
        return "FAILED" if self.exit_code else "warning"


@dataclass(frozen=True)
class Diagnosis:
    """Every check, in the order in which they are shown.

    Attributes:
        checks: The checks.
        training: What ``--train`` measured on each device, ready for JSON; empty without it.
    """

    checks: tuple[Check, ...]
    training: tuple[dict[str, Any], ...] = ()

    @property
    def exit_code(self) -> int:
        """0, or ``ENVIRONMENT``, or ``DEVIATION``; what must be repaired first comes first."""
        return min((check.exit_code for check in self.checks if check.mark == "FAILED"), default=0)

    @property
    def summary(self) -> str:
        """One sentence."""
        problems = self._named("FAILED")
        warnings = self._named("warning")
        text = f"{_count(problems, 'problem')}: {', '.join(problems)}" if problems else "everything needed is here"
        return f"{text}; {_count(warnings, 'warning')}: {', '.join(warnings)}" if warnings else text

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "training": list(self.training),
            "summary": self.summary,
        }

    def _named(self, mark: str) -> list[str]:
        return [check.name for check in self.checks if check.mark == mark]


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"
