"""What an export reports: the JSON of the command line and of ``export_report.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPORT_FILE = "export_report.json"


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export: its path in the output folder, and its size."""

    path: str
    bytes: int


@dataclass(frozen=True)
class Produced:
    """What writing one format brought, beside its files.

    Attributes:
        verification: What was measured on the written files; None where nothing was.
        remarks: What a user should know before using the files.
        details: More for the report, by key.
        quant: How weights are quantized, where that is not the format's default when nobody asked.
    """

    verification: Mapping[str, Any] | None
    remarks: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    quant: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        output_dir: The folder that was written.
        target: The format.
        quant: How its weights are quantized; None where the format has no choice.
        sources: What was exported, by name.
        files: Every file, with its size.
        verification: What was measured on the written files; None where nothing was.
        remarks: What a user should know before using the files.
        details: More facts of the format, by key.
        seconds: Wall time of all of it.
    """

    output_dir: Path
    target: str
    quant: str | None
    sources: tuple[str, ...]
    files: tuple[ExportedFile, ...]
    verification: Mapping[str, Any] | None
    remarks: tuple[str, ...]
    details: Mapping[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command."""
        return {
            "output_dir": str(self.output_dir),
            "target": self.target,
            "quant": self.quant,
            "sources": list(self.sources),
            "files": [{"path": file.path, "bytes": file.bytes} for file in self.files],
            "verification": None if self.verification is None else dict(self.verification),
            "remarks": list(self.remarks),
            **self.details,
            "seconds": self.seconds,
        }


def files_in(folder: Path) -> tuple[ExportedFile, ...]:
    """Every file under ``folder`` by its relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(ExportedFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in paths)
