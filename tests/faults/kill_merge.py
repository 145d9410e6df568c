"""Kills a merge with SIGKILL again and again: each time there is no output or a whole one, and the next run ends alike.

Moments are of two kinds: at random, and at each single file operation of the merge. The stack is imported once; each
merge is a forked child. One JSON record is printed for each moment, then their counts.

    python tests/faults/kill_merge.py --random 24 --every 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from conftest import byte_level_tokenizer  # noqa: E402
from kill_run import at_each_operation, in_child  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from qlora_kit.merging import merge_adapter, verifying  # noqa: E402, F401  # imported once, before the forks

REPORT = "merge_report.json"
TIMES = ("seconds", "peak_rss_bytes")
SHARD_BYTES = 200_000


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """A base of two layers and an adapter without contract."""
    tokenizer = byte_level_tokenizer("qwen", "qwen2_5", eos_token="<|im_end|>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    model.to(torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return folder / "adapter", folder / "base"


def files_of(folder: Path) -> dict[str, Any]:
    """What every file holds; of the report all but times."""
    report = json.loads((folder / REPORT).read_text())
    others = {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (REPORT, "README.md")}
    return {**others, REPORT: {key: value for key, value in report.items() if key not in TIMES}}


def try_moment(
    merge: Callable[[Path], None],
    out: Path,
    whole: dict[str, Any],
    *,
    seconds: float = 0.0,
    operation: int | None = None,
) -> dict[str, Any]:
    """Kill one merge at a moment, look, run it again, compare; a record of what happened."""
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()

    def first() -> None:
        if operation is not None:
            at_each_operation(out.parent, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == operation else None)
        merge(out)

    status = in_child(first, kill_after_seconds=None if operation is not None else seconds)
    if status == 0 and operation is None:  # it was done before
        return try_moment(merge, out, whole, seconds=0.7 * seconds)
    there = out.exists()
    record: dict[str, Any] = {"seconds": seconds, "operation": operation, "first": status, "there": there}
    record["whole_or_nothing"] = not there or files_of(out) == whole
    began = time.monotonic()
    record["second"] = in_child(lambda: merge(out))
    record["second_seconds"] = round(time.monotonic() - began, 3)
    record["identical"] = record["second"] == 0 and files_of(out) == whole
    record["left_over"] = [path.name for path in out.parent.iterdir() if path != out]
    return record


def main() -> int:
    """Try all moments; 0 if each left nothing or everything, and ended identically with nothing beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=24, help="random moments")
    parser.add_argument("--every", type=int, default=1, help="try each n-th file operation; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="qlora-kit-kill-") as place:
        work = Path(place)
        os.environ["KILL_RUN_LOG"] = str(work / "log.txt")
        adapter, base = make_inputs(work)
        out = work / "place" / "merged"

        def merge(target: Path) -> None:
            merge_adapter(adapter, target, base=str(base), onto="dequantized", max_shard_bytes=SHARD_BYTES)

        operations, seconds = measure(merge, work, out)
        whole = files_of(work / "whole" / "merged")
        draw = random.Random(options.seed)
        moments: list[dict[str, Any]] = [{"seconds": draw.uniform(0.0, seconds)} for _ in range(options.random)]
        moments += [{"operation": n} for n in range(1, operations + 1, options.every)] if options.every else []
        records = [try_moment(merge, out, whole, **moment) for moment in moments]
    for record in records:
        print(json.dumps(record))
    good = [one["whole_or_nothing"] and one["identical"] and not one["left_over"] for one in records]
    killed = sum(one["first"] == -signal.SIGKILL for one in records)
    counts = {"moments": len(records), "killed": killed, "there": sum(one["there"] for one in records)}
    counts |= {"operations": operations, "good": sum(good)}
    print(json.dumps({**counts, "seconds_of_a_merge": round(seconds, 2)}))
    return 0 if all(good) else 1


def measure(merge: Callable[[Path], None], work: Path, out: Path) -> tuple[int, float]:
    """Merge undisturbed; how many file operations that has, and how long it takes."""
    out.parent.mkdir()

    def count() -> None:
        counter = os.open(work / "operations.txt", os.O_WRONLY | os.O_CREAT)

        def write_down(number: int) -> None:
            os.pwrite(counter, f"{number:9d}".encode(), 0)

        at_each_operation(out.parent, write_down)
        merge(out)

    if in_child(count):
        raise SystemExit(f"the merge itself fails:\n{(work / 'log.txt').read_text()}")
    began = time.monotonic()
    in_child(lambda: merge(work / "whole" / "merged"))
    return int((work / "operations.txt").read_text()), time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
