"""QLoRA Kit: train task adapters on one consumer GPU, swap them, merge and export them, and measure each step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora_kit.adapters import AdapterStore
    from qlora_kit.config import load_config
    from qlora_kit.engine import Engine
    from qlora_kit.evaluation import evaluate
    from qlora_kit.export import export_model
    from qlora_kit.memory import estimate_memory
    from qlora_kit.merging import merge_adapter
    from qlora_kit.training import train

__all__ = [
    "AdapterStore",
    "Engine",
    "estimate_memory",
    "evaluate",
    "export_model",
    "load_config",
    "merge_adapter",
    "train",
]

# Public name -> module. Imported when first used, so that `import qlora_kit` does not load torch.
_HOMES = {
    "AdapterStore": "qlora_kit.adapters",
    "Engine": "qlora_kit.engine",
    "estimate_memory": "qlora_kit.memory",
    "evaluate": "qlora_kit.evaluation",
    "export_model": "qlora_kit.export",
    "load_config": "qlora_kit.config",
    "merge_adapter": "qlora_kit.merging",
    "train": "qlora_kit.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qlora_kit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
