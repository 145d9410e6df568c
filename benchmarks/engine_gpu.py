"""Decoding with adapters on a GPU: the base, one adapter and eight, by the engine's loop, by PEFT, and by transformers.

    python benchmarks/engine_gpu.py [--device cuda|cpu] [--base BASE] [--compile BACKEND] [--quick] [--json FILE]

Tokens a second of whole answers to 8 requests at once, with random adapters of rank 16 on every linear layer. On a CPU
it runs `tiny` as a dry run of the same code. With --compile (`inductor`; `aot_eager` where no C++ compiler is) the
engine's decode steps are compiled too, by an engine of their own, and it is counted how many of its tokens are those of
the first. Manual CUDA graphs are not used. GPUs: not measured yet.
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


def write_adapters(engines: list[Engine], folder: Path) -> Any:
    """PEFT's model with ``ROWS`` random adapters on a copy of the base; each is loaded by the engines too."""
    engine = engines[0]
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
    for engine in engines:
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


def answers_of(engine: Engine, prompts: torch.Tensor, adapters: list[str | None], new: int) -> list[list[int]]:
    """The tokens of each answer, all requests at once, without prompts that are known already."""
    engine._scheduler.prefixes.clear()
    rows = zip(prompts.tolist(), adapters, strict=True)
    handles = [
        engine.submit(Request(prompt_ids=tuple(ids), adapter=name, sampling=Sampling(new))) for ids, name in rows
    ]
    return [[token for delta in handle for token in delta.token_ids] for handle in handles]


def make_prompts(engine: Engine) -> torch.Tensor:
    """Random token ids.  # (ROWS, PROMPT)"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, engine.model.config.vocab_size - 10, (ROWS, PROMPT), generator=generator)


def agreement(engines: list[Engine], new_tokens: int) -> float:
    """Share of tokens that the second engine gives as the first one does; 8 adapters."""
    prompts = make_prompts(engines[0])
    first, second = (answers_of(engine, prompts, list(engine.adapters), new_tokens) for engine in engines)
    pairs = [pair for one, other in zip(first, second, strict=True) for pair in zip(one, other, strict=False)]
    return sum(left == right for left, right in pairs) / sum(map(len, first))


def compare(engines: list[Engine], peft: Any, *, new_tokens: int, runs: int) -> dict[str, float]:
    """Tokens a second of each contender."""
    engine, device = engines[0], engines[0].model.device
    prompts = make_prompts(engine)
    names = list(engine.adapters)

    def by_engine(chosen: Engine, adapters: list[str | None]) -> Callable[[], int]:
        return lambda: sum(map(len, answers_of(chosen, prompts, adapters, new_tokens)))

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

    contenders = {}
    for label, chosen in zip(("engine", "compiled engine"), engines, strict=False):
        contenders[f"{label}, base"] = by_engine(chosen, [None] * ROWS)
        contenders[f"{label}, 1 adapter"] = by_engine(chosen, [names[0]] * ROWS)
        contenders[f"{label}, {ROWS} adapters"] = by_engine(chosen, [*names])
    contenders |= {
        "transformers, base": base_alone,
        "PEFT, 1 adapter": one_of_peft,
        f"PEFT, {ROWS} adapters": by_transformers(peft, adapter_names=names),
    }
    return {name: tokens_per_second(run, device, runs) for name, run in contenders.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--base", default="tiny", help="tiny, a folder, or a Hub id")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, for a second engine's decode steps")
    parser.add_argument("--quick", action="store_true", help="8 tokens and one run instead of 128 and 3")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    engines = [Engine(arguments.base, device=device, max_batch=ROWS, slots=ROWS)]
    if arguments.compile is not None:
        backend = arguments.compile
        engines.append(Engine(arguments.base, device=device, max_batch=ROWS, slots=ROWS, compile_backend=backend))
    with tempfile.TemporaryDirectory() as folder:
        peft = write_adapters(engines, Path(folder))
    new_tokens, runs = (8, 1) if arguments.quick else (128, 3)
    same = agreement(engines, new_tokens) if len(engines) > 1 else None
    figures = compare(engines, peft, new_tokens=new_tokens, runs=runs)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, a dry run"
    table = Table(title=f"tokens a second, {ROWS} requests at once ({name})")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    for contender, speed in figures.items():
        table.add_row(contender, f"{speed:,.0f}")
    Console().print(table)
    if same is not None:
        print(f"tokens of the compiled engine that are the other's: {same:.1%}")
    if arguments.json is not None:
        content = {"device": name, "base": arguments.base, "torch": torch.__version__, "tokens_per_second": figures}
        content |= {"compile": arguments.compile, "compiled_token_agreement": same}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
