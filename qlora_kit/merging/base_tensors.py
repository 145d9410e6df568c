"""A base's tensors as a merge writes them: 4-bit weights of its files as plain ones, their states left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod

from qlora_kit.checkpoint import TensorSource, TensorSpec
from qlora_kit.errors import BaseModelError
from qlora_kit.prequantized import PackedWeight

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
