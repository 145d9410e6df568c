"""The planner's prediction beside the peak of real training steps, at the shapes of Qwen2.5 with random weights.

    python benchmarks/memory_gpu.py [--device cuda|cpu] [--quick] [--json FILE]

By the libraries' own layers and by the fused path, at 7B with the embedding on the host too. On a GPU the peak is
`torch.cuda.max_memory_allocated`; nothing is downloaded, the 4-bit weights are made in place. On a CPU the bytes of all
tensors are counted, with torch's profiler for those that come and go. GPUs: not measured yet.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from qlora_kit.architecture import Architecture, read_architecture
from qlora_kit.config import LoraSection
from qlora_kit.fast import ScoredModel, fast_path
from qlora_kit.four_bit import linear4bit_modules
from qlora_kit.memory.estimate import estimate
from qlora_kit.memory.workload import Device, Workload, lora_pairs
from qlora_kit.models import attach_lora
from qlora_kit.training.host_embedding import HostEmbedding, put_embedding_on_host

COMMON = {"model_type": "qwen2", "max_position_embeddings": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32_768, "tie_word_embeddings": True,
    },
    "tiny, untied": {
        "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32_768, "tie_word_embeddings": False,
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
    fused: bool = False
    embedding_on_host: bool = False


def cases(device: str, *, quick: bool) -> list[Case]:
    """What is run: on a CPU the small shape alone."""
    if device == "cpu":
        lengths = (64,) if quick else (64, 128, 256)
        every = product(lengths, (1, 2), (False, True), (False, True))
        plain = [Case("tiny", rows, length, kept, fused) for length, rows, kept, fused in every]
        return [*plain, *(Case("tiny, untied", 1, lengths[-1], True, True, on_host) for on_host in (False, True))]
    shapes = ("0.5B", "7B") if quick else ("0.5B", "1.5B", "7B")
    on_device = [
        Case(shape, rows, length, kept, fused)
        for shape in shapes
        for rows, length in ((1, 2048), (4, 1024), (1, 8192))
        for kept, fused in product((True, False), (False, True))
    ]
    return [*on_device, *(Case("7B", 1, 2048, True, fused, True) for fused in (False, True))]


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
    model.is_loaded_in_4bit = True  # as transformers notes it while loading; PEFT and TRL look there
    return model


@dataclass(frozen=True)
class Trained:
    """A model that can be trained.

    Attributes:
        model: With fp32 adapters.
        called: What the trainer calls: the model with TRL's fused head, or with the kit's.
        workload: What is predicted of it.
        device: Where it is.
    """

    model: Any
    called: Any
    workload: Workload
    device: torch.device

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW of what is trained."""
        return torch.optim.AdamW([parameter for parameter in self.model.parameters() if parameter.requires_grad])

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """One training step; with more rows than one, one of them is padded, as in real data."""
        rows, length, device = self.workload.batch_size, self.workload.length, self.device
        ids = torch.randint(self.workload.architecture.vocab_size, (rows, length), device=device)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[0, length - length // 8 :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.workload.compute_bytes == 2):
            output = self.called(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        (-output.log_probs.sum() / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


@contextmanager
def trained(case: Case, config: dict[str, Any], device: torch.device) -> Iterator[Trained]:
    """The model of a case, on the fused path inside the block if the case says so."""
    from trl.trainer.utils import add_fused_lm_head

    on: Device = "cuda" if device.type == "cuda" else "cpu"
    dtype = torch.bfloat16 if on == "cuda" else torch.float32
    architecture = read_architecture(config, where=case.shape)
    lora = LoraSection()
    base = random_base(architecture, config, device, dtype)
    if case.embedding_on_host:
        put_embedding_on_host(base)
    model = attach_lora(base, lora)
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
        fast=case.fused,
        embedding_on_host=case.embedding_on_host,
    )
    model.train()
    if not case.fused:
        yield Trained(model, model, workload, device)
        return
    with fast_path(model) as fast:
        left = [piece for piece in fast.pieces if piece.reason is not None]
        if fast.head is None or left:
            raise RuntimeError(f"not fused: {left}")
        yield Trained(model, ScoredModel(model, fast.head), workload, device)


def peak_on_gpu(run: Trained) -> int:
    """What torch had allocated at most."""
    optimizer = run.optimizer()
    torch.cuda.reset_peak_memory_stats(run.device)
    for _ in range(STEPS):
        run.step(optimizer)
    return torch.cuda.max_memory_allocated(run.device)


def counted_on_cpu(run: Trained) -> int:
    """The tensors that stay, and the most that was allocated beyond them in a step."""
    from torch.profiler import ProfilerActivity, profile

    optimizer = run.optimizer()
    run.step(optimizer)
    kept = list(chain(run.model.parameters(), run.model.buffers()))
    for module in linear4bit_modules(run.model).values():
        state = module.weight.quant_state
        kept += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    kept += [value for entry in optimizer.state.values() for value in entry.values()]
    kept += [module.rows for module in run.model.modules() if isinstance(module, HostEmbedding)]
    static = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run.step(optimizer)
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
    with trained(case, config, device) as run:
        measured = (peak_on_gpu if device.type == "cuda" else counted_on_cpu)(run)
        predicted = estimate(run.workload).allocated_bytes
    del run
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
    for column in ("shape", "rows x tokens", "recomputes", "fused", "embedding", "measured", "predicted", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row["shape"],
            f"{row['rows']} x {row['length']}",
            "yes" if row["checkpointing"] else "no",
            "yes" if row["fused"] else "no",
            "host" if row["embedding_on_host"] else "device",
            f"{row['measured_bytes'] / 1e6:,.1f}",
            f"{row['predicted_bytes'] / 1e6:,.1f}",
            f"{row['ratio']:.3f}",
        )
    Console(width=100).print(table)
    if arguments.json is not None:
        content = {"device": name, "torch": torch.__version__, "results": results}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
