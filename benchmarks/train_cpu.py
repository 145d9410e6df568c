"""Training on a CPU: the kit's fused path beside plain TRL + PEFT, in time, operations, kept activations and memory.

    python benchmarks/train_cpu.py [--quick] [--pieces] [--shipped] [--rounds N] [--json FILE]

A random Qwen2.5-like base of 0.1B parameters in NF4 with LoRA of rank 16 on all linear layers. Every contender is a
process of its own and gets the same token ids, batches and first adapter; the rounds go through all contenders in turn,
so that other work on the machine meets all of them, and the median of the rounds' ratios counts. On a busy machine the
ratio of CPU seconds with `--threads 1` tells more, since threads that wait for each other count as work. Losses are
compared step by step: a faster path that learns otherwise shows. TRL's cast of the adapter to bf16 is undone, since the
kit trains it in fp32; `--shipped` times TRL as it is, too. FLOPs are torch's count of a step (`FlopCounterMode`), kept
bytes are what autograd saves at the loss without checkpointing, peak is the process's growth while it trains.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.contenders.models import HALF, KIT, PLAIN, SHIPPED, Setting  # noqa: E402
from benchmarks.contenders.sft import contender, counted, described, forget_peak, peak_bytes, timed  # noqa: E402
from qlora_kit.fast import PIECES  # noqa: E402
from qlora_kit.four_bit import dequantize  # noqa: E402

SETTINGS = {
    "rows of 256 to 512 tokens, half supervised, checkpointing": Setting(),
    "the same without checkpointing": Setting(checkpointing=False),
    "rows of 512 tokens, all supervised, checkpointing": Setting(shortest=1.0, supervised=1.0),
    "packed to 1,024 tokens, rows of 64 to 1,024, checkpointing": Setting(packing=True, length=1024, shortest=0.0625),
}
ALONE = [*(piece for piece in PIECES if piece != "unpadding"), "segments + head + unpadding"]  # it needs those two
DEQUANTIZING = "dequantizing a weight beside one product with it"
MEDIANS = ("step_seconds", "cpu_seconds", "tokens_per_second", "peak_growth_bytes")


def child(name: str, setting: Setting, measure: str) -> dict[str, Any]:
    """One contender in this process: ``time``, or ``count`` for operations and bytes as well."""
    warnings.simplefilter("ignore", FutureWarning)
    with contender(name, setting, torch.device("cpu")) as trainer:
        before = forget_peak()
        figures = {**timed(trainer, setting), "peak_growth_bytes": peak_bytes() - before}
        trainer.model.zero_grad()
        # Last, or memory that counting took and freed would be there already when training grows into it.
        return figures | (counted(trainer, name, setting) if measure == "count" else {})


def in_process(name: str, setting: Setting, measure: str) -> dict[str, Any]:
    """``child`` in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, measure, json.dumps(asdict(setting))]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def compare(setting: Setting, names: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """All contenders in one setting; ratios are to plain TRL + PEFT, the first of ``names``."""
    times: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else tuple(reversed(names)):
            times[name].append(in_process(name, setting, "time" if number else "count"))
    figures: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        ratios = {
            key: [mine[key] / plain[key] for mine, plain in zip(times[name], times[PLAIN], strict=True)]
            for key in ("step_seconds", "cpu_seconds")
        }
        mine, plain = times[name][0], times[PLAIN][0]
        figures[name] |= {
            **{key: statistics.median(found[key] for found in times[name]) for key in MEDIANS},
            "time_ratio": statistics.median(ratios["step_seconds"]),
            "cpu_ratio": statistics.median(ratios["cpu_seconds"]),
            "ratios": {key: [round(ratio, 4) for ratio in values] for key, values in ratios.items()},
            "flops": mine["flops"],
            "flops_ratio": mine["flops"] / plain["flops"],
            "losses": mine["losses"],
            "largest_loss_difference": max(
                abs(mine - theirs) for mine, theirs in zip(mine["losses"], plain["losses"], strict=True)
            ),
        }
        if not setting.checkpointing:
            figures[name] |= {
                "saved_bytes": mine["saved_bytes"],
                "saved_ratio": mine["saved_bytes"] / plain["saved_bytes"],
            }
    return {"setting": described(setting), "rounds": rounds, "figures": figures}


def dequantizing() -> dict[str, float]:
    """Milliseconds of dequantizing a weight of 4,096 x 768, and of one product with 1,024 rows; medians of 50."""
    from bitsandbytes.functional import quantize_4bit

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        codes, state = quantize_4bit(torch.randn(4096, 768, dtype=dtype), quant_type="nf4", compress_statistics=True)
        rows, weight = torch.randn(1024, 768, dtype=dtype), dequantize(codes, state).t()
        found[f"{name}_dequantize_ms"] = _median_ms(partial(dequantize, codes, state))
        found[f"{name}_product_ms"] = _median_ms(partial(torch.matmul, rows, weight))
    return found


def _median_ms(call: Callable[[], Any]) -> float:
    times = []
    for _ in range(51):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:]) * 1000


def show(title: str, result: dict[str, Any]) -> None:
    """A short table."""
    table = Table(title=title, title_justify="left")
    for column in ("", "s/step", "time", "CPU time", "FLOPs", "kept", "peak MB", "loss differs by"):
        table.add_column(column, justify="left" if not column else "right")
    for name, found in result["figures"].items():
        kept = f"{found['saved_ratio']:.3f}" if "saved_ratio" in found else "-"
        table.add_row(
            name,
            f"{found['step_seconds']:.3f}",
            f"{found['time_ratio']:.3f}",
            f"{found['cpu_ratio']:.3f}",
            f"{found['flops_ratio']:.3f}",
            kept,
            f"{found['peak_growth_bytes'] / 1e6:,.0f}",
            f"{found['largest_loss_difference']:.1e}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, one round: shows that it runs, no figures")
    parser.add_argument("--pieces", action="store_true", help="each piece of the fused path by itself, in two settings")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--shipped", action="store_true", help="also TRL with the adapter in bf16, as it ships")
    parser.add_argument("--steps", type=int, help="optimizer steps of each process; the first is not timed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each contender; default: all cores")
    parser.add_argument("--only", default="", help="only the settings whose title holds this text")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        name, measure, setting = arguments.child
        print(json.dumps(child(name, Setting(**json.loads(setting)), measure)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    rounds = 1 if arguments.quick else arguments.rounds
    results = {}
    for title, setting in list(SETTINGS.items())[: 2 if arguments.quick else None]:
        with_pieces = setting.supervised < 1 and not setting.packing
        if arguments.only not in title or (arguments.pieces and not with_pieces):
            continue
        if arguments.quick:
            setting = replace(setting, shape="tiny", length=setting.length // 4, steps=3)
        elif arguments.steps:
            setting = replace(setting, steps=arguments.steps)
        names: tuple[str, ...] = (PLAIN, KIT, SHIPPED) if arguments.shipped else (PLAIN, KIT)
        if arguments.pieces:
            names += tuple(f"{KIT}: {pieces}" for pieces in ALONE)
            names += (HALF,) if setting.checkpointing else ()
        results[title] = compare(setting, names, rounds)
        show(title, results[title])
    if arguments.pieces:
        results[DEQUANTIZING] = dequantizing()
        print(", ".join(f"{key} {value:.3f}" for key, value in results[DEQUANTIZING].items()))
    machine = {
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({**machine, "results": results}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
