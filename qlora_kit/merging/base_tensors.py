"""A base's tensors as a merge sees them: 4-bit weights of its files dequantized, their quantization states left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from qlora_kit.checkpoint import TensorSource, TensorSpec
from qlora_kit.errors import BaseModelError
from qlora_kit.four_bit import dequantize
from qlora_kit.prequantized import PackedWeight

if TYPE_CHECKING:
    import torch

_FLOATS = ("F16", "BF16", "F32")


def output_specs(source: TensorSource, packed: Mapping[str, PackedWeight]) -> dict[str, TensorSpec]:
    """The tensors of a merge's output: the base's, its 4-bit weights as plain ones.

    They get the dtype that most of the base's unquantized numbers have.

    Args:
        source: The base.
        packed: Its 4-bit weights.

    Raises:
        BaseModelError: The base has 4-bit weights and no others.
    """
    parts = {part for weight in packed.values() for part in weight.parts}
    plain = {name: source.spec(name) for name in source.names if name not in parts and name not in packed}
    if not packed:
        return plain
    counts: Counter[str] = Counter()
    for spec in plain.values():
        if spec.dtype in _FLOATS:
            counts[spec.dtype] += prod(spec.shape)
    if not counts:
        raise BaseModelError(
            f"{source.folder}: holds 4-bit weights only",
            expected="embeddings and norms in one of " + ", ".join(_FLOATS),
            fix="give the complete checkpoint",
        )
    dtype = counts.most_common(1)[0][0]
    return {
        name: plain[name] if name in plain else TensorSpec(dtype, packed[name].shape)
        for name in source.names
        if name not in parts
    }


def read_tensor(source: TensorSource, name: str, packed: Mapping[str, PackedWeight]) -> torch.Tensor:
    """The base's tensor ``name``: as it is in the file, or in fp32 what a 4-bit layer computes with.

    The layer dequantizes straight to its compute dtype. The dtype that the quantization state records is that of the
    weight before; rounding to it would be a rounding that no layer does.
    """
    import torch
    from bitsandbytes.functional import QuantState

    if name not in packed:
        return source.get(name)
    parts = {part.removeprefix(f"{name}."): source.get(part) for part in packed[name].parts}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize(source.get(name), state)
