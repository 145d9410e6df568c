"""bitsandbytes' 4-bit layers and weights, as the kit treats them: found, kept as they are, sampled, dequantized."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import BaseModelError

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit

CODE_SAMPLES = 32


def linear4bit_modules(model: torch.nn.Module) -> dict[str, Linear4bit]:
    """The 4-bit linear layers by their name in the base model (PEFT's wrapping left out of the name)."""
    from bitsandbytes.nn import Linear4bit

    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def keep_4bit_weights_as_they_are(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Switch off bitsandbytes' repacking for CPUs with AVX512-BF16, and let every weight dequantize to ``dtype``.

    There, the first forward pass in eval mode rounds the block scales to bf16 in place, for good: outputs change, and a
    training step after an evaluation gets no gradient through the base (bitsandbytes 0.50, ``Linear4bit.forward``).
    A checkpoint's quantization states bring the dtype it was made in: the forward pass ignores it, but the backward
    pass would round the weights to it.
    """
    for module in linear4bit_modules(model).values():
        module.support_avx512bf16_for_cpu = False
        module.weight.quant_state.dtype = dtype


def refuse_wrong_cpu_layers(model: torch.nn.Module) -> None:
    """Refuse 4-bit layers that bitsandbytes computes wrongly on a CPU.

    Its CPU kernel (0.50) takes the block scales of a weight's first row for all of its rows where the width of a row
    is no multiple of the block size: most weights come out wrong, without a word.

    Raises:
        BaseModelError: The model has such a layer, and it is on a CPU.
    """
    wrong = [
        f"{name} ({module.in_features} wide)"
        for name, module in linear4bit_modules(model).items()
        if module.weight.device.type == "cpu"
        and module.out_features > 1
        and module.in_features % module.weight.quant_state.blocksize
    ]
    if wrong:
        raise BaseModelError(
            f"{len(wrong)} layers have a width that bitsandbytes dequantizes wrongly on a CPU, the first is {wrong[0]}",
            expected="on a CPU, 4-bit layers whose in_features is a multiple of the block size (64)",
            fix="use a GPU, or set quantization.load_in_4bit to false; a merge works with --no-verify",
        )


def code_sample(codes: torch.Tensor) -> str:
    """A strided sample of a 4-bit weight's packed codes, as hex."""
    import torch

    flat = codes.reshape(-1).view(torch.uint8)
    return bytes(flat[list(sampled_places(flat.numel()))].tolist()).hex()


def sampled_places(count: int) -> range:
    """Which of a weight's ``count`` bytes of codes are its sample."""
    stride = max(1, count // CODE_SAMPLES)
    return range(0, count, stride)[:CODE_SAMPLES]


def nf4_code_samples(model: torch.nn.Module) -> dict[str, str]:
    """Each 4-bit weight's ``code_sample``: equal where two quantizers agree."""
    return {f"{name}.weight": code_sample(module.weight.data) for name, module in linear4bit_modules(model).items()}


def dequantize(codes: torch.Tensor, state: QuantState) -> torch.Tensor:
    """The weight that ``codes`` stand for, in the dtype of ``state``: (out_features, in_features).

    It is dequantized as rows of one block, or as one long row where the last block is not full. bitsandbytes gets both
    right on every device and for every width (``refuse_wrong_cpu_layers``); its CPU kernel gives each core some rows.
    """
    from bitsandbytes.functional import dequantize_4bit

    rows: Any = copy.copy(state)
    count, blocksize = state.shape.numel(), state.blocksize
    shape = (1, count) if count % blocksize else (count // blocksize, blocksize)
    rows.shape = state.shape.__class__(shape)
    return dequantize_4bit(codes, rows).reshape(state.shape)
