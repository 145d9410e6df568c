"""Checks every written tensor, block by block, against a second evaluation from base and adapter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint import TensorSource, TensorSpec, torch_dtype
from qlora_kit.four_bit import dequantize
from qlora_kit.merging.arithmetic import half_ulp, sum_error
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.results import TensorCheck
from qlora_kit.merging.round_trip import BLOCK_SIZE
from qlora_kit.merging.tensors import Rows, row_blocks

if TYPE_CHECKING:
    import torch

_NORM_ERROR = 2.0**-18  # of a row's length in fp32, with much room; a step of bf16 is 2^-8
_TEXTS = {
    "merged": "{count} of {total} weights are further than one rounding from base + adapter",
    "round_trips": "the bytes are not its 4-bit round trip",
    "trained_rows": "the bytes are not the base's with the adapter's rows",
    "replaced": "the bytes are not the adapter's",
    "copied": "the bytes are not the base's",
}


class WrittenTensors:
    """The tensors of a written checkpoint by blocks of rows. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.source = TensorSource(folder)

    def __enter__(self) -> WrittenTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.source.close()

    def __contains__(self, name: object) -> bool:
        return name in self.source

    def spec(self, name: str) -> TensorSpec:
        """Its dtype and shape."""
        return self.source.spec(name)

    def blocks(self, name: str) -> Iterator[Rows]:
        """The tensor ``name`` from its first row to its last."""
        for start, stop in row_blocks(self.spec(name)):
            yield Rows(start, read_rows(self.source, name, start, stop), None)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Some rows in fp32: (len(ids), ...)."""
        import torch

        return torch.cat([read_rows(self.source, name, row, row + 1).float() for row in ids])


def read_rows(source: TensorSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Rows of a tensor, read without mapping: (stop - start, ...)."""
    shape = source.shape(name)
    width = prod(shape[1:])
    return source.numbers(name, start * width, stop * width).view(stop - start, *shape[1:])


def check_tensors(plan: MergePlan, folder: Path) -> TensorCheck:
    """Compare every tensor in ``folder`` with what base and adapter make.

    What is compared with is computed in another way than what was written: bitsandbytes' own quantizer, PEFT's formula
    of Δ (and of DoRA, with the rows' lengths in fp64) in plain torch, safetensors' own reader for the adapter.
    ``verify_merge`` gives the bounds.

    Raises:
        BaseModelError: Base or output cannot be read.
    """
    counts: Counter[str] = Counter()
    violations = []
    with TensorSource(plan.base.path) as source, TensorSource(folder) as written:
        violations += [f"{name}: is in one of base and output only" for name in plan.specs.keys() ^ set(written.names)]
        for name, spec in plan.specs.items():
            if name not in written:
                continue
            if spec != written.spec(name):
                violations.append(f"{name}: is {written.spec(name)}, not {spec}")
                continue
            kind = _kind(plan, name)
            counts[kind] += 1
            wrong = sum(_wrong_numbers(plan, name, source, written))
            if wrong:
                violations.append(f"{name}: {_TEXTS[kind].format(count=wrong, total=prod(spec.shape))}")
    return TensorCheck(**{kind: counts[kind] for kind in _TEXTS}, violations=tuple(violations))


def _kind(plan: MergePlan, name: str) -> str:
    if name in plan.replaced:
        return "replaced"
    if name in plan.token_rows:
        return "trained_rows"
    if plan.target(name) is not None:
        return "merged"
    return "round_trips" if plan.round_trips(name) else "copied"


def _adapter_tensor(plan: MergePlan, name: str, rows: slice | None = None) -> torch.Tensor:
    """A tensor of the adapter by safetensors, which maps the file: opened anew, so that nothing of it stays mapped."""
    from safetensors import safe_open

    with safe_open(plan.files.weights, framework="pt", device="cpu") as adapter:
        tensor: torch.Tensor = adapter.get_tensor(name) if rows is None else adapter.get_slice(name)[rows]
    return tensor


def _wrong_numbers(plan: MergePlan, name: str, source: TensorSource, written: TensorSource) -> Iterator[int]:
    """How many numbers of each block are wrong."""
    spec, kind = plan.specs[name], _kind(plan, name)
    dtype = torch_dtype(spec.dtype)
    base = plan.copied_from.get(name, name)
    if kind == "replaced":
        for start, stop in row_blocks(spec):
            values = _adapter_tensor(plan, plan.replaced[name], slice(start, stop) if spec.shape else None)
            yield _different(read_rows(written, name, start, stop), values.float().to(dtype))
        return
    used = _QuantizedAgain(plan, source, base) if plan.round_trips(base) else None
    check = _merged_check(plan, name) if kind == "merged" else None
    for start, stop in row_blocks(spec, 1 if used is None else used.unit):
        found = read_rows(written, name, start, stop)
        before = read_rows(source, base, start, stop) if used is None else used.rows(start, stop)
        if check is not None:
            yield check(found, before.float(), start)
        elif kind == "trained_rows":
            yield _different(found, _with_rows(plan, name, before.clone(), start))
        elif kind == "round_trips":  # bitsandbytes gives FP4's second zero either sign, by the size of the weight
            yield _different(found + 0.0, before.to(dtype) + 0.0)
        else:
            yield _different(found, before)


