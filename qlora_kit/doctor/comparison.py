"""Compares what a device computed with the references, each kind of value within a stated tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qlora_kit.doctor import subject
from qlora_kit.doctor.references import Reference
from qlora_kit.doctor.training import Measured

Floats = NDArray[np.float64]
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Tolerance:
    """The largest relative errors of a compute dtype: of a loss, and of a tensor's gradient or change (in L2 norm)."""

    loss: float
    tensor: float


# One rounding is 2^-24 in fp32, 2^-11 in fp16 and 2^-8 in bf16. Through two layers and back, some tens of them meet
# in a gradient; a CPU was measured at 3e-6, 3e-3 and 2.5e-2. A wrong formula is off by tenths, whatever the dtype.
TOLERANCES = {
    "float32": Tolerance(loss=1e-5, tensor=1e-4),
    "float16": Tolerance(loss=2e-3, tensor=1e-2),
    "bfloat16": Tolerance(loss=1e-2, tensor=5e-2),
}
TRAINED = ("loss", "gradients", "three steps")
"""What of ``compare`` comes from the layers that were trained with."""
# Codes: none may differ. No weight of the subject lies within 1e-6 of the middle between two codes (the script that
# computes the references refuses it), so that no rounding of a correct quantizer in fp32 can choose another one.
SCALE_TOLERANCE = 1e-6  # relative: a mean, a product and a sum in fp32
# A sum in fp32 may fall on the other side of the middle between two bf16 numbers once in some ten thousand weights.
UNEQUAL_SHARE = 1e-3
MAX_ULPS = 1.0
_SMALLEST = 2.0**-10  # where W and delta cancel, an ulp is that of this number
_MANTISSA_BITS = 7  # of bf16


@dataclass(frozen=True)
class Comparison:
    """One kind of value against its reference.

    Attributes:
        name: What was compared.
        ok: Whether ``value`` is within ``limit``.
        value: The largest error found; its kind is told in ``detail``.
        limit: What it may be.
        detail: For people, with the tensor that is worst.
    """

    name: str
    ok: bool
    value: float
    limit: float
    detail: str


def compare(measured: Measured, reference: Reference) -> tuple[Comparison, ...]:
    """Every kind of value that was measured, in the order in which it is computed: the first that fails says most."""
    misfits = _misfits(measured, reference)
    if misfits:
        detail = f"{len(misfits)} tensors are missing, added or of another shape: {misfits[0]}"
        return (Comparison("tensors", False, float(len(misfits)), 0.0, detail),)
    tolerance = TOLERANCES[measured.compute_dtype]
    start = subject.adapter_weights()
    changes, expected_changes = (
        {name: after[name] - before for name, before in start.items()}
        for after in (measured.adapter, reference.adapter)
    )
    return (
        _codes(measured.codes, reference.codes),
        _block_scales(measured.scales, reference.scales),
        _losses(measured.losses, reference.losses, tolerance.loss),
        _tensors("gradients", measured.gradients, reference.gradients, tolerance.tensor),
        _tensors("three steps", changes, expected_changes, tolerance.tensor),
        _merged(measured, reference),
        _copied(measured.merged),
    )


def _misfits(measured: Measured, reference: Reference) -> list[str]:
    """Names that only one side has, or with another shape."""
    merged_shapes = {name: weight.shape for name, weight in subject.base_weights().items()}
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [
        (_shapes(measured.codes), _shapes(reference.codes)),
        (_shapes(measured.scales), _shapes(reference.scales)),
        (_shapes(measured.gradients), _shapes(reference.gradients)),
        (_shapes(measured.adapter), _shapes(reference.adapter)),
        (_shapes(measured.merged), merged_shapes),
        ({"losses": len(measured.losses)}, {"losses": len(reference.losses)}),
    ]
    return [name for found, known in pairs for name in sorted({*found, *known}) if found.get(name) != known.get(name)]


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _codes(measured: Tensors, expected: Tensors) -> Comparison:
    unequal = {name: int((measured[name] != expected[name]).sum()) for name in expected}
    count = sum(codes.size for codes in expected.values())
    different = sum(unequal.values())
    detail = f"{count - different:,} of {count:,} equal"
    if different:
        detail += f"; most differ in {max(unequal, key=unequal.__getitem__)}"
    return Comparison("NF4 codes", different == 0, different, 0, detail)


