"""Decoding with adapters on a GPU: the base, one adapter and eight, by the engine's loop, by PEFT, and by transformers.

    python benchmarks/engine_gpu.py [--device cuda|cpu] [--base BASE] [--quick] [--json FILE]

Tokens a second of whole answers to 8 requests at once, with random adapters of rank 16 on every linear layer. On a CPU
it runs `tiny` as a dry run of the same code. Neither CUDA graphs nor compiling are used yet. GPUs: not measured yet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_kit.config import LoraSection
from qlora_kit.engine import Engine, Request
from qlora_kit.generation import Sampling
from qlora_kit.models import attach_lora, load_base_model

ROWS, PROMPT, RANK = 8, 128, 16


def write_adapters(engine: Engine, folder: Path) -> Any:
    """PEFT's model with ``ROWS`` random adapters on a second copy of the base; each is saved for the engine too."""
    base = load_base_model(engine.ref, engine.quantization, device=engine.model.device)
    peft = attach_lora(base, LoraSection(r=RANK, lora_alpha=RANK))
    names = ["default", *(f"a{number}" for number in range(1, ROWS))]
    for name in names[1:]:
        peft.add_adapter(name, peft.peft_config["default"])
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.01)
    peft.save_pretrained(folder, save_embedding_layers=False)
    if not (folder / "default").exists():
        (folder / "default").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).rename(folder / "default" / file)
    for name in names:
        engine.load(str(folder / name))
    return peft.eval()


def tokens_per_second(run: Callable[[], int], device: torch.device, runs: int) -> float:
    """Median over ``runs``, after one that warms up."""
    speeds = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        tokens = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(tokens / (time.perf_counter() - began))
    return statistics.median(speeds[1:])


def compare(engine: Engine, peft: Any, *, new_tokens: int, runs: int) -> dict[str, float]:
    """Tokens a second of each contender."""
    device = engine.model.device
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, engine.model.config.vocab_size - 10, (ROWS, PROMPT), generator=generator)
    names = list(engine.adapters)
    never = Sampling(new_tokens, repetition_penalty=1.0)

    def by_engine(adapters: list[str | None]) -> Callable[[], int]:
        def run() -> int:
            engine._scheduler.prefixes.clear()
            rows = zip(prompts.tolist(), adapters, strict=True)
            handles = [
                engine.submit(Request(prompt_ids=tuple(ids), adapter=name, sampling=never)) for ids, name in rows
            ]
            return sum(handle.result().completion_tokens for handle in handles)

        return run

    def by_transformers(model: Any, **options: Any) -> Callable[[], int]:
        def run() -> int:
            ids = prompts.to(device)
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
            return ROWS * (output.shape[1] - PROMPT)

        return run

    def base_alone() -> int:
        with engine.using(None) as model:
            return by_transformers(model)()

    def one_of_peft() -> int:
        peft.set_adapter("default")
        return by_transformers(peft)()

    contenders = {
        "engine, base": by_engine([None] * ROWS),
        "engine, 1 adapter": by_engine([names[0]] * ROWS),
        f"engine, {ROWS} adapters": by_engine([*names]),
        "transformers, base": base_alone,
        "PEFT, 1 adapter": one_of_peft,
        f"PEFT, {ROWS} adapters": by_transformers(peft, adapter_names=names),
    }
    return {name: tokens_per_second(run, device, runs) for name, run in contenders.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--base", default="tiny", help="tiny, a folder, or a Hub id")
    parser.add_argument("--quick", action="store_true", help="8 tokens and one run instead of 128 and 3")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    engine = Engine(arguments.base, device=device, max_batch=ROWS, slots=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        peft = write_adapters(engine, Path(folder))
    new_tokens, runs = (8, 1) if arguments.quick else (128, 3)
    figures = compare(engine, peft, new_tokens=new_tokens, runs=runs)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a dry run"
    table = Table(title=f"tokens a second, {ROWS} requests at once ({name})")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    for contender, speed in figures.items():
        table.add_row(contender, f"{speed:,.0f}")
    Console().print(table)
    if arguments.json is not None:
        content = {"device": name, "base": arguments.base, "torch": torch.__version__, "tokens_per_second": figures}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
