"""Runs the kit's own path on one device, in small: load in 4 bits, LoRA, three steps, merge; measured values out.

The steps are taken by the libraries' layers, or by the fused ones that training puts in their place.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlora_kit.doctor import subject

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

Floats = NDArray[np.float64]
LossOf = Callable[[Mapping[str, "torch.Tensor"]], "torch.Tensor"]

_PEFT_PREFIX = "base_model.model."
_PEFT_SUFFIX = ".default.weight"
# fp16 holds nothing below 6e-8: as in training, the loss is scaled up before the backward pass.
_LOSS_SCALES = {"float16": 1024.0}


@dataclass(frozen=True)
class Measured:
    """What one device computed; names and shapes as in ``references.Reference``.

    Attributes:
        device: ``cpu``, ``cuda:0``, …
        compute_dtype: ``float32``, ``bfloat16`` or ``float16``.
        codes: Module to its 4-bit codes.
        scales: Module to the dequantized scales of its blocks.
        losses: Before each step.
        gradients: At the first step.
        adapter: After the last step.
        merged: Every tensor of the merged checkpoint, by its name there.
        seconds: Wall time of all of it.
    """

    device: str
    compute_dtype: str
    codes: Mapping[str, NDArray[np.uint8]]
    scales: Mapping[str, Floats]
    losses: tuple[float, ...]
    gradients: Mapping[str, Floats]
    adapter: Mapping[str, Floats]
    merged: Mapping[str, Floats]
    seconds: float


def compute_dtype_name(setting: str, device: torch.device) -> str:
    """What ``quantization.bnb_4bit_compute_dtype`` means on ``device``: ``float32``, ``bfloat16`` or ``float16``."""
    from qlora_kit.models import compute_dtype

    return str(compute_dtype(setting, device)).removeprefix("torch.")


def measure(device: torch.device, *, dtype: str = "auto", fused: bool = False) -> Measured:
    """Load, train and merge the fixed subject on ``device``.

    Args:
        device: A device that torch can use.
        dtype: The compute dtype, as in ``quantization.bnb_4bit_compute_dtype``.
        fused: Whether to train by the fused path.

    Raises:
        QloraKitError: The kit refuses what it just wrote.
        RuntimeError: torch or bitsandbytes cannot compute on the device.
    """
    from qlora_kit.base_files import BaseRef
    from qlora_kit.config import LoraSection, QuantizationSection
    from qlora_kit.merging import merge_adapter
    from qlora_kit.models import attach_lora, load_base_model

    began = time.perf_counter()
    used_dtype = compute_dtype_name(dtype, device)
    with TemporaryDirectory(prefix="qlora-kit-doctor-") as name:
        folder = Path(name)
        write_base(folder / "base")
        quantization = QuantizationSection.model_validate({"bnb_4bit_compute_dtype": used_dtype})
        base = load_base_model(BaseRef("doctor", folder / "base"), quantization, device=device)
        codes, scales = _quantized(base)
        model = attach_lora(base, LoraSection(r=subject.R, lora_alpha=subject.LORA_ALPHA))
        with _loss_by(model, fused=fused) as loss_of:
            losses, gradients = _train(model, device, used_dtype, loss_of)
        adapter = {key: _numpy(parameter) for key, parameter in _factors(model).items()}
        model.save_pretrained(folder / "adapter")
        merge_adapter(
            folder / "adapter", folder / "merged", base=str(folder / "base"), onto="dequantized", verify=False
        )
        merged = _read_weights(folder / "merged")
    return Measured(
        device=str(device),
        compute_dtype=used_dtype,
        codes=codes,
        scales=scales,
        losses=losses,
        gradients=gradients,
        adapter=adapter,
        merged=merged,
        seconds=time.perf_counter() - began,
    )


def write_base(folder: Path) -> None:
    """Write the subject's base as a checkpoint in bf16, which holds its weights exactly."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(subject.model_config()), encoding="utf-8")
    weights = {name: torch.from_numpy(array).to(torch.bfloat16) for name, array in subject.base_weights().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _quantized(base: torch.nn.Module) -> tuple[dict[str, NDArray[np.uint8]], dict[str, Floats]]:
    """The codes and the dequantized block scales of each 4-bit layer, as they lie on the device."""
    import torch
    from bitsandbytes.functional import dequantize_blockwise

    from qlora_kit.four_bit import linear4bit_modules

    codes, scales = {}, {}
    for name, module in linear4bit_modules(base).items():
        packed = module.weight.data.reshape(-1).view(torch.uint8).cpu().numpy()
        halves = np.stack([packed >> 4, packed & 15], axis=-1)  # the first of two codes is in the high half
        codes[name] = halves.reshape(module.out_features, module.in_features)
        state = module.weight.quant_state
        scales[name] = _numpy(dequantize_blockwise(state.absmax, state.state2) + state.offset).reshape(-1)
    return codes, scales


def _factors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trainable tensors under the names that the references use."""
    return {
        name.removeprefix(_PEFT_PREFIX).removesuffix(_PEFT_SUFFIX): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@contextmanager
def _loss_by(model: PeftModel, *, fused: bool) -> Iterator[LossOf]:
    """The mean loss of a batch's labels, by transformers' layers or by the fused path, which is there in the block.

    Raises:
        RuntimeError: A piece of the fused path does not take the subject.
    """
    from qlora_kit.fast import ScoredModel, fast_path

    if not fused:
        yield lambda rows: model(**rows).loss
        return
    with fast_path(model) as path:
        left = [f"{piece} ({piece.reason})" for piece in path.pieces if piece.reason is not None]
        if path.head is None or left:
            raise RuntimeError(f"not fused: {', '.join(left)}")
        scored = ScoredModel(model, path.head)

        def loss_of(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
            output = scored(**rows, fused_lm_head=True)
            loss: torch.Tensor = -output.log_probs.sum() / output.label_mask.sum()
            return loss

        yield loss_of


def _train(
    model: PeftModel, device: torch.device, dtype: str, loss_of: LossOf
) -> tuple[tuple[float, ...], dict[str, Floats]]:
    """Three steps of AdamW from the subject's adapter; the losses, and the gradients of the first step."""
    import torch

    factors = _factors(model)
    with torch.no_grad():
        for name, array in subject.adapter_weights().items():
            factors[name].copy_(torch.from_numpy(array))
    optimizer = torch.optim.AdamW(
        factors.values(), lr=subject.LEARNING_RATE, eps=subject.ADAM_EPSILON, weight_decay=0.0
    )
    scale = _LOSS_SCALES.get(dtype, 1.0)
    losses: list[float] = []
    gradients: dict[str, Floats] = {}
    model.train()
    for batch in subject.batches():
        rows = {name: torch.from_numpy(array).to(device) for name, array in vars(batch).items()}
        with _mixed_precision(device, dtype):
            loss = loss_of(rows)
        optimizer.zero_grad()
        (loss * scale).backward()
        for name, factor in factors.items():
            if factor.grad is None:
                raise RuntimeError(f"{name} got no gradient")
            factor.grad /= scale
        losses.append(loss.item())
        gradients = gradients or {name: _numpy(factor.grad) for name, factor in factors.items()}
        optimizer.step()
    return tuple(losses), gradients


def _mixed_precision(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """As the Trainer sets it up for a 16-bit compute dtype."""
    import torch

    from qlora_kit.models import compute_dtype

    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=compute_dtype(dtype, device))


def _read_weights(folder: Path) -> dict[str, Floats]:
    from safetensors.torch import load_file

    return {
        name: _numpy(tensor)
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def _numpy(tensor: Any) -> Floats:
    return tensor.detach().to(device="cpu").double().numpy().copy()