def _block_scales(measured: Mapping[str, Floats], expected: Mapping[str, Floats]) -> Comparison:
    errors = {name: float(np.abs(measured[name] / expected[name] - 1).max()) for name in expected}
    return _worst("NF4 scales", errors, SCALE_TOLERANCE)


def _losses(measured: tuple[float, ...], expected: tuple[float, ...], limit: float) -> Comparison:
    errors = [abs(found / wanted - 1) for found, wanted in zip(measured, expected, strict=True)]
    worst = int(np.argmax(errors))  # NaN counts as the largest
    detail = (
        f"{measured[worst]:.6f} at step {worst + 1}, expected {expected[worst]:.6f}: {_within(errors[worst], limit)}"
    )
    return Comparison("loss", errors[worst] <= limit, errors[worst], limit, detail)


def _tensors(name: str, measured: Mapping[str, Floats], expected: Mapping[str, Floats], limit: float) -> Comparison:
    errors = {
        key: float(np.linalg.norm(measured[key] - tensor) / np.linalg.norm(tensor)) for key, tensor in expected.items()
    }
    return _worst(name, errors, limit)


def _worst(name: str, errors: Mapping[str, float], limit: float) -> Comparison:
    worst = list(errors)[int(np.argmax(list(errors.values())))]
    value = errors[worst]
    detail = _within(value, limit)
    if not value <= limit:
        detail += f" in {worst}; {sum(not error <= limit for error in errors.values())} of {len(errors)} tensors"
    return Comparison(name, value <= limit, value, limit, detail)


def _within(value: float, limit: float) -> str:
    return f"relative error {value:.1e}, at most {limit:.0e}"


def _merged(measured: Measured, reference: Reference) -> Comparison:
    """The written weights against W + alpha/r · B·A in fp64, W from the references, A and B as the device trained them.

    So what the merge does is judged alone: errors of the training are reported above.
    """
    scaling = subject.LORA_ALPHA / subject.R
    unequal, ulps, count = 0, {}, 0
    for module in reference.codes:
        a, b = (measured.adapter[f"{module}.lora_{letter}"] for letter in "AB")
        expected = round_to_bf16(reference.dequantized(module) + scaling * b @ a)
        difference = np.abs(measured.merged[f"{module}.weight"] - expected)
        unequal += int((difference != 0).sum())  # NaN is unequal too
        ulps[module] = float((difference / _ulp(expected)).max())
        count += expected.size
    worst = list(ulps)[int(np.argmax(list(ulps.values())))]
    ok = unequal <= UNEQUAL_SHARE * count and ulps[worst] <= MAX_ULPS
    detail = f"{count - unequal:,} of {count:,} equal"
    if unequal:
        detail += f"; at most {ulps[worst]:.3g} ulp" + ("" if ok else f", in {worst}")
    return Comparison("merged weights", ok, unequal / count, UNEQUAL_SHARE, detail)


def _copied(merged: Mapping[str, Floats]) -> Comparison:
    """Norms, biases, embedding and head come out of a merge as they went in."""
    adapted = {f"{module}.weight" for module in subject.linear_shapes()}
    others = {name: weight for name, weight in subject.base_weights().items() if name not in adapted}
    changed = [name for name, weight in others.items() if not np.array_equal(merged[name], weight)]
    detail = f"{len(others) - len(changed)} of {len(others)} tensors equal" + (f"; not {changed[0]}" if changed else "")
    return Comparison("unmerged rest", not changed, len(changed), 0, detail)


def round_to_bf16(values: Floats) -> Floats:
    """The nearest bf16 number to each value, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    lowest_kept = bits >> np.uint32(16) & np.uint32(1)
    rounded = bits + np.uint32(0x7FFF) + lowest_kept & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def _ulp(values: Floats) -> Floats:
    exponents = np.floor(np.log2(np.maximum(np.abs(values), _SMALLEST)))
    return np.exp2(exponents - _MANTISSA_BITS)
