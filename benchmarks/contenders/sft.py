"""One contender of the training benchmarks: the same random model, rows and settings, trained by TRL or by the kit.

Everything is made in the process and nothing is downloaded. 4-bit weights are made in place, for Unsloth in files too.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  (its operations have formulas below)
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.contenders.models import (
    ALPHA,
    HALF,
    KIT,
    RANK,
    SHAPES,
    SHIPPED,
    UNSLOTH,
    Setting,
    contender_model,
    same_adapter,
)
from qlora_kit.base_files import resolve_base
from qlora_kit.fast import PIECES
from qlora_kit.models import load_tokenizer
from qlora_kit.training.checkpointed_layers import checkpoint_first_layers
from qlora_kit.training.fast_switch import FastSwitch
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.run_facts import RunFacts

LEARNING_RATE = 5e-3


def token_rows(setting: Setting) -> list[dict[str, list[int]]]:
    """Enough rows for the steps; of few different tokens, so that there is something to learn."""
    source = random.Random(0)
    vocabulary = SHAPES[setting.shape]["vocab_size"]
    common = [source.randrange(vocabulary) for _ in range(64)]
    rows = []
    total = setting.steps * setting.rows * (math.ceil(2 / (1 + setting.shortest)) if setting.packing else 1)
    for _ in range(total):
        length = source.randint(round(setting.shortest * setting.length), setting.length)
        ids = source.choices(common, k=length)
        hidden = round(length * (1 - setting.supervised))
        rows.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return rows


class _Clock(TrainerCallback):
    """Seconds of each optimizer step, the device's work included, and those that the process had a core for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self._began = self._cpu_began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _synchronise()
        self._began, self._cpu_began = time.perf_counter(), time.process_time()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        _synchronise()
        self.seconds.append(time.perf_counter() - self._began)
        self.cpu_seconds.append(time.process_time() - self._cpu_began)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextmanager
def contender(name: str, setting: Setting, device: torch.device) -> Iterator[Any]:
    """The trainer of a contender, ready to train; a name ``kit: PIECE + …`` is the kit with these pieces alone."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    dtype = getattr(torch, setting.dtype)
    kit = name.startswith(KIT)
    with tempfile.TemporaryDirectory() as folder:
        model = contender_model(name, setting, device, Path(folder, "base"))
        rows = Dataset.from_list(token_rows(setting))
        arguments = SFTConfig(
            output_dir=folder,
            max_length=setting.length,
            per_device_train_batch_size=1 if setting.packing else setting.rows,
            max_steps=setting.steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            gradient_checkpointing=setting.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if setting.checkpointing else None,
            packing=setting.packing,
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            dataset_kwargs={"skip_prepare_dataset": not setting.packing},
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer_class = GuardedTrainer if kit else SFTTrainer
        tokenizer = load_tokenizer(resolve_base("tiny"))
        trainer = trainer_class(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        if name not in (SHIPPED, UNSLOTH):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        same_adapter(model)
        if not kit:
            yield trainer
            return
        trainer.facts = RunFacts(lambda: False, "", rows)
        if name == HALF:
            trainer.checkpointed_layers = SHAPES[setting.shape]["num_hidden_layers"] // 2
        trainer.fast = FastSwitch(model, pieces=_pieces(name))
        trainer.fast.use(True)
        try:
            if trainer.fast.left:
                raise RuntimeError(f"not fused: {trainer.fast.left}")
            yield trainer
        finally:
            trainer.fast.use(False)


def _pieces(name: str) -> tuple[str, ...]:
    return tuple(name.removeprefix(f"{KIT}: ").split(" + ")) if ": " in name else PIECES


def timed(trainer: Any, setting: Setting) -> dict[str, Any]:
    """Median seconds of a step without the first one, tokens a second, and the losses."""
    clock = _Clock()
    trainer.add_callback(clock)
    trainer.train()
    seconds = statistics.median(clock.seconds[1:])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = trainer.state.log_history[-2]["num_tokens"] / setting.steps
    return {
        "step_seconds": seconds,
        "cpu_seconds": statistics.median(clock.cpu_seconds[1:]),
        "tokens_per_second": tokens / statistics.mean(clock.seconds[1:]),
        "losses": losses,
    }


def counted(trainer: Any, name: str, setting: Setting) -> dict[str, Any]:
    """FLOPs of one step's forward and backward pass, and the bytes that autograd keeps for the backward pass."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    items = (batch["labels"] != -100).sum()
    model = trainer.model.train()
    if setting.checkpointing:
        checkpoint(trainer, name)
    kept: dict[int, int] = {}
    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
        loss.backward()
    tokens = batch["input_ids"].numel()
    figures: dict[str, Any] = {"flops": counter.get_total_flops(), "padded_tokens": tokens}
    if not setting.checkpointing:  # else the checkpoints' own hooks take them
        figures["saved_bytes"] = sum(kept.values())
    return figures


def checkpoint(trainer: Any, name: str) -> None:
    """Turn gradient checkpointing on as ``trainer.train`` would; Unsloth's model was made with it."""
    if name == UNSLOTH:
        return
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if name == HALF:
        checkpoint_first_layers(trainer.model, trainer.checkpointed_layers)


def _gemm_4bit_flops(a: Sequence[int], b: Sequence[int], shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * shape[0]


def _addmm_flops(total: Sequence[int], a: Sequence[int], b: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[1]


def _sdpa_flops(query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Two products, as torch counts them: masked or causal, all pairs count."""
    return 4 * math.prod(query) * key[-2]


def _sdpa_backward_flops(
    grad: Sequence[int], query: Sequence[int], key: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return 10 * math.prod(query) * key[-2]


_FORMULAS = {  # what torch 2.13 has no formula for
    torch.ops.bitsandbytes.gemm_4bit: _gemm_4bit_flops,
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward_flops,
}


def forget_peak() -> int:
    """Set the process's peak resident size to what it has now, in bytes (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The largest resident size since ``forget_peak``."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


def described(setting: Setting) -> dict[str, Any]:
    """The setting and what of it is the same in all benchmarks, for the JSON."""
    return {**asdict(setting), "r": RANK, "lora_alpha": ALPHA, "learning_rate": LEARNING_RATE}
