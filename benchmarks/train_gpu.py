"""Training at the shape of Qwen2.5-7B on one GPU: the kit beside plain TRL + PEFT. Not measured on a GPU yet.

    python benchmarks/train_gpu.py [--quick] [--cap-gb 24] [--json FILE]

The weights are random and made on the device, in NF4, with LoRA of rank 16 on all linear layers; nothing is read or
downloaded. Every contender and length is a process of its own. The ceiling is the card's data sheet: operations of a
step at its rate for 16-bit products, and passes over the weights at its bandwidth (`qlora_kit/memory/speed.py`).
`--cap-gb` makes the process fail beyond that much memory, as a smaller card would. Without a GPU, and with `--quick`,
the same code runs at a tiny shape, which shows that it works and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from benchmarks.contenders.sft import COMMON, KIT, PLAIN, RANK, SHAPES, Setting, contender, timed  # noqa: E402
from qlora_kit.architecture import read_architecture  # noqa: E402
from qlora_kit.config import LoraSection  # noqa: E402
from qlora_kit.memory.cards import known_card  # noqa: E402
from qlora_kit.memory.speed import tokens_per_second  # noqa: E402
from qlora_kit.memory.workload import Workload, lora_pairs  # noqa: E402

LENGTH_STEP = 512


def settings(*, on_gpu: bool, quick: bool) -> list[Setting]:
    """About 8,192 tokens a batch, rows of one length, half of each supervised; with and without checkpointing."""
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


def longest_row(name: str, setting: Setting, device: torch.device, *, most: int) -> dict[str, Any]:
    """The longest single row that a forward and backward pass with checkpointing has room for, to ``LENGTH_STEP``."""
    with contender(name, setting, device) as trainer:
        trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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


def child(name: str, setting: Setting, *, longest_up_to: int, cap_gb: float) -> dict[str, Any]:
    """One contender in this process."""
    warnings.simplefilter("ignore", FutureWarning)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if cap_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gb * 1e9 / total))
    if longest_up_to:
        return longest_row(name, setting, device, most=longest_up_to)
    return measured(name, setting, device)


def in_process(name: str, setting: Setting, *, longest_up_to: int, cap_gb: float) -> dict[str, Any]:
    """``child`` in a process of its own."""
    options = [json.dumps(asdict(setting)), str(longest_up_to), str(cap_gb)]
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, *options]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return found


def show(rows: list[dict[str, Any]], where: str) -> None:
    """A short table."""
    table = Table(title=f"training, {where}", title_justify="left")
    for column in ("", "rows x tokens", "checkpointing", "tokens/s", "of ceiling", "allocated GB", "last loss"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        share, allocated = row.get("share_of_ceiling"), row.get("allocated_bytes")
        figures = (
            ("out of memory", "-", "-", "-")
            if "out_of_memory" in row
            else (
                f"{row['tokens_per_second']:,.0f}",
                "-" if share is None else f"{share:.0%}",
                "-" if allocated is None else f"{allocated / 1e9:.2f}",
                f"{row['losses'][-1]:.4f}",
            )
        )
        setting = row["setting"]
        checkpointing = "yes" if setting["checkpointing"] else "no"
        table.add_row(row["contender"], f"{setting['rows']} x {setting['length']:,}", checkpointing, *figures)
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape: shows that it runs, no figures")
    parser.add_argument("--cap-gb", type=float, default=0.0, help="fail beyond so many GB of device memory")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        name, setting, most, cap = arguments.child
        print(json.dumps(child(name, Setting(**json.loads(setting)), longest_up_to=int(most), cap_gb=float(cap))))
        return
    on_gpu = torch.cuda.is_available()
    where = torch.cuda.get_device_name() if on_gpu else "a dry run on a CPU: no figures"
    chosen = settings(on_gpu=on_gpu, quick=arguments.quick)
    rows = [
        {"contender": name, "setting": asdict(setting)}
        | in_process(name, setting, longest_up_to=0, cap_gb=arguments.cap_gb)
        for setting in chosen
        for name in (PLAIN, KIT)
    ]
    show(rows, where)
    most = 2 * LENGTH_STEP if chosen[0].shape == "tiny" else 131_072
    lengths = {name: in_process(name, chosen[0], longest_up_to=most, cap_gb=arguments.cap_gb) for name in (PLAIN, KIT)}
    for name, found in lengths.items():
        print(f"{name}: rows of {found['longest_tokens']:,} tokens fit, of at most {most:,} that were tried")
    if arguments.json is not None:
        content = {"device": where, "torch": torch.__version__, "cap_gb": arguments.cap_gb, "results": rows}
        arguments.json.write_text(json.dumps(content | {"longest": lengths}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
