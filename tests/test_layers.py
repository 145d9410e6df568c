"""Imports run downward through the layers, none in a circle, and the light layers stay free of the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "qlora_kit"
# A module or a package of the kit -> its layer. A module may import from its own layer and from those below it.
LAYERS = {
    name: layer
    for layer, names in enumerate(
        (
            "errors suggest host_memory regular_file strict_json atomic safetensors_header assertion_child units"
            " launched",
            "tasks conversation tool_calls turns formats format_detection metrics config adapters base_keys base_files"
            " architecture starter prequantized lora_modules memory",
            "shard_writer checkpoint data base_layout four_bit models stop_token token_rows adapter_loading"
            " measured_speed code_execution generation likelihood reference_answers scoring report"
            " lora_bank fast",
            "training engine merging adoption combining data_check export",
            "evaluation_plan evaluation doctor chat batch server",
            "cli __main__",
        )
    )
    for name in names.split()
}
LIGHT_LAYERS = 1
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "bitsandbytes", "accelerate"}


def imported_names(source: str) -> set[str]:
    """Every module that a source imports, wherever the statement stands; ``from a import b`` counts as ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def modules() -> dict[str, Path]:
    """The kit's modules by dotted name, without the package's own facade, which imports nothing by itself."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["qlora_kit"]
    return found


def kit_imports() -> dict[str, set[str]]:
    """Each module of the kit and the modules of the kit that it imports."""
    known = modules()
    graph = {}
    for name, path in known.items():
        imported = imported_names(path.read_text(encoding="utf-8"))
        inside = {entry for entry in imported if entry.startswith("qlora_kit.")}
        graph[name] = {entry if entry in known else entry.rpartition(".")[0] for entry in inside} - {"qlora_kit"}
    return graph


def layer_of(module: str) -> int:
    return LAYERS[module.split(".")[1]]


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[1] for name in modules()} == set(LAYERS)


def test_imports_run_downward() -> None:
    graph = kit_imports()
    upward = [
        f"{name} -> {other}" for name, used in graph.items() for other in used if layer_of(other) > layer_of(name)
    ]
    assert upward == []
    assert any(layer_of(other) < layer_of(name) for name, used in graph.items() for other in used)


def test_no_import_runs_in_a_circle() -> None:
    """Imports inside functions count too; a package's ``__init__``, which only collects, does not."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {name: used - packages for name, used in kit_imports().items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


def test_light_layers_import_no_heavy_library() -> None:
    found = [
        f"{name} -> {entry}"
        for name, path in modules().items()
        if layer_of(name) <= LIGHT_LAYERS
        for entry in imported_names(path.read_text(encoding="utf-8"))
        if entry.split(".")[0] in HEAVY
    ]
    assert found == []


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\nfrom c import d\ndef f():\n    from qlora_kit.models import load\n    import torch.nn as nn\n"
    assert imported_names(source) == {"a.b", "c.d", "qlora_kit.models.load", "torch.nn"}


@pytest.mark.parametrize("module", ["qlora_kit", "qlora_kit.cli.app", "qlora_kit.adapters", "qlora_kit.config"])
def test_importing_it_loads_no_heavy_library(module: str) -> None:
    program = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.split() == []
