"""Training at the shape of Qwen2.5-7B on one GPU: the kit, plain TRL + PEFT, the same with liger-kernel, and Unsloth.

    python benchmarks/train_gpu.py [--quick] [--cap-gb 24] [--unsloth-python FILE] [--json FILE]

The weights are random and made on the device, in NF4, with LoRA of rank 16 on all linear layers; nothing is downloaded.
Every contender and length is a process of its own, with the same weights, first adapter and token ids; Unsloth reads
them from files that are written before. Its versions of TRL and the kit's exclude each other, so that it is best
installed for a Python of its own, `--unsloth-python`. What is not installed is named. The ceiling is the card's data
sheet: operations of a step at its rate for 16-bit products, and passes over the weights at its bandwidth
(`qlora_kit/memory/speed.py`). `--cap-gb` makes the process fail beyond that much memory, as a smaller card would.
Without a GPU, and with `--quick`, the same code runs at a tiny shape, which shows that it works and measures nothing.
Not measured on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.contenders.models import KIT, LIGER, PLAIN, RANK, SHAPES, UNSLOTH, Setting, missing  # noqa: E402
from benchmarks.contenders.sft import checkpoint, contender, timed  # noqa: E402
from benchmarks.memory_gpu import COMMON  # noqa: E402
from qlora_kit.architecture import read_architecture  # noqa: E402
from qlora_kit.config import LoraSection  # noqa: E402
from qlora_kit.memory.cards import known_card  # noqa: E402
from qlora_kit.memory.speed import tokens_per_second  # noqa: E402
from qlora_kit.memory.workload import Workload, lora_pairs  # noqa: E402

CONTENDERS = (PLAIN, LIGER, UNSLOTH, KIT)
LENGTH_STEP = 512
LONGEST = 131_072
LIMIT_SECONDS = 600
CHILD = Path(__file__).resolve()
UNSLOTH_CHILD = CHILD.parent / "contenders" / "unsloth_child.py"


def settings(*, on_gpu: bool, quick: bool) -> list[Setting]:
    """4,096 tokens a batch or one row of 8,192, half of each row supervised; with and without checkpointing."""
    shape, dtype = ("7B", "bfloat16") if on_gpu and not quick else ("tiny", "bfloat16" if on_gpu else "float32")
    lengths = (512, 2048, 8192) if shape == "7B" else (16, 32)
    return [
        Setting(
            shape=shape,
            rows=max(1, lengths[-1] // length // 2),
            length=length,
            steps=6 if shape == "7B" else 2,
            shortest=1.0,
            checkpointing=checkpointing,
            dtype=dtype,
        )
        for length in lengths
        for checkpointing in (True, False)
    ]


def ceiling(setting: Setting) -> float | None:
    """Tokens a second at the card's full speed; None where the card is not known."""
    card = known_card(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if card is None:
        return None
    architecture = read_architecture({**COMMON, **SHAPES[setting.shape]}, where=setting.shape)
    workload = Workload(
        architecture=architecture,
        layers=lora_pairs(architecture, LoraSection(r=RANK)),
        batch_size=setting.rows,
        length=setting.length,
        checkpointing=setting.checkpointing,
        compute_bytes=2,
        device="cuda",
    )
    return tokens_per_second(workload, card)


def measured(name: str, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Tokens a second, the peak that torch allocated and reserved, and the losses; what ran out of memory says so."""
    try:
        with contender(name, setting, device) as trainer:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            found = timed(trainer, setting)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    if device.type == "cuda":
        found["allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    limit = ceiling(setting)
    found["share_of_ceiling"] = None if limit is None else found["tokens_per_second"] / limit
    return found


def longest_row(name: str, setting: Setting, device: torch.device) -> dict[str, Any]:
    """The longest row, of at most ``setting.length``, that a step with checkpointing has room for, to ``LENGTH_STEP``.

    The step is a forward and backward pass; the optimizer's state is small beside it.
    """
    most = setting.length
    with contender(name, setting, device) as trainer:
        checkpoint(trainer, name)
        trainer.model.train()

        def fits(steps: int) -> bool:
            length = steps * LENGTH_STEP
            ids = torch.ones((1, length), dtype=torch.long, device=device)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
            try:
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(length))
                loss.backward()
            except torch.OutOfMemoryError:
                return False
            finally:
                trainer.model.zero_grad()
            return True

        return {"longest_tokens": longest(fits, most=most // LENGTH_STEP) * LENGTH_STEP, "most_tried": most}


def longest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number up to ``most`` that fits, found by halving; 0 for none. What fits, fits smaller too."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def child(name: str, setting: Setting, *, longest_only: bool, cap_gb: float) -> dict[str, Any]:
    """One contender in this process."""
    warnings.simplefilter("ignore", FutureWarning)
    reason = missing(name)
    if reason is not None:
        return {"not_run": reason}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cap_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / total))
    return (longest_row if longest_only else measured)(name, setting, device)


@dataclass(frozen=True)
class Processes:
    """How contenders are run.

    Attributes:
        cap_gb: Device memory that each may use, in GB; 0 for all.
        unsloth_python: The Python that Unsloth is installed for.
    """

    cap_gb: float
    unsloth_python: str

    def run(self, name: str, setting: Setting, *, longest_only: bool = False) -> dict[str, Any]:
        """``child`` in a process of its own, with no network; what went wrong in it is part of what is found."""
        options = ["--child", name, json.dumps(asdict(setting)), str(int(longest_only)), str(self.cap_gb)]
        unsloth = name == UNSLOTH
        command = [self.unsloth_python, str(UNSLOTH_CHILD)] if unsloth else [sys.executable, str(CHILD)]
        with tempfile.TemporaryDirectory() as folder:  # Unsloth writes what it compiles where it is run
            try:
                process = subprocess.run(
                    [*command, *options],
                    capture_output=True,
                    text=True,
                    cwd=folder,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"},
                    timeout=LIMIT_SECONDS,
                )
            except subprocess.TimeoutExpired:
                return {"not_run": f"not done in {LIMIT_SECONDS} s"}
        if process.returncode:
            lines = process.stderr.strip().splitlines()
            return {"not_run": lines[-1] if lines else f"it ended with {process.returncode}", "failed": True}
        found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        return found


def show(rows: list[dict[str, Any]], where: str) -> None:
    """A short table; what was not run is told below it."""
    table = Table(title=f"training, {where}", title_justify="left")
    for column in ("", "shape", "recomputes", "tokens/s", "to plain", "ceiling", "GB", "reserved", "loss"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    plain: dict[str, Any] = {}
    for row in rows:
        setting = row["setting"]
        if row["contender"] == PLAIN:
            plain = row
        if "not_run" not in row:
            shape = f"{setting['rows']} x {setting['length']:,}"
            table.add_row(row["contender"], shape, "yes" if setting["checkpointing"] else "no", *_cells(row, plain))
    Console(width=100).print(table)
    reasons = {(row["contender"], row["not_run"]) for row in rows if "not_run" in row}
    for name, reason in sorted(reasons):
        print(f"{name}: not run: {reason}")


def _cells(row: dict[str, Any], plain: dict[str, Any]) -> tuple[str, ...]:
    if "tokens_per_second" not in row:
        return ("no room", *("-" for _ in range(5)))

    def told(key: str, form: str, scale: float = 1.0) -> str:
        return "-" if row.get(key) is None else format(row[key] / scale, form)

    speed = plain.get("tokens_per_second")
    return (
        told("tokens_per_second", ",.0f"),
        "-" if speed is None else f"{row['tokens_per_second'] / speed:.2f}",
        told("share_of_ceiling", ".0%"),
        told("allocated_bytes", ".2f", 1e9),
        told("reserved_bytes", ".2f", 1e9),
        f"{row['losses'][-1]:.4f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape: shows that it runs, no figures")
    parser.add_argument("--cap-gb", type=float, default=0.0, help="fail beyond so many GB of device memory")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--unsloth-python", default=sys.executable, help="of the Python that has Unsloth")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        name, setting, longest_only, cap = arguments.child
        found = child(name, Setting(**json.loads(setting)), longest_only=longest_only == "1", cap_gb=float(cap))
        print(json.dumps(found))
        return
    if shutil.which(arguments.unsloth_python) is None:
        parser.error(f"--unsloth-python: {arguments.unsloth_python} is no program")
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else "a dry run on a CPU: no figures"
    chosen = settings(on_gpu=on_gpu, quick=arguments.quick)
    processes = Processes(cap_gb=arguments.cap_gb, unsloth_python=arguments.unsloth_python)
    rows: list[dict[str, Any]] = []
    left: dict[str, dict[str, Any]] = {}  # contenders that cannot run here, which is found out once
    for setting in chosen:
        for name in CONTENDERS:
            found = left.get(name) or processes.run(name, setting)
            if "not_run" in found and "failed" not in found:
                left[name] = found
            rows.append({"contender": name, "setting": asdict(setting)} | found)
    show(rows, where)
    most = 2 * LENGTH_STEP if chosen[0].shape == "tiny" else LONGEST
    long = replace(chosen[0], rows=1, length=most, steps=1)
    lengths = {name: left.get(name) or processes.run(name, long, longest_only=True) for name in CONTENDERS}
    for name, found in lengths.items():
        if "longest_tokens" in found:
            print(f"{name}: rows of {found['longest_tokens']:,} tokens fit, of at most {most:,} that were tried")
        elif name not in left:
            print(f"{name}: longest row: {found['not_run']}")
    if arguments.json is not None:
        content = {"device": where, "torch": torch.__version__, "cap_gb": arguments.cap_gb, "results": rows}
        arguments.json.write_text(json.dumps(content | {"longest": lengths}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
