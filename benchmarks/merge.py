"""What a merge costs in time and memory: ours onto both kinds of weights, PEFT's, and a plain copy of the files.

    python benchmarks/merge.py [--quick] [--shape 1.5b|7b] [--verified] [--work DIR] [--json FILE]

A base with random weights and an adapter of all linear layers are written, then every contender runs as a process of
its own, nothing verified: ``qlora_kit`` onto original and onto dequantized weights; PEFT's load on 16-bit weights,
``merge_and_unload`` and ``save_pretrained``, synced; and a copy of the weight files, synced. ``--verified`` adds the
kit's merge onto dequantized weights with its verification, which computes logits of four models layer by layer. The
rounds go through all contenders in turn, so that other work on the machine meets all of them; compare by ratio. Peak
memory is the process's largest resident size (``ru_maxrss``: mapped files count), and beside it the largest anonymous
part of it, sampled.
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
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.02
RANK = 16
VOCABULARIES = {"quick": 2048, "1.5b": 151_936, "7b": 152_064}
SHAPES: dict[str, dict[str, Any]] = {
    "quick": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
}
CONTENDERS = ("copy", "original", "dequantized", "peft")
VERIFIED = "verified"
PREPARE = "prepare"  # its own process too: the largest size of a process includes that of the one that started it


@dataclass(frozen=True)
class Cost:
    """What one run took: wall seconds, the peak of its resident memory, and of the anonymous part of it."""

    seconds: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int


def write_base(folder: Path, shape: str) -> None:
    """A Qwen2 base of random bf16 weights, written tensor by tensor, with the tokenizer of the embedded base."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from qlora_kit.base_files import resolve_base
    from qlora_kit.checkpoint import ShardWriter, TensorSpec

    config = Qwen2Config(vocab_size=VOCABULARIES[shape], dtype="bfloat16", **SHAPES[shape])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set() if not config.tie_word_embeddings else {"lm_head.weight"}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name not in tied}
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, {name: TensorSpec("BF16", size) for name, size in shapes.items()}) as writer:
        for name, size in shapes.items():
            for rows in torch.empty(size).split(4096):
                values = torch.empty(rows.shape, dtype=torch.bfloat16)
                writer.write_rows(name, values.normal_(std=0.02, generator=generator))
    config.save_pretrained(folder)
    for path in resolve_base("tiny").path.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "README.md"):
            shutil.copy(path, folder)


def write_adapter(folder: Path, base: Path) -> None:
    """An adapter of all linear layers as PEFT saves it, no factor zero."""
    import torch
    from safetensors.torch import save_file

    from qlora_kit.base_files import BaseRef
    from qlora_kit.base_layout import read_layout

    layout = read_layout(BaseRef("base", base), four_bit=False)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    modules = [module for module in layout.linear_shapes if module != "lm_head"]
    for module in modules:
        rows, columns = layout.linear_shapes[module]
        for letter, size in (("A", (RANK, columns)), ("B", (rows, RANK))):
            tensors[f"base_model.model.{module}.lora_{letter}.weight"] = torch.randn(size, generator=generator) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "base_model_name_or_path": str(base),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")


def sync(folder: Path) -> None:
    """Wait until every file of ``folder`` is on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def run_ours(onto: Any, *, verify: bool = False) -> Callable[[Path, Path, Path], None]:
    """A merge by the kit."""

    def run(base: Path, adapter: Path, out: Path) -> None:
        from qlora_kit.merging import merge_adapter

        merge_adapter(adapter, out, base=str(base), onto=onto, verify=verify)

    return run


def run_peft(base: Path, adapter: Path, out: Path) -> None:
    """PEFT's merge on the 16-bit base."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    sync(out)


def run_copy(base: Path, adapter: Path, out: Path) -> None:
    """A copy of the base's weight files."""
    out.mkdir()
    for path in base.glob("*.safetensors"):
        with path.open("rb") as source, (out / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 24)
    sync(out)


