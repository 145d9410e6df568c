"""Kills a training run with SIGKILL again and again, resumes each to its end, and compares it with a run left alone.

Moments are of two kinds: at random, and at each single file operation of the run (a file opened for writing or written
by a library, a rename, a removal), so that every file is at some time the last one written. The stack is imported
once; each run is a forked child. One JSON record is written for each moment.

    python tests/faults/kill_run.py --random 60 --json runs/faults.json
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["HF_HUB_OFFLINE"] = "1"

import peft.peft_model  # noqa: E402
import torch  # noqa: E402
from conftest import byte_level_tokenizer  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from qlora_kit.config import RunConfig, load_config  # noqa: E402
from qlora_kit.training import train  # noqa: E402
from qlora_kit.training.checkpoints import checkpoints, newest_sound  # noqa: E402
from qlora_kit.training.settings import Start  # noqa: E402

WEIGHTS = "adapter_model.safetensors"
TIMES = ("runtime", "per_second", "seconds", "peak_bytes")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OPERATIONS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def make_config(folder: Path) -> Path:
    """A base of two layers, 40 rows, and a run of eight steps with dropout that saves four times."""
    tokenizer = byte_level_tokenizer("qwen", "qwen2_5", eos_token="<|im_end|>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for split, numbers in (("train", range(32)), ("validation", range(32, 40))):
        rows = [{"text": f"Number {n} is here.", "label": ["positive", "negative"][n % 2]} for n in numbers]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.yaml").write_text(
        f"name: kill\ntask: sentiment\nmodel: {{base: {folder}/base}}\n"
        "lora: {r: 4, lora_alpha: 8, lora_dropout: 0.1}\n"
        "data: {train: train.jsonl, validation: validation.jsonl}\neval: {max_new_tokens: 4, stop_rate_rows: 2}\n"
        "train: {max_length: 256, per_device_train_batch_size: 4, gradient_accumulation_steps: 2,\n"
        "  learning_rate: 1.0e-2, num_train_epochs: 2, logging_steps: 1, warmup_steps: 0,\n"
        "  eval_strategy: steps, eval_steps: 2, save_strategy: steps, save_steps: 2}\n"
    )
    return folder / "run.yaml"


def in_child(work: Callable[[], None], *, kill_after_seconds: float | None = None) -> int:
    """Run ``work`` in a fork; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        log = os.open(os.environ["KILL_RUN_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_each_operation(folder: Path, act: Callable[[int], None]) -> None:
    """Call ``act`` with the running number of each operation on files in ``folder``, just before it is made."""
    count = 0

    def note(path: object) -> None:
        nonlocal count
        if isinstance(path, (str, os.PathLike)) and str(path).startswith(str(folder)):
            count += 1
            act(count)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING):
            note(arguments[0])

    def with_note(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(value: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            note(path)
            return function(value, path, *args, **kwargs)

        return noted

    sys.addaudithook(hook)
    torch.save = with_note(torch.save)  # these two write without Python's open
    peft.peft_model.safe_save_file = with_note(peft.peft_model.safe_save_file)


def figures(folder: Path) -> Any:
    """What a run measured, without times."""

    def timeless(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if not name.endswith(TIMES)}

    metrics = json.loads((folder / "metrics.json").read_text())
    return {**timeless(metrics), "history": [timeless(entry) for entry in metrics["history"]]}


def state_of(folder: Path) -> tuple[str, int]:
    """How a killed run is to be gone on with, and how many visible checkpoints are refused."""
    if not folder.exists() or not any(folder.iterdir()):
        return "start", 0
    found = checkpoints(folder)
    if not found:
        return "overwrite", 0
    settings = Start.read(folder).began_sha256
    return "resume", len(newest_sound(folder, settings_sha256=settings, with_best=True).refused)


def try_moment(config: RunConfig, whole: Path, *, seconds: float | None = None, operation: int | None = None) -> Any:
    """Kill one run at a moment, resume it to its end, compare; a record of what happened."""
    folder = Path(config.output_dir)
    shutil.rmtree(folder, ignore_errors=True)

    def first() -> None:
        if operation is not None:
            at_each_operation(folder, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == operation else None)
        train(config)

    status = in_child(first, kill_after_seconds=seconds)
    if status == 0 and seconds is not None:  # it was done before
        return try_moment(config, whole, seconds=0.7 * seconds)
    record: dict[str, Any] = {"seconds": seconds, "operation": operation, "first": status}
    record["files"] = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    way, record["refused"] = state_of(folder)
    record["way"] = way
    record["second"] = in_child(lambda: train(config, resume=way == "resume", overwrite=way == "overwrite") and None)
    record["identical"] = (
        record["second"] == 0
        and (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        and figures(folder) == figures(whole)
    )
    record["left_over"] = [name for name in os.listdir(folder) if name.startswith(".")] if folder.exists() else []
    return record


def main() -> int:
    """Try all moments and write the records; 0 if every run ended identically."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=60, help="random moments")
    parser.add_argument("--every", type=int, default=1, help="try each n-th file operation; 0 for none")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the records go")
    options = parser.parse_args()
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory(prefix="qlora-kit-kill-") as place:
        work = Path(place)
        os.environ |= {"QLORA_KIT_CACHE": str(work / "cache"), "KILL_RUN_LOG": str(work / "log.txt")}
        config_file = make_config(work)
        whole = work / "whole"
        operations, seconds = measure(config_file, whole, work)
        config = load_config(config_file, [f"output_dir={work / 'run'}"])
        draw = random.Random(options.seed)
        moments: list[dict[str, Any]] = [{"seconds": draw.uniform(0.0, seconds)} for _ in range(options.random)]
        moments += [{"operation": n} for n in range(1, operations + 1, options.every)] if options.every else []
        draw.shuffle(moments)
        records = []
        for moment in moments:
            if time.monotonic() > end:
                break
            records.append(try_moment(config, whole, **moment))
            print(f"{len(records)}/{len(moments)}", json.dumps(records[-1]), file=sys.stderr, flush=True)
        report = summary(records) | {"operations_in_a_run": operations, "seconds_of_a_run": round(seconds, 2)}
    print(json.dumps(report))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**report, "records": records}, indent=1) + "\n", encoding="utf-8")
    return 0 if report["identical"] == report["moments"] else 1


def measure(config_file: Path, whole: Path, work: Path) -> tuple[int, float]:
    """Make the run that is left alone; how many file operations it has, and how long it takes."""

    def count() -> None:
        counter = os.open(work / "operations.txt", os.O_WRONLY | os.O_CREAT)

        def write_down(number: int) -> None:
            os.pwrite(counter, f"{number:9d}".encode(), 0)

        at_each_operation(whole, write_down)
        train(load_config(config_file, [f"output_dir={whole}"]))

    if in_child(count):
        raise SystemExit(f"the run itself fails:\n{(work / 'log.txt').read_text()}")
    began = time.monotonic()
    in_child(lambda: train(load_config(config_file, [f"output_dir={work / 'timed'}"])) and None)
    return int((work / "operations.txt").read_text()), time.monotonic() - began


def summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of all records."""
    return {
        "moments": len(records),
        "at_random": sum(record["operation"] is None for record in records),
        "at_file_operations": sum(record["operation"] is not None for record in records),
        "killed": sum(record["first"] == -signal.SIGKILL for record in records),
        "ways": dict(Counter(record["way"] for record in records)),
        "refused_checkpoints": sum(record["refused"] for record in records),
        "with_left_overs": sum(bool(record["left_over"]) for record in records),
        "identical": sum(record["identical"] for record in records),
    }


if __name__ == "__main__":
    sys.exit(main())
