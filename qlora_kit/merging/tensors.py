"""The tensors of a merge, computed from base and adapter a block of rows at a time, in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from math import gcd, prod
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint import TensorSource, TensorSpec, read_numbers, torch_dtype
from qlora_kit.errors import AdapterError, BaseModelError
from qlora_kit.four_bit import dequantize
from qlora_kit.merging.arithmetic import all_finite, lora_delta
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.round_trip import BLOCK_SIZE, CodeTable, block_absmax, block_scales, code_table, round_trip
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState

BLOCK_NUMBERS = 1 << 20


@dataclass(frozen=True)
class LoraFactors:
    """One adapted layer: a (r, in_features), b (out_features, r), the factor before B·A; DoRA's magnitude (out,).

    All on the device where products are computed.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None

    def added_to(self, weight: torch.Tensor, start: int) -> torch.Tensor:
        """Rows ``start`` on of the adapted weight: W + Δ, and for DoRA each row scaled to its magnitude; fp32, CPU.

        Args:
            weight: These rows before the adapter: (n, in_features).
            start: The number of the first one.
        """
        import torch

        stop = start + weight.shape[0]
        delta = lora_delta(self.a, self.b[start:stop], self.scaling)  # (n, in_features)
        total = delta.add_(weight.to(delta.device))
        if self.magnitude is None:
            return total.cpu()
        # Liu et al. 2024, https://arxiv.org/abs/2402.09353, in PEFT's order.
        factor = self.magnitude[start:stop] / torch.linalg.norm(total, dim=1)
        return total.mul_(factor.view(-1, 1)).cpu()


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one tensor.

    Attributes:
        start: The number of the first one.
        used: Before the adapter: in fp32 what went through 4 bits, else as in the file. None where the base has none.
        merged: With the adapter; None where it does not touch the tensor.
    """

    start: int
    used: torch.Tensor | None
    merged: torch.Tensor | None

    @property
    def result(self) -> torch.Tensor:
        """With the adapter where it touches them."""
        found = self.used if self.merged is None else self.merged
        if found is None:
            raise ValueError("rows of nothing")
        return found


class MergeTensors:
    """Base and adapter of a plan, opened to compute tensors from them. Use it as a context manager.

    Args:
        plan: The merge.
        four_bit: Whether the weights that 4-bit layers hold go through their round trip.
        with_adapter: Whether the adapter is added.
    """

    def __init__(self, plan: MergePlan, *, four_bit: bool, with_adapter: bool = True) -> None:
        self.plan = plan
        self.four_bit = four_bit
        self.with_adapter = with_adapter and plan.adapter is not None
        self._exit = ExitStack()
        self._source = self._exit.enter_context(TensorSource(plan.base.path))
        if self.with_adapter:
            self._adapter = AdapterTensors(plan)
            self._exit.callback(self._adapter.close)
        self._held: tuple[str, Any] = ("", None)  # what the tensor at hand needs as a whole
        self._table: CodeTable | None = None

    def __enter__(self) -> MergeTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._exit.close()

    def __contains__(self, name: object) -> bool:
        return name in (self.plan.specs if self.with_adapter else self.plan.base_specs)

    def blocks(self, name: str) -> Iterator[Rows]:
        """The tensor ``name`` from its first row to its last, about a million numbers at a time.

        Raises:
            BaseModelError: The base cannot be read, or is not finite.
            AdapterError: What the adapter brings is not finite in the dtype of the tensor.
        """
        spec = self.spec(name)
        for start, stop in row_blocks(spec, self._unit(name)):
            yield self._rows(name, start, stop)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Some rows of a tensor that is not quantized, in fp32: (len(ids), ...)."""
        import torch

        return torch.cat([self._rows(name, row, row + 1).result.float() for row in ids])

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape that the tensor is written with."""
        return (self.plan.specs if self.with_adapter else self.plan.base_specs)[name]

    def _rows(self, name: str, start: int, stop: int) -> Rows:
        plan = self.plan
        if not self.with_adapter:
            return Rows(start, self._base_rows(name, start, stop), None)
        replacement = plan.replaced.get(name)
        if replacement is not None:
            values = self._adapter.rows(replacement, start, stop)
            self._require_finite_rows(name, values)
            has_base = name in plan.base_specs and stop <= plan.base_specs[name].shape[0]
            return Rows(start, self._base_rows(name, start, stop) if has_base else None, values)
        used = self._base_rows(plan.copied_from.get(name, name), start, stop)
        if name in plan.token_rows:
            return Rows(start, used, self._with_trained_rows(name, used, start))
        target = plan.target(name)
        if target is None:
            return Rows(start, used, None)
        return Rows(start, used, self._adapter.factors(target).added_to(used.float(), start))

    def _base_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape = self.plan.base_specs[name].shape
        width = prod(shape[1:])
        first, last = start * width, stop * width
        if name in self.plan.packed:
            numbers = self._unpacked(name, first, last)
        else:
            numbers = self._source.numbers(name, first, last)
        if not all_finite(numbers):
            raise BaseModelError(
                f"{self._source.file(name)}: tensor {shown(name)} holds values that are NaN or infinite",
                expected="finite weights",
                fix="download the base again, or choose another one",
            )
        if self.four_bit and self.plan.is_quantized(name) and name not in self.plan.packed:
            absmax, scales = self._scales(name)
            part = slice(first // BLOCK_SIZE, -(-last // BLOCK_SIZE))
            numbers = round_trip(numbers, absmax[part], scales[part], self._code_table())
        return numbers.view(stop - start, *shape[1:])

    def _scales(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Absmax and scale of each block of the whole weight; computed once, when its first rows are asked for."""
        import torch

        if self._held[0] != name:
            spec = self.plan.base_specs[name]
            width = prod(spec.shape[1:])
            parts = [
                block_absmax(self._source.numbers(name, start * width, stop * width))
                for start, stop in row_blocks(spec, BLOCK_SIZE)
            ]
            absmax = torch.cat(parts)
            self._held = (name, (absmax, block_scales(absmax, self.plan.quantization)))
        scales: tuple[torch.Tensor, torch.Tensor] = self._held[1]
        return scales

    def _unpacked(self, name: str, first: int, last: int) -> torch.Tensor:
        """Numbers of a weight that the base's file holds in 4 bits, straight to fp32 as its layer dequantizes them.

        The dtype that the quantization state records is that of the weight before; rounding to it would be a rounding
        that no layer does.
        """
        import torch
        from bitsandbytes.functional import QuantState

        if self._held[0] != name:
            self._held = (name, unpacking_state(self._source, name, self.plan.packed[name].parts))
        whole: QuantState = self._held[1]
        part = QuantState(
            absmax=whole.absmax[first // whole.blocksize : -(-last // whole.blocksize)],
            shape=torch.Size((1, last - first)),
            code=whole.code,
            blocksize=whole.blocksize,
            quant_type=whole.quant_type,
            dtype=torch.float32,
        )
        return dequantize(self._source.numbers(name, first // 2, -(-last // 2)).view(-1, 1), part).view(-1)

    def _with_trained_rows(self, name: str, used: torch.Tensor, start: int) -> torch.Tensor:
        """``used`` with the rows among them that the adapter brings, in the dtype of the file."""
        rows = self.plan.token_rows[name]
        inside = [(place, row - start) for place, row in enumerate(rows.ids) if 0 <= row - start < used.shape[0]]
        if not inside:
            return used
        values = self._adapter.whole(self.plan.files.token_tensor(rows.module))
        chosen = values[[place for place, _ in inside]].to(used.dtype)
        self._require_finite_rows(name, chosen)
        merged = used.clone()
        merged[[row for _, row in inside]] = chosen
        return merged

    def _require_finite_rows(self, name: str, values: torch.Tensor) -> None:
        dtype = torch_dtype(self.plan.specs[name].dtype)
        if not all_finite(values.to(dtype)):
            raise AdapterError(
                f"the trained rows of {shown(name)} are not finite in {dtype}",
                expected="rows within the range of the base's dtype",
                fix="train with a smaller learning rate, or merge onto a bf16 copy of the base",
            )

    def _unit(self, name: str) -> int:
        """How many numbers belong together: a block of the quantizer."""
        if name in self.plan.packed:
            if self._held[0] != name:
                self._held = (name, unpacking_state(self._source, name, self.plan.packed[name].parts))
            size: int = self._held[1].blocksize
            return size
        return BLOCK_SIZE if self.four_bit and self.plan.is_quantized(name) else 1

    def _code_table(self) -> CodeTable:
        if self._table is None:
            self._table = code_table(self.plan.quantization.bnb_4bit_quant_type)
        return self._table


class AdapterTensors:
    """The adapter's tensors in fp32, read when they are asked for; the pair that was asked for last is kept."""

    def __init__(self, plan: MergePlan) -> None:
        self._plan = plan
        self._file = FileIO(plan.files.weights)
        self._pair: tuple[str, LoraFactors] | None = None

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def factors(self, module: str) -> LoraFactors:
        """The pair of ``module``."""
        if self._pair is None or self._pair[0] != module:
            files, device = self._plan.files, self._plan.device
            a, b = (self.whole(name).to(device) for name in files.pair_tensors(module))
            magnitude = self.whole(files.magnitude_tensor(module)).to(device) if files.config.use_dora else None
            self._pair = (module, LoraFactors(a, b, files.config.scaling_of(module), magnitude))
        return self._pair[1]

    def whole(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``."""
        info = self._plan.files.tensors[name]
        return read_numbers(self._file, info, 0, prod(info.shape)).float().view(info.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of the tensor ``name``."""
        info = self._plan.files.tensors[name]
        width = prod(info.shape[1:])
        return read_numbers(self._file, info, start * width, stop * width).float().view(stop - start, *info.shape[1:])


def row_blocks(spec: TensorSpec, unit: int = 1) -> Iterator[tuple[int, int]]:
    """First row and the one after the last of each block: about ``BLOCK_NUMBERS`` numbers, a multiple of ``unit``."""
    if not spec.shape:
        yield 0, 1
        return
    width = max(1, prod(spec.shape[1:]))
    step = max(1, BLOCK_NUMBERS // width)
    together = unit // gcd(width, unit)
    step = max(together, step - step % together)
    for start in range(0, spec.shape[0], step):
        yield start, min(start + step, spec.shape[0])


def unpacking_state(source: TensorSource, name: str, parts: Sequence[str]) -> QuantState:
    """The quantization state of a 4-bit weight in the base's files, its block scales dequantized to fp32."""
    import torch
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    values = {part.removeprefix(f"{name}."): source.get(part) for part in parts}
    state: QuantState = QuantState.from_dict(values, device=torch.device("cpu"))
    if state.nested:
        state.absmax = dequantize_blockwise(state.absmax, state.state2) + state.offset
        state.state2, state.nested = None, False
    state.absmax = state.absmax.float()
    return state
