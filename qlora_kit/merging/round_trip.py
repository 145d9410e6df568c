"""The 4-bit round trip of a weight, block by block: numbers in, what a 4-bit layer computes with out, bit by bit.

bitsandbytes' quantizer needs whole tensors, several times their size in memory, and a search for each number. Here a
number's code is how many of the 15 midpoints between neighbouring values lie below it: fifteen comparisons that numpy
runs on many numbers at once. The values are those of NF4 (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314) or
FP4 as bitsandbytes has them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config import QuantizationSection

if TYPE_CHECKING:
    import numpy as np
    import torch

BLOCK_SIZE = 64  # transformers leaves Params4bit's own default
_NESTED_BLOCK_SIZE = 256
_SMALLEST_SCALE = 1e-38  # what bitsandbytes divides a block of zeros by
_CHUNK = 1 << 17  # numbers at a time in one thread: 0.5 MB in fp32 stay in a core's cache
_MAX_THREADS = 8


@dataclass(frozen=True)
class CodeTable:
    """The values of a 4-bit type.

    Attributes:
        midpoints: Between neighbouring values, ascending: (15,) fp32.
        pairs: The values of two codes that stand side by side as bytes, as one 64-bit number: (4096,), the index is the
            first code plus 256 times the second.
    """

    midpoints: np.ndarray[Any, np.dtype[np.float32]]
    pairs: np.ndarray[Any, np.dtype[np.complex64]]


def code_table(quant_type: str) -> CodeTable:
    """The table of ``nf4`` or ``fp4``, its values as bitsandbytes itself decodes them."""
    import numpy as np
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    code = get_4bit_type(quant_type, device="cpu", blocksize=BLOCK_SIZE)
    order = torch.argsort(code)  # NF4 ascends; FP4 has its negative numbers behind
    midpoints = (code[order[:-1]] + code[order[1:]]) / 2
    packed = (order * 16).to(torch.uint8).reshape(-1, 1)  # each code in a byte, with code 0 beside it
    state = QuantState(
        absmax=torch.ones(1),
        shape=torch.Size((1, 2 * len(code))),
        code=code,
        blocksize=BLOCK_SIZE,
        quant_type=quant_type,
        dtype=torch.float32,
    )
    values = dequantize_4bit(packed, state).reshape(-1)[::2].numpy()
    pairs = np.zeros((len(values), 256, 2), dtype=np.float32)
    pairs[:, : len(values), 0] = values[None, :]
    pairs[:, : len(values), 1] = values[:, None]
    return CodeTable(midpoints.numpy(), pairs.reshape(-1).view(np.complex64))


def block_absmax(numbers: torch.Tensor) -> torch.Tensor:
    """The largest magnitude in each block of 64: fp32, (blocks,).

    Args:
        numbers: (n,), fp16, bf16 or fp32; the last block may be shorter.
    """
    import torch

    whole = len(numbers) - len(numbers) % BLOCK_SIZE
    # Without their sign bit, the bits of floats are ordered as the floats are, and integers have a fast maximum.
    bits, mask = (torch.int16, 0x7FFF) if numbers.element_size() == 2 else (torch.int32, 0x7FFF_FFFF)
    blocks = (numbers[:whole].view(bits) & mask).view(-1, BLOCK_SIZE)
    absmax = blocks.amax(-1).view(numbers.dtype).float()
    if whole == len(numbers):
        return absmax
    rest = numbers[whole:].float().abs().amax().clamp(min=_SMALLEST_SCALE)
    return torch.cat([absmax, rest.reshape(1)])


def block_scales(absmax: torch.Tensor, quantization: QuantizationSection) -> torch.Tensor:
    """What each block's values are multiplied with: its ``absmax``, quantized too if ``quantization`` says so.

    Args:
        absmax: Of the whole weight, (blocks,) fp32: double quantization subtracts one mean from all of them.
        quantization: ``bnb_4bit_use_double_quant``.
    """
    if not quantization.bnb_4bit_use_double_quant:
        return absmax
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    mean = absmax.mean()
    return dequantize_blockwise(*quantize_blockwise(absmax - mean, blocksize=_NESTED_BLOCK_SIZE)) + mean


def round_trip(numbers: torch.Tensor, absmax: torch.Tensor, scales: torch.Tensor, table: CodeTable) -> torch.Tensor:
    """Quantize ``numbers`` and dequantize them: fp32, (n,), the bits that bitsandbytes' own pair of functions gives.

    Args:
        numbers: (n,), any float dtype; whole blocks, but for the last of a weight.
        absmax: ``block_absmax`` of them: (blocks,).
        scales: The ``block_scales`` of these blocks: (blocks,).
        table: Of the 4-bit type.
    """
    import torch

    source = numbers.float().numpy()
    result = torch.empty(len(source) + len(source) % 2, dtype=torch.float32)
    out, largest, factors = result.numpy(), absmax.numpy(), scales.numpy()

    def run(start: int) -> None:
        stop = min(start + _CHUNK, len(source))
        first, last = start // BLOCK_SIZE, -(-stop // BLOCK_SIZE)
        _round_trip_chunk(
            source[start:stop], largest[first:last], factors[first:last], table, out[start : stop + stop % 2]
        )

    starts = range(0, len(source), _CHUNK)
    threads = min(torch.get_num_threads(), len(starts), _MAX_THREADS)
    if threads <= 1:
        for start in starts:
            run(start)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, starts))
    return result[: len(source)]


def _round_trip_chunk(source: Any, absmax: Any, scales: Any, table: CodeTable, out: Any) -> None:
    """One chunk of ``round_trip``, into ``out``, which has an even length."""
    import numpy as np

    count = len(source)
    whole = count - count % BLOCK_SIZE
    blocks = whole // BLOCK_SIZE
    smallest = np.float32(_SMALLEST_SCALE)
    scaled = np.zeros(len(out), dtype=np.float32)
    inverse = np.float32(1) / np.maximum(absmax[:blocks], smallest)
    np.multiply(source[:whole].reshape(-1, BLOCK_SIZE), inverse[:, None], out=scaled[:whole].reshape(-1, BLOCK_SIZE))
    if whole < count:
        scaled[whole:count] = source[whole:] / np.maximum(absmax[blocks], smallest)
    codes = np.zeros(len(out), dtype=np.uint8)
    above = np.empty(len(out), dtype=np.bool_)
    for midpoint in table.midpoints:
        np.greater(scaled, midpoint, out=above)
        np.add(codes, above.view(np.uint8), out=codes)
    np.take(table.pairs, codes.view(np.uint16), out=out.view(np.complex64), mode="clip")
    values = out[:whole].reshape(-1, BLOCK_SIZE)
    np.multiply(values, scales[:blocks, None], out=values)
    if whole < count:
        out[whole:count] *= scales[blocks]
