"""One decode step with many adapters in a batch: the kit's bank beside PEFT, both on the same base in the same run.

    python benchmarks/engine.py [--quick] [--json FILE]

The base has the proportions of Qwen2.5-7B (28 layers, 196 adapted modules) at small widths, random weights in fp32;
each adapter has rank 16 on all of them. Everything runs on one thread. A figure is the median of CPU seconds of that
thread, which other programs on the machine disturb less than wall time, and a ratio is the median over rounds that
take the contenders in turn. The largest difference between the bank's logits and PEFT's is measured too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from qlora_kit.lora_bank import LoraBank, LoraFactors

LAYERS, RANK, ADAPTERS, ROWS, PROMPT = 28, 16, 8, 8, 32
SHAPES = {"width 512": (512, 2688), "width 128": (128, 672)}  # hidden and intermediate size, 1 : 5.25 as in the 7B
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PLAIN = "base"


def make_base(hidden: int, intermediate: int) -> PreTrainedModel:
    """The same random weights each time."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config).eval()


def with_peft(base: PreTrainedModel) -> PeftModel:
    """PEFT with ``ADAPTERS`` adapters whose two factors are random."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(MODULES), task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="a0")
    for number in range(1, ADAPTERS):
        model.add_adapter(f"a{number}", config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.02)
            parameter.requires_grad_(False)
    return model.eval()


def with_bank(base: PreTrainedModel, peft: PeftModel) -> LoraBank:
    """A bank with the same adapters, in slots 1 to ``ADAPTERS``."""
    bank = LoraBank(base, slots=ADAPTERS)
    weights = dict(peft.named_parameters())
    for number in range(ADAPTERS):
        pairs = {}
        for key, a in weights.items():
            if f"lora_A.a{number}." in key:
                b = weights[key.replace("lora_A", "lora_B")]
                module = key.removeprefix("base_model.model.").partition(".lora_A")[0]
                pairs[module] = (a.data, b.data.t())
        bank.write(number + 1, LoraFactors(pairs))
    return bank


def step_seconds(model: Any, steps: int, **options: Any) -> float:
    """Median CPU seconds of a decode step of ``ROWS`` rows behind a prompt."""
    ids = torch.arange(ROWS * PROMPT).reshape(ROWS, PROMPT) % 4096
    taken = []
    with torch.inference_mode():
        cache = DynamicCache()
        model(input_ids=ids, past_key_values=cache, **options)
        for _ in range(steps):
            began = time.thread_time()
            model(input_ids=ids[:, :1], past_key_values=cache, logits_to_keep=1, **options)
            taken.append(time.thread_time() - began)
    return statistics.median(taken)


def seconds_of(action: Callable[[], object], times: int) -> float:
    """Median CPU seconds of ``action``."""
    taken = []
    for _ in range(times):
        began = time.thread_time()
        action()
        taken.append(time.thread_time() - began)
    return statistics.median(taken)


def largest_difference(banked: PreTrainedModel, bank: LoraBank, peft: PeftModel) -> float:
    """Between the bank's logits of a mixed batch and PEFT's, row by row with its adapter alone."""
    ids = torch.arange(ROWS * PROMPT).reshape(ROWS, PROMPT) % 4096
    bank.choose(list(range(1, ADAPTERS + 1)))
    with torch.inference_mode():
        mixed = banked(input_ids=ids).logits
        worst = 0.0
        for row in range(ROWS):
            peft.set_adapter(f"a{row}")
            worst = max(worst, float((peft(input_ids=ids[row : row + 1]).logits[0] - mixed[row]).abs().max()))
    return worst


def compare(hidden: int, intermediate: int, *, rounds: int, steps: int) -> dict[str, Any]:
    """All contenders at one width, in turn."""
    plain, banked = make_base(hidden, intermediate), make_base(hidden, intermediate)
    peft = with_peft(make_base(hidden, intermediate))
    bank = with_bank(banked, peft)
    mixed = list(range(1, ADAPTERS + 1))
    names = [f"a{number}" for number in range(ADAPTERS)]

    def bank_step(rows: list[int] | int | None) -> float:
        bank.choose(rows, keep=True)
        return step_seconds(banked, steps)

    def peft_step(adapter: str | list[str]) -> float:
        if isinstance(adapter, list):
            return step_seconds(peft, max(2, steps // 4), adapter_names=adapter)
        peft.set_adapter(adapter)
        return step_seconds(peft, steps)

    contenders: dict[str, Callable[[], float]] = {
        PLAIN: lambda: step_seconds(plain, steps),
        "bank, no adapter": lambda: bank_step(None),
        "bank, 1 adapter": lambda: bank_step(3),
        f"bank, {ADAPTERS} adapters": lambda: bank_step(mixed),
        "PEFT, 1 adapter": lambda: peft_step("a3"),
        f"PEFT, {ADAPTERS} adapters": lambda: peft_step(names),
    }
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            taken[name].append(run())
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "modules": LAYERS * len(MODULES),
        "step_seconds": {name: statistics.median(values) for name, values in taken.items()},
        "times_the_base": {
            name: statistics.median(value / base for value, base in zip(values, taken[PLAIN], strict=True))
            for name, values in taken.items()
        },
        "choosing_seconds": {
            "bank": seconds_of(lambda: bank.choose(mixed), 200),
            "PEFT": seconds_of(lambda: peft.set_adapter("a5"), 5),
        },
        "largest_logit_difference": largest_difference(banked, bank, peft),
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    console = Console()
    for name, found in results.items():
        table = Table(title=f"decode step of {ROWS} rows, {name}")
        for column in ("", "ms", "times the base"):
            table.add_column(column, justify="right" if column else "left")
        for contender, seconds in found["step_seconds"].items():
            table.add_row(contender, f"{seconds * 1e3:.1f}", f"{found['times_the_base'][contender]:.2f}")
        console.print(table)
        choosing = found["choosing_seconds"]
        console.print(
            f"choosing: bank {choosing['bank'] * 1e3:.2f} ms, PEFT {choosing['PEFT'] * 1e3:.0f} ms; "
            f"logits differ by at most {found['largest_logit_difference']:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small width, 2 rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {"width 128": SHAPES["width 128"]} if arguments.quick else SHAPES
    rounds, steps = (2, 8) if arguments.quick else (5, 16)
    results = {name: compare(*shape, rounds=rounds, steps=steps) for name, shape in shapes.items()}
    show(results)
    if arguments.json is not None:
        content = {"threads": 1, "rows": ROWS, "rank": RANK, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
