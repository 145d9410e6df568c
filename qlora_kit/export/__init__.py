"""Exporting: an adapter, a merged model or a base in, another program's format out, verified."""

from qlora_kit.export.exporting import TARGETS, export_model
from qlora_kit.export.results import ExportedFile, ExportResult

__all__ = ["TARGETS", "ExportResult", "ExportedFile", "export_model"]