def _different(found: torch.Tensor, expected: torch.Tensor) -> int:
    import torch

    found, expected = (values.contiguous().reshape(-1).view(torch.uint8) for values in (found, expected))
    return 0 if torch.equal(found, expected) else max(1, int((found != expected).sum()))


def _with_rows(plan: MergePlan, name: str, block: torch.Tensor, start: int) -> torch.Tensor:
    rows = plan.token_rows[name]
    values = _adapter_tensor(plan, plan.files.token_tensor(rows.module)).float().to(block.dtype)
    for place, row in enumerate(rows.ids):
        if 0 <= row - start < block.shape[0]:
            block[row - start] = values[place]
    return block


def _merged_check(plan: MergePlan, name: str) -> Any:
    """Counts the numbers of a block (found, before, its first row) that are not before + Δ within the bound."""
    module = name.removesuffix(".weight")
    a, b = (_adapter_tensor(plan, tensor).float() for tensor in plan.files.pair_tensors(module))
    scaling = plan.files.config.scaling_of(module)
    magnitude = None
    if plan.files.config.use_dora:
        magnitude = _adapter_tensor(plan, plan.files.magnitude_tensor(module)).double()
    dtype = torch_dtype(plan.specs[name].dtype)

    def wrong(found: torch.Tensor, before: torch.Tensor, start: int) -> int:
        part = b[start : start + len(found)]
        expected = before + (part @ a) * scaling
        arithmetic = sum_error(before, a, part, scaling)
        if magnitude is not None:
            lengths = expected.double().norm(dim=1)
            factor = (magnitude[start : start + len(found)] / lengths).float().view(-1, 1)
            expected = factor * expected
            arithmetic = factor.abs() * arithmetic + _NORM_ERROR * expected.abs()
        bound = half_ulp(expected.abs() + arithmetic, dtype) + arithmetic
        return int((~((found.float() - expected).abs() <= bound)).sum())  # written so that NaN is wrong

    return wrong


class _QuantizedAgain:
    """A weight as bitsandbytes itself quantizes it, or as the base's file holds it, dequantized by blocks of rows."""

    def __init__(self, plan: MergePlan, source: TensorSource, name: str) -> None:
        import torch

        self._width = prod(plan.base_specs[name].shape[1:])
        self._whole: torch.Tensor | None = None
        self.unit = BLOCK_SIZE
        if name in plan.packed:
            self._whole = _unpacked_whole(plan, source, name)
            return
        self._quant_type = plan.quantization.bnb_4bit_quant_type
        self._codes: dict[int, torch.Tensor] = {}
        largest = []
        for start, stop in row_blocks(plan.base_specs[name], BLOCK_SIZE):
            codes, absmax = self._quantized(read_rows(source, name, start, stop).float())
            self._codes[start] = codes
            largest.append(absmax)
        self._absmax = torch.cat(largest)
        if plan.quantization.bnb_4bit_use_double_quant:
            self._absmax = _nested(self._absmax)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """These rows in fp32; they must be a block of ``row_blocks``."""
        import torch
        from bitsandbytes.functional import QuantState, get_4bit_type

        if self._whole is not None:
            return self._whole[start:stop]
        first, last = start * self._width, stop * self._width
        state = QuantState(
            absmax=self._absmax[first // BLOCK_SIZE : -(-last // BLOCK_SIZE)],
            shape=torch.Size((stop - start, self._width)),
            code=get_4bit_type(self._quant_type, device="cpu"),
            blocksize=BLOCK_SIZE,
            quant_type=self._quant_type,
            dtype=torch.float32,
        )
        return dequantize(self._codes[start], state)

    def _quantized(self, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from bitsandbytes.functional import quantize_4bit

        codes, state = quantize_4bit(block, blocksize=BLOCK_SIZE, quant_type=self._quant_type)
        return codes, state.absmax


def _nested(absmax: torch.Tensor) -> torch.Tensor:
    """Block scales after double quantization, as ``quantize_4bit`` and ``dequantize_4bit`` do it together."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = absmax.mean()
    codes, state = quantize_blockwise(absmax - offset, blocksize=256)
    again = dequantize_blockwise(codes, state)
    again += offset
    return again


def _unpacked_whole(plan: MergePlan, source: TensorSource, name: str) -> torch.Tensor:
    import torch
    from bitsandbytes.functional import QuantState

    parts = {part.removeprefix(f"{name}."): source.get(part) for part in plan.packed[name].parts}
    state = QuantState.from_dict(parts, device=torch.device("cpu"))
    state.dtype = torch.float32
    return dequantize(source.get(name), state)
