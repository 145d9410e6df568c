"""Preparing data: rows checked, rendered, masked, tokenised and packed per second, beside TRL's own preparation.

    python benchmarks/data.py [--quick] [--json FILE]

The rows are alpaca rows, the tokenizer is that of `tiny`. Each contender runs in a process of its own, from the JSONL
file to packed rows, several times in turn; the median counts. TRL runs as `SFTTrainer` prepares data by itself, in one
process (its default) and in one for each core. The kit also checks every row, looks for duplicates and writes a
ledger; it starts with an empty cache each time, and once more with a filled one. Imports are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = (
    "the a of to and in is it you that he was for on are with as his they be at one have this from or had by hot but "
    "some what there we can out other were all your when up use word how said an each she which do their time if will "
    "way about many then them would write like so these her long make thing see him two has look more day could go"
).split()
MAX_LENGTH = 512


def write_rows(path: Path, rows: int) -> None:
    """Alpaca rows of 20 to 60 words, every second one with an input."""
    source = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(source.choices(WORDS, k=source.randint(shortest, longest)))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "instruction": f"{text(8, 16)} {number}?",
                "input": text(6, 14) * (number % 2),
                "output": text(8, 28),
            }
            file.write(json.dumps(row) + "\n")


def kit(rows: Path, work: Path) -> dict[str, Any]:
    """From the file to packed rows by the kit; then once more, from its cache."""
    import datasets
    from trl import pack_dataset

    from qlora_kit.base_files import resolve_base
    from qlora_kit.config import load_config
    from qlora_kit.data.token_cache import TokenCache
    from qlora_kit.data.tokenised_data import tokenised_data
    from qlora_kit.models import load_tokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(resolve_base("tiny"))
    run = work / "run.yaml"
    run.write_text(
        f"name: bench\ntask: rewriting\ndata: {{train: {rows}, format: auto, system_prompt: '', prompt: '{{x}}', "
        "completion: '{y}'}\n"
        f"eval: {{metrics: [chrf]}}\ntrain: {{max_length: {MAX_LENGTH}, packing: true}}\n",
        encoding="utf-8",
    )
    config = load_config(run)
    found: dict[str, Any] = {}
    for name in ("seconds", "cached_seconds"):
        began = time.perf_counter()
        data = tokenised_data(config, tokenizer, cache=TokenCache(work / "cache"))
        data.require_usable()
        assert data.train is not None
        found.setdefault("prepared_rss_bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        packed = pack_dataset(data.train.select_columns(["input_ids", "labels"]), MAX_LENGTH, "bfd")
        found[name] = time.perf_counter() - began
    return found | {"packed_rows": len(packed), "tokens": data.report.total_tokens, "rows": data.report.kept}


def trl(rows: Path, work: Path, processes: int | None) -> dict[str, Any]:
    """From the file to packed rows by TRL, alpaca rows made prompt and completion by a plain ``map``."""
    import datasets
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from trl import SFTConfig, SFTTrainer

    from qlora_kit.base_files import resolve_base
    from qlora_kit.models import load_tokenizer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(resolve_base("tiny"))
    small = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = Qwen2ForCausalLM(small)
    began = time.perf_counter()
    raw = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(work / "cache"))
    raw = raw.map(_as_prompt_and_completion, remove_columns=raw.column_names, num_proc=processes)
    arguments = SFTConfig(
        output_dir=str(work / "out"),
        max_length=MAX_LENGTH,
        packing=True,
        dataset_num_proc=processes,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=raw, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return {"seconds": seconds, "packed_rows": len(trainer.train_dataset), "tokens": tokens, "rows": len(raw)}


def _as_prompt_and_completion(row: dict[str, str]) -> dict[str, Any]:
    prompt = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": row["output"]}],
    }


def contender(name: str, rows: Path) -> dict[str, Any]:
    """One run in this process, with its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if name == "kit":
            found = kit(rows, work)
        else:
            found = trl(rows, work, None if name == "trl, 1 process" else os.cpu_count())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found | {"start_rss_bytes": before * 1024, "peak_rss_bytes": peak * 1024}


def run_in_process(name: str, rows: Path) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--contender", name, "--rows", str(rows)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5,000 rows and one run instead of 100,000 and 3")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender is not None:
        print(json.dumps(contender(arguments.contender, arguments.rows)))
        return
    report = compare(rows=5_000 if arguments.quick else 100_000, runs=1 if arguments.quick else 3)
    show(report)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compare(*, rows: int, runs: int) -> dict[str, Any]:
    """Median figures of each contender, run in turn, and the kit's memory at a quarter of the rows."""
    names = ("kit", "trl, 1 process", f"trl, {os.cpu_count()} processes")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        for _ in range(runs):
            for name in names:
                results[name].append(run_in_process(name, path))
        write_rows(path, rows // 4)
        quarter = run_in_process("kit", path)
    figures = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in results.items()
    }
    for found in figures.values():
        found["rows_per_second"] = rows / found["seconds"]
    return {
        "rows": rows,
        "runs": runs,
        "cores": os.cpu_count(),
        "figures": figures,
        "kit_prepared_rss_bytes_at_a_quarter_of_the_rows": quarter["prepared_rss_bytes"],
        "kit_over_trl": {
            name: figures["kit"]["rows_per_second"] / figures[name]["rows_per_second"] for name in names[1:]
        },
    }


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['rows']:,} alpaca rows to packed tokens, {report['cores']} cores")
    for column in ("", "seconds", "rows/s", "kit is faster by", "peak MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in report["figures"].items():
        factor = report["kit_over_trl"].get(name)
        table.add_row(
            name,
            f"{found['seconds']:.1f}",
            f"{found['rows_per_second']:,.0f}",
            "" if factor is None else f"{factor:.2f}x",
            f"{found['peak_rss_bytes'] / 2**20:,.0f}",
        )
    Console().print(table)
    kit_figures = report["figures"]["kit"]
    quarter = report["kit_prepared_rss_bytes_at_a_quarter_of_the_rows"] / 2**20
    whole = kit_figures["prepared_rss_bytes"] / 2**20
    print(f"kit from its cache: {kit_figures['cached_seconds']:.1f} s")
    print(f"kit before packing: {whole:,.0f} MiB at the peak, {quarter:,.0f} MiB with a quarter of the rows")


if __name__ == "__main__":
    main()
