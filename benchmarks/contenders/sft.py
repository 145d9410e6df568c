"""One contender of the training benchmarks: the same random model, rows and settings, trained by TRL or by the kit.

Everything is made in the process: no file is read, nothing is downloaded, 4-bit weights are made in place.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from benchmarks.memory_gpu import random_base
from qlora_kit.architecture import read_architecture
from qlora_kit.base_files import resolve_base
from qlora_kit.config import LoraSection
from qlora_kit.fast import PIECES, fast_path
from qlora_kit.models import attach_lora, load_tokenizer

COMMON = {"model_type": "qwen2", "max_position_embeddings": 32_768}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 704, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2_048, "tie_word_embeddings": True,
    },
    # 7B's proportions: MLP 5.3 times as wide as the model, a head of 9 % of the layers' weights
    "0.1B": {
        "hidden_size": 768, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 10_240, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
PLAIN = "TRL + PEFT"
SHIPPED = "TRL + PEFT, bf16 adapter"
KIT = "kit"
RANK, ALPHA, LEARNING_RATE = 16, 32, 5e-3


@dataclass(frozen=True)
class Setting:
    """What all contenders train alike.

    Attributes:
        shape: One of ``SHAPES``.
        rows: In a batch.
        length: Longest row, in tokens.
        steps: Optimizer steps.
        checkpointing: Whether activations are computed again.
        packing: Whether rows are put together to sequences of ``length``.
        shortest: Share of ``length`` that the shortest row has; lengths between are equally likely.
        supervised: Share of each row that counts in the loss: its end.
        dtype: Compute dtype, by its name in torch.
    """

    shape: str = "0.1B"
    rows: int = 2
    length: int = 512
    steps: int = 6
    checkpointing: bool = True
    packing: bool = False
    shortest: float = 0.5
    supervised: float = 0.5
    dtype: str = "float32"


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
    """The trainer of a contender, ready to train; a name ``kit: PIECE`` is the kit with that piece alone."""
    from datasets import Dataset, disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    from qlora_kit.training.callbacks import GuardedTrainer
    from qlora_kit.training.run_facts import RunFacts

    disable_progress_bars()
    dtype = getattr(torch, setting.dtype)
    config = {**COMMON, **SHAPES[setting.shape]}
    torch.manual_seed(0)
    base = random_base(read_architecture(config, where=setting.shape), config, device, dtype)
    base.is_loaded_in_4bit = True  # as transformers notes it while loading; PEFT and TRL look there
    set_seed(1)
    model = attach_lora(base, LoraSection(r=RANK, lora_alpha=ALPHA))
    rows = Dataset.from_list(token_rows(setting))
    kit = name.startswith(KIT)
    with tempfile.TemporaryDirectory() as folder:
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
        if name != SHIPPED:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        if not kit:
            yield trainer
            return
        trainer.facts = RunFacts(lambda: False, "", rows)
        pieces = (name.removeprefix(f"{KIT}: "),) if ": " in name else PIECES
        with fast_path(model, pieces=pieces) as fast:
            refused = [piece for piece in fast.pieces if piece.reason is not None]
            if refused:
                raise RuntimeError(f"not fused: {refused}")
            trainer.fast_head = fast.head
            yield trainer


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


def counted(trainer: Any, setting: Setting) -> dict[str, Any]:
    """FLOPs of one step's forward and backward pass, and the bytes that autograd keeps for the backward pass."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    items = (batch["labels"] != -100).sum()
    model = trainer.model.train()
    if setting.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
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
