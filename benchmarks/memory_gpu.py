"""The planner's prediction beside the peak of real training steps, at the shapes of Qwen2.5 with random weights.

    python benchmarks/memory_gpu.py [--device cuda|cpu] [--quick] [--json FILE]

On a GPU the peak is `torch.cuda.max_memory_allocated`; nothing is downloaded, the 4-bit weights are made in place. On a
CPU the bytes of all tensors are counted, with torch's profiler for those that come and go. GPUs: not measured yet.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_kit.architecture import Architecture, read_architecture
from qlora_kit.config import LoraSection
from qlora_kit.four_bit import linear4bit_modules
from qlora_kit.memory.estimate import estimate
from qlora_kit.memory.workload import Device, Workload, lora_pairs
from qlora_kit.models import attach_lora

COMMON = {"model_type": "qwen2", "max_position_embeddings": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32_768, "tie_word_embeddings": True,
    },
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064,
    },
}  # fmt: skip
STEPS = 2  # the second one has the optimizer's state from its beginning


@dataclass(frozen=True)
class Case:
    """One run to compare: rows by tokens at a shape."""

    shape: str
    rows: int
    length: int
    checkpointing: bool


def cases(device: str, *, quick: bool) -> list[Case]:
    """What is run: on a CPU the small shape alone."""
    if device == "cpu":
        lengths = (64,) if quick else (64, 128, 256)
        return [Case("tiny", rows, length, kept) for length in lengths for rows in (1, 2) for kept in (False, True)]
    shapes = ("0.5B", "7B") if quick else ("0.5B", "1.5B", "7B")
    return [
        Case(shape, rows, length, kept)
        for shape in shapes
        for rows, length in ((1, 2048), (4, 1024), (1, 8192))
        for kept in (True, False)
    ]


def random_base(architecture: Architecture, config: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A model of the shape whose linear layers hold 4-bit codes of random numbers, made one by one on ``device``."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            shape, has_bias = (module.out_features, module.in_features), module.bias is not None
            layer = Linear4bit(module.in_features, module.out_features, has_bias, compute_dtype=dtype, device="meta")
            weight = torch.randn(shape, dtype=dtype, device=device) * 0.02
            layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
            model.set_submodule(name, layer)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = name.rpartition(".")
            made = torch.randn(parameter.shape, dtype=dtype, device=device) * 0.02
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(made, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(settings).to(device)
    for module in linear4bit_modules(model).values():
        module.support_avx512bf16_for_cpu = False
    return model


def trainable_model(case: Case, config: dict[str, Any], device: torch.device) -> tuple[Any, Workload]:
    """The model as training has it (fp32 adapters, TRL's fused head), and its workload."""
    from trl.trainer.utils import add_fused_lm_head

    on: Device = "cuda" if device.type == "cuda" else "cpu"
    dtype = torch.bfloat16 if on == "cuda" else torch.float32
    architecture = read_architecture(config, where=case.shape)
    lora = LoraSection()
    model = attach_lora(random_base(architecture, config, device, dtype), lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if case.checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    workload = Workload(
        architecture=architecture,
        layers=lora_pairs(architecture, lora),
        batch_size=case.rows,
        length=case.length,
        checkpointing=case.checkpointing,
        compute_bytes=2 if on == "cuda" else 4,
        device=on,
    )
    return model.train(), workload


def step(model: Any, workload: Workload, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """One training step; with more rows than one, the first is padded, as in real data."""
    ids = torch.randint(workload.architecture.vocab_size, (workload.batch_size, workload.length), device=device)
    mask = torch.ones_like(ids)
    if workload.batch_size > 1:
        mask[0, : workload.length // 8] = 0
    with torch.autocast(device.type, torch.bfloat16, enabled=workload.compute_bytes == 2):
        output = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    (-output.log_probs.sum() / ids.numel()).backward()
    optimizer.step()
    optimizer.zero_grad()


def peak_on_gpu(model: Any, workload: Workload, device: torch.device) -> int:
    """What torch had allocated at most."""
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(STEPS):
        step(model, workload, optimizer, device)
    return torch.cuda.max_memory_allocated(device)


def counted_on_cpu(model: Any, workload: Workload, device: torch.device) -> int:
    """The tensors that stay, and the most that was allocated beyond them in a step."""
    from torch.profiler import ProfilerActivity, profile

    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    step(model, workload, optimizer, device)
    kept = list(chain(model.parameters(), model.buffers()))
    for module in linear4bit_modules(model).values():
        state = module.weight.quant_state
        kept += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    kept += [value for entry in optimizer.state.values() for value in entry.values()]
    static = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step(model, workload, optimizer, device)
    if profiled.profiler is None:
        raise RuntimeError("torch's profiler recorded nothing")
    events = profiled.profiler.kineto_results.events()
    live = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += size
        peak = max(peak, live)
    return sum(static.values()) + peak


def compare(case: Case, device: torch.device) -> dict[str, Any]:
    """One case: bytes that were measured and predicted."""
    config = {**COMMON, **SHAPES[case.shape]}
    model, workload = trainable_model(case, config, device)
    measure = peak_on_gpu if device.type == "cuda" else counted_on_cpu
    measured, predicted = measure(model, workload, device), estimate(workload).allocated_bytes
    del model
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {**vars(case), "measured_bytes": measured, "predicted_bytes": predicted, "ratio": predicted / measured}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and lengths")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.manual_seed(0)
    results = [compare(case, device) for case in cases(device.type, quick=arguments.quick)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, counted"
    table = Table(title=f"peak of a training step, MB ({name})")
    for column in ("shape", "rows x tokens", "checkpointing", "measured", "predicted", "ratio"):
        table.add_column(column, justify="right")
    for row in results:
        table.add_row(
            row["shape"],
            f"{row['rows']} x {row['length']}",
            "yes" if row["checkpointing"] else "no",
            f"{row['measured_bytes'] / 1e6:,.1f}",
            f"{row['predicted_bytes'] / 1e6:,.1f}",
            f"{row['ratio']:.3f}",
        )
    Console().print(table)
    if arguments.json is not None:
        content = {"device": name, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