RUNS = {
    "copy": run_copy,
    "original": run_ours("original"),
    "dequantized": run_ours("dequantized"),
    "peft": run_peft,
    VERIFIED: run_ours("dequantized", verify=True),
}


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    for line in status.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def measure_here(contender: str, base: Path, adapter: Path, out: Path, began: float) -> Cost:
    """Run one contender in this process; ``began`` is when the process was started (``time.time``)."""
    peak, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    RUNS[contender](base, adapter, out)
    seconds = time.time() - began
    done.set()
    thread.join()
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, peak[0])


def run_apart(contender: str, work: Path, shape: str) -> str:
    """Run one contender in a process of its own and return what it printed; its time counts imports."""
    command = [sys.executable, __file__, "--contender", contender, "--shape", shape, "--work", str(work)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command.append(str(time.time()))
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, text=True).stdout


def measure(contender: str, work: Path, shape: str) -> Cost:
    """What one contender took; its output is deleted."""
    output = run_apart(contender, work, shape)
    shutil.rmtree(work / "out")
    return Cost(**json.loads(output.strip().splitlines()[-1]))


def compare(work: Path, shape: str, rounds: int, contenders: tuple[str, ...]) -> dict[str, Any]:
    """Write base and adapter, run every contender ``rounds`` times in turn, and take medians (of memory, the most)."""
    run_apart(PREPARE, work, shape)
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name in contenders:
            costs[name].append(measure(name, work, shape))
    figures = {
        name: {
            "seconds": round(statistics.median(cost.seconds for cost in found), 2),
            "peak_rss_bytes": max(cost.peak_rss_bytes for cost in found),
            "peak_anonymous_bytes": max(cost.peak_anonymous_bytes for cost in found),
        }
        for name, found in costs.items()
    }
    ratios = {
        f"{name} / {other}": round(figures[name]["seconds"] / figures[other]["seconds"], 2)
        for name in ("original", "dequantized")
        for other in ("peft", "copy")
        if other in figures
    }
    weight_bytes = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    return {
        "shape": shape,
        "weight_bytes": weight_bytes,
        "rank": RANK,
        "rounds": rounds,
        "processors": os.cpu_count(),
        "contenders": figures,
        "ratios": ratios,
    }


def show(result: dict[str, Any]) -> None:
    """Print the figures as a table."""
    table = Table(title=f"shape {result['shape']}, {result['weight_bytes'] / 2**30:.2f} GiB, {result['rounds']} rounds")
    for column in ("contender", "seconds", "peak RSS (GB)", "anonymous (GB)"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for name, figure in result["contenders"].items():
        peaks = (figure["peak_rss_bytes"] / 1e9, figure["peak_anonymous_bytes"] / 1e9)
        table.add_row(name, f"{figure['seconds']:.1f}", *(f"{peak:.2f}" for peak in peaks))
    Console().print(table)
    Console().print(", ".join(f"{name}: {ratio}" for name, ratio in result["ratios"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small shape, one round")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="1.5b", help="7b without PEFT, which needs 15 GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--verified", action="store_true", help="measure a verified merge too")
    parser.add_argument("--work", type=Path, help="where to write, several times the weights' size")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--contender", choices=(*RUNS, PREPARE), help=argparse.SUPPRESS)
    parser.add_argument("began", nargs="?", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender is not None:
        work = arguments.work
        if arguments.contender == PREPARE:
            write_base(work / "base", arguments.shape)
            write_adapter(work / "adapter", work / "base")
            return
        cost = measure_here(arguments.contender, work / "base", work / "adapter", work / "out", arguments.began)
        print(json.dumps(asdict(cost)))
        return
    shape = "quick" if arguments.quick else arguments.shape
    contenders = CONTENDERS[:-1] if shape == "7b" else CONTENDERS
    if arguments.verified:
        contenders = (*contenders, VERIFIED)
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        result = compare(Path(folder), shape, 1 if arguments.quick else arguments.rounds, contenders)
    show(result)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
