"""The engine: one base in memory, many adapters beside it, requests that share batches whatever adapter they name."""

from qlora_kit.engine.engine import Engine
from qlora_kit.engine.requests import Answer, Delta, Handle, Request
from qlora_kit.engine.stats import EngineStats

__all__ = ["Answer", "Delta", "Engine", "EngineStats", "Handle", "Request"]
