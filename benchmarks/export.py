"""What each GGUF format costs and loses: size and fidelity on `tiny` with adapters, time and memory on a large base.

    python benchmarks/export.py [--quick] [--shape 1.5b|7b] [--work DIR] [--json FILE]

Fidelity: two shipped adapters are merged, each merge is written in each format, and the logits of fixed conversations
are compared with transformers' in fp32: of transformers with the file's weights (what the format loses), and of
llama.cpp on the file, where llama-cpp-python is installed. K-quants are made where llama.cpp's quantizer is on the
machine. Means over the adapters; of agreeing answer tokens, the adapter with the fewest.

Cost: a base of random weights (that of `benchmarks/merge.py`) is written in each format by a process of its own. Peak
memory is the process's largest resident size (``ru_maxrss``). Work by others on the machine counts in the seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("question_answering", "sentiment")
QUICK_FORMATS = ("f16", "q8_0", "q4_0")
COST_FORMATS = ("bf16", "q8_0")


def formats_here(*, quick: bool) -> tuple[str, ...]:
    """The formats that can be written on this machine."""
    from qlora_kit.errors import ConfigError
    from qlora_kit.export.gguf_kquants import find_quantizer
    from qlora_kit.export.gguf_quants import QUANTS

    if quick:
        return QUICK_FORMATS
    try:
        find_quantizer(QUANTS["q4_k_m"])
    except ConfigError:
        return tuple(name for name, quant in QUANTS.items() if quant.quantizer is None)
    return tuple(QUANTS)


def measure_format(merged: Path, out: Path, quant: str, prompt: str | None) -> dict[str, Any]:
    """Write one merge in one format and measure it."""
    from qlora_kit.export.gguf_check import check_gguf, format_loss, is_binding_installed
    from qlora_kit.export.gguf_model import write_gguf

    file = write_gguf(merged, out, quant=quant)
    figures: dict[str, Any] = {"bytes": file.bytes, "bits_per_weight": file.bits_per_weight}
    if not is_binding_installed():
        return {**figures, "weights": vars(format_loss(file, merged, system_prompt=prompt))}
    check = check_gguf(file, merged, system_prompt=prompt)
    return {
        **figures,
        "weights": vars(check.weights),
        "llama_cpp": vars(check.logits),
        "answer_agreement": check.answer_agreement,
        "passed": check.passed,
    }


def measure_fidelity(work: Path, *, quick: bool) -> dict[str, Any]:
    """Each format on the merges of the shipped adapters."""
    from qlora_kit.adapters import AdapterContract
    from qlora_kit.merging import merge_adapter

    found: dict[str, list[dict[str, Any]]] = {}
    tasks = TASKS[1:] if quick else TASKS
    for task in tasks:
        adapter = ROOT / "adapters" / task
        merge_adapter(adapter, work / task, onto="dequantized", verify=False)
        prompt = AdapterContract.load(adapter).system_prompt
        for quant in formats_here(quick=quick):
            found.setdefault(quant, []).append(
                measure_format(work / task, work / f"{task}-{quant}.gguf", quant, prompt)
            )
    return {"adapters": list(tasks), "formats": {quant: summary(rows) for quant, rows in found.items()}}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One format over all merges."""
    first = rows[0]
    result = {"bytes": first["bytes"], "bits_per_weight": round(first["bits_per_weight"], 3)}
    for side in ("weights", "llama_cpp"):
        if side in first:
            result[side] = {
                "kl": statistics.fmean(row[side]["kl"] for row in rows),
                "top1_agreement": statistics.fmean(row[side]["top1_agreement"] for row in rows),
                "max_abs": max(row[side]["max_abs"] for row in rows),
            }
    if "answer_agreement" in first:
        result["answer_agreement"] = min(row["answer_agreement"] for row in rows)
        result["passed"] = all(row["passed"] for row in rows)
    return result


def measure_cost(work: Path, shape: str) -> dict[str, Any]:
    """Time and memory of writing a base of that shape, each format in a process of its own."""
    run_apart(["--step", "prepare", "--shape", shape, "--work", str(work)])
    weights = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    costs: dict[str, Any] = {}
    for quant in COST_FORMATS:
        output = run_apart(["--step", quant, "--shape", shape, "--work", str(work)])
        costs[quant] = json.loads(output.strip().splitlines()[-1])
        (work / "base.gguf").unlink()
    shutil.rmtree(work / "base")
    return {"shape": shape, "weight_bytes": weights, "processors": os.cpu_count(), "formats": costs}


def run_apart(arguments: list[str]) -> str:
    """Run this file in a process of its own and return what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout


def run_step(step: str, work: Path, shape: str) -> None:
    """The part of ``measure_cost`` that runs apart."""
    if step == "prepare":
        from benchmarks.merge import write_base

        write_base(work / "base", shape)
        return
    from qlora_kit.export.gguf_model import write_gguf

    began = time.perf_counter()
    file = write_gguf(work / "base", work / "base.gguf", quant=step)
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"seconds": round(seconds, 1), "bytes": file.bytes, "peak_rss_bytes": peak}))


def show(result: dict[str, Any]) -> None:
    """Print the figures as tables."""
    console = Console()
    table = Table(title=f"fidelity on {', '.join(result['fidelity']['adapters'])}")
    for column in ("format", "MiB", "bits", "KL", "top-1", "llama.cpp KL", "answers"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for quant, row in result["fidelity"]["formats"].items():
        ours, theirs = row["weights"], row.get("llama_cpp")
        agreeing = "-" if theirs is None else f"{row['answer_agreement']:.1%}"
        table.add_row(
            quant,
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['bits_per_weight']:.2f}",
            f"{ours['kl']:.2g}",
            f"{ours['top1_agreement']:.1%}",
            "-" if theirs is None else f"{theirs['kl']:.2g}",
            agreeing,
        )
    console.print(table)
    cost = result["cost"]
    table = Table(title=f"shape {cost['shape']}, {cost['weight_bytes'] / 2**30:.2f} GiB in bf16")
    for column in ("format", "GiB", "seconds", "peak RSS (GB)"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for quant, row in cost["formats"].items():
        table.add_row(
            quant, f"{row['bytes'] / 2**30:.2f}", f"{row['seconds']:.1f}", f"{row['peak_rss_bytes'] / 1e9:.2f}"
        )
    console.print(table)


def binding_version() -> str | None:
    """Of llama-cpp-python, as far as it is known: a library of one's own has none."""
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one adapter, three formats, a small shape")
    parser.add_argument("--shape", choices=("1.5b", "7b", "quick"), default="1.5b")
    parser.add_argument("--work", type=Path, help="where to write, several times the weights' size")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = "quick" if arguments.quick else arguments.shape
    if arguments.step is not None:
        run_step(arguments.step, arguments.work, arguments.shape)
        return
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        work = Path(folder)
        fidelity = measure_fidelity(work, quick=arguments.quick)
        cost = measure_cost(work, shape)
    result = {"fidelity": fidelity, "cost": cost, "gguf": version("gguf"), "llama_cpp_python": binding_version()}
    show(result)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
