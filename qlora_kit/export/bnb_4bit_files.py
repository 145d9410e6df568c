"""Writes a 16-bit checkpoint as bitsandbytes' own 4-bit files, a tensor at a time, and reads these back.

The layout is what transformers writes when a model that bitsandbytes quantized is saved (``prequantized`` describes
it), so that ``from_pretrained`` takes the codes as they are and quantizes nothing again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from qlora_kit.base_files import BaseRef
from qlora_kit.base_layout import read_layout, require_described_packing
from qlora_kit.checkpoint import ShardWriter, TensorSource, TensorSpec, require_free_space
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import BaseModelError, GuardError
from qlora_kit.export.source import Progress
from qlora_kit.four_bit import dequantize
from qlora_kit.merging.arithmetic import all_finite
from qlora_kit.merging.input_checks import SMALL_FILES_BYTES, WEIGHT_DTYPES
from qlora_kit.merging.round_trip import BLOCK_SIZE, block_absmax, block_scales, code_table, round_trip
from qlora_kit.merging.tensor_check import read_rows
from qlora_kit.merging.tensors import Rows, row_blocks, unpacking_state
from qlora_kit.merging.writing import COPIED_FILES, write_json
from qlora_kit.prequantized import NESTED_BLOCK_SIZE, STATE, PackedWeight, QuantType, read_packed_weights
from qlora_kit.safetensors_header import locate_tensors, shown
from qlora_kit.shard_writer import DEFAULT_SHARD_BYTES

if TYPE_CHECKING:
    import torch

_DESCRIPTION_BYTES = 320  # bitsandbytes' own take 150 to 200
_BYTES_PER_WEIGHT = 0.57  # half a byte of codes and, without double quantization, 4 bytes for a block of 64


@dataclass(frozen=True)
class WrittenFourBit:
    """What was written: how many weights became 4-bit ones, and the size of all tensors."""

    quantized: int
    weight_bytes: int


def write_bnb_4bit(
    model: Path,
    folder: Path,
    *,
    quant_type: QuantType,
    double_quant: bool,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> WrittenFourBit:
    """Quantize the checkpoint in ``model`` into ``folder``, with one tensor at a time in memory.

    Which weights are quantized is asked of transformers' own quantizer: what it would quantize while loading.

    Args:
        model: A 16-bit checkpoint.
        folder: An existing folder.
        quant_type: The 4-bit codes.
        double_quant: Quantize the block scales too.
        max_shard_bytes: Files hold at most so many bytes of tensors.
        progress: Called with the bytes of the source done and in all, after each tensor.

    Raises:
        BaseModelError: The checkpoint is incomplete, or holds weights that are not finite.
        OutputError: The output does not fit the disk.
    """
    ref = BaseRef(str(model), model)
    layout = read_layout(ref)
    with TensorSource(model) as source:
        names = _quantized_names(source, layout.quantized)
        kept = sum(source.spec(name).size_bytes for name in source.names if name not in names)
        weights = sum(prod(source.shape(name)) for name in names)
        require_free_space(folder, kept + int(_BYTES_PER_WEIGHT * weights) + SMALL_FILES_BYTES)
        specs = _output_specs(source, names, quant_type, double_quant)
        done = 0
        with ShardWriter(folder, specs, max_shard_bytes=max_shard_bytes) as writer:
            for name in source.names:
                for part, tensor in _parts(source, name, name in names, quant_type, double_quant):
                    writer.write(part, tensor)
                done += source.spec(name).size_bytes
                if progress is not None:
                    progress(done, source.total_bytes)
    _write_small_files(model, folder, quant_type=quant_type, double_quant=double_quant)
    return WrittenFourBit(len(names), sum(spec.size_bytes for spec in specs.values()))


def require_same_weights(model: Path, folder: Path, *, quant_type: QuantType, double_quant: bool) -> int:
    """Read the written files back and compare them with the checkpoint; returns how many weights are in 4 bits.

    Each 4-bit weight must dequantize to its round trip by the kit's own arithmetic (``merging.round_trip``), bit by
    bit; every other tensor must have the checkpoint's bytes.

    Raises:
        GuardError: They are not whole, or a tensor is wrong.
    """
    fix = "export again; if it fails again, the disk, the memory or a library version is at fault"
    try:
        require_described_packing(BaseRef(folder.name, folder))
        packed = read_packed_weights(locate_tensors(folder, error=BaseModelError))
        settings = QuantizationSection(bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant)
        with TensorSource(model) as source, FourBitTensors(folder) as written:
            wrong = [
                name
                for name in source.names
                if name not in written or not _is_same(source, written, name, name in packed, settings)
            ]
    except BaseModelError as error:
        what = f"{folder.name}: what was written cannot be read back: {error.faults[0].what}"
        raise GuardError(what, expected="a complete 4-bit checkpoint", fix=fix) from error
    if wrong:
        what = f"{folder.name}: {len(wrong)} tensors are not those of the checkpoint, the first is {shown(wrong[0])}"
        raise GuardError(what, expected="each weight's 4-bit round trip, and every other tensor as it was", fix=fix)
    return len(packed)


def _is_same(
    source: TensorSource, written: FourBitTensors, name: str, is_packed: bool, settings: QuantizationSection
) -> bool:
    import torch

    before = source.get(name)
    if not is_packed:
        after = written.whole(name)
        return before.dtype == after.dtype and torch.equal(before, after)
    numbers = before.reshape(-1)
    absmax = block_absmax(numbers)
    scales = block_scales(absmax, settings)
    expected = round_trip(numbers, absmax, scales, code_table(settings.bnb_4bit_quant_type))
    return torch.equal(expected.view(before.shape), written.whole(name))


class FourBitTensors:
    """The tensors of a 4-bit checkpoint, dequantized to fp32 as its layers compute. Use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._source = TensorSource(folder)
        self._packed: Mapping[str, PackedWeight] = read_packed_weights(locate_tensors(folder, error=BaseModelError))

    def __enter__(self) -> FourBitTensors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._source.close()

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def spec(self, name: str) -> TensorSpec:
        """Its dtype (fp32 where it is dequantized) and shape."""
        return TensorSpec("F32", self._packed[name].shape) if name in self._packed else self._source.spec(name)

    def blocks(self, name: str) -> Iterator[Rows]:
        """The tensor ``name`` from its first row to its last; a 4-bit weight as a whole."""
        if name in self._packed:
            yield Rows(0, self.whole(name), None)
            return
        for start, stop in row_blocks(self.spec(name)):
            yield Rows(start, read_rows(self._source, name, start, stop), None)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Some rows in fp32: (len(ids), ...)."""
        import torch

        if name in self._packed:
            return self.whole(name)[list(ids)]
        return torch.cat([read_rows(self._source, name, row, row + 1).float() for row in ids])

    def whole(self, name: str) -> torch.Tensor:
        """The whole tensor: a 4-bit weight in fp32, any other as in the file."""
        import torch

        if name not in self._packed:
            return self._source.get(name)
        state = unpacking_state(self._source, name, self._packed[name].parts)
        state.dtype = torch.float32
        return dequantize(self._source.get(name), state)


def _quantized_names(source: TensorSource, modules: frozenset[str]) -> frozenset[str]:
    names = frozenset(f"{module}.weight" for module in modules)
    wrong = sorted(name for name in names if name not in source or source.dtype(name) not in WEIGHT_DTYPES)
    if wrong:
        raise BaseModelError(
            f"{source.folder}: {len(wrong)} weights are missing or of another dtype, the first is {shown(wrong[0])}",
            expected=f"every linear weight, in one of {', '.join(WEIGHT_DTYPES)}",
            fix="give the complete checkpoint of an architecture whose tensors are named as its modules",
        )
    return names


def _output_specs(
    source: TensorSource, names: frozenset[str], quant_type: QuantType, double_quant: bool
) -> dict[str, TensorSpec]:
    """Dtype and shape of every output tensor, in the source's order."""
    specs: dict[str, TensorSpec] = {}
    for name in source.names:
        spec = source.spec(name)
        if name not in names:
            specs[name] = spec
            continue
        numbers = prod(spec.shape)
        blocks = -(-numbers // BLOCK_SIZE)
        specs[name] = TensorSpec("U8", (-(-numbers // 2), 1))
        specs[f"{name}.absmax"] = TensorSpec("U8" if double_quant else "F32", (blocks,))
        specs[f"{name}.quant_map"] = TensorSpec("F32", (16,))
        if double_quant:
            specs[f"{name}.nested_absmax"] = TensorSpec("F32", (-(-blocks // NESTED_BLOCK_SIZE),))
            specs[f"{name}.nested_quant_map"] = TensorSpec("F32", (256,))
        specs[f"{name}.{STATE}{quant_type}"] = TensorSpec("U8", (_DESCRIPTION_BYTES,))
    return specs


def _parts(
    source: TensorSource, name: str, quantized: bool, quant_type: QuantType, double_quant: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    tensor = read_rows(source, name, 0, source.shape(name)[0]) if source.shape(name) else source.get(name)
    if not all_finite(tensor):
        raise BaseModelError(
            f"{source.file(name)}: tensor {shown(name)} holds values that are NaN or infinite",
            expected="finite weights",
            fix="merge again, or choose another base",
        )
    if not quantized:
        yield name, tensor
        return
    yield from _quantized_parts(name, tensor, quant_type, double_quant).items()


def _quantized_parts(
    name: str, weight: torch.Tensor, quant_type: QuantType, double_quant: bool
) -> dict[str, torch.Tensor]:
    """Codes and quantization state as transformers saves them, by their names; bitsandbytes' own quantizer."""
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=BLOCK_SIZE, compress_statistics=double_quant, quant_type=quant_type)
    parts: dict[str, Any] = state.as_dict(packed=True)
    described = f"{STATE}{quant_type}"
    parts[described] = _padded(parts[described])
    return {name: codes, **{f"{name}.{part}": tensor for part, tensor in parts.items()}}


def _padded(description: torch.Tensor) -> torch.Tensor:
    """JSON as bytes, with spaces behind it: its length would else depend on the weight, and headers come first."""
    import torch

    missing = _DESCRIPTION_BYTES - len(description)
    return torch.cat([description, torch.full((missing,), ord(" "), dtype=torch.uint8)])


def _write_small_files(model: Path, folder: Path, *, quant_type: QuantType, double_quant: bool) -> None:
    from transformers import BitsAndBytesConfig

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    write_json(folder / "config.json", {**config, "quantization_config": settings.to_dict()})
    for name in COPIED_FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)
