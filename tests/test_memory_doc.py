"""docs/memory.md is what its command writes, for the models that it names."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Parameters as the safetensors indexes of Qwen/Qwen2.5-<size>-Instruct sum up to.
PARAMETERS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_memory_doc", ROOT / "scripts" / "build_memory_doc.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_document_is_what_the_command_writes(script: ModuleType) -> None:
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert text == script.document(), "run `make memory`"
    assert "**Predicted, not measured.**" in text
    assert (ROOT / "docs" / "memory.svg").read_text(encoding="utf-8").startswith("<?xml")


def test_the_models_have_their_published_sizes(script: ModuleType) -> None:
    assert {size: script.architecture_of(size).parameters() for size in script.QWEN2_5} == PARAMETERS
