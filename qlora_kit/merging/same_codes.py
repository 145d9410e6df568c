"""Whether a 16-bit model is what a base of 4-bit files was quantized from: its codes against those of a contract."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

from qlora_kit.adapters import AdapterContract, BaseFacts
from qlora_kit.adapters.contract_file import NF4_CODES
from qlora_kit.base_layout import BaseLayout
from qlora_kit.checkpoint import TensorSource
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import AdapterError, BaseModelError
from qlora_kit.four_bit import sampled_places
from qlora_kit.merging.round_trip import BLOCK_SIZE

_WEIGHT = ".weight"


def layout_of_codes(layout: BaseLayout, contract: AdapterContract, folder: Path) -> BaseLayout:
    """The 16-bit model's layout with the layers quantized that were 4-bit layers in training.

    Args:
        layout: Of the 16-bit model.
        contract: Of the adapter, trained on a base that was quantized already.
        folder: The adapter's, for messages.

    Raises:
        AdapterError: The contract has no samples of the codes, or the model lacks one of the layers.
    """
    modules = [name.removesuffix(_WEIGHT) for name in contract.quantization.get(NF4_CODES) or ()]
    missing = [name for name in modules if name not in layout.linear_shapes]
    if not modules or missing:
        what = f"the base has no layer {missing[0]!r}" if missing else "the contract holds no samples of 4-bit codes"
        raise AdapterError(
            f"{folder}: {what}, so the base cannot be compared with {contract.base.id}",
            expected=f"the 16-bit model that {contract.base.id} was quantized from",
            fix="give that model with --base, or merge --onto dequantized",
        )
    return replace(layout, quantized=frozenset(modules))


def require_same_codes(source: TensorSource, contract: AdapterContract, quantization: QuantizationSection) -> None:
    """Quantize what the contract samples of each weight's codes, and compare.

    Args:
        source: The 16-bit model.
        contract: Of the adapter.
        quantization: How its base was quantized.

    Raises:
        BaseModelError: Weights quantize to other codes.
    """
    samples = contract.quantization[NF4_CODES]
    different = [
        name
        for name, sample in samples.items()
        if sampled_codes(source, name, quantization.bnb_4bit_quant_type) != sample
    ]
    if different:
        share = f"{len(different)} of {len(samples)} weights"
        raise BaseModelError(
            f"{source.folder}: {share} quantize to other 4-bit codes than those of {contract.base.id}, the first is "
            f"{different[0]}",
            expected="the 16-bit model that the adapter's base was quantized from",
            fix="give that model with --base, or leave --base and --onto out to merge into the weights of training",
        )


def require_codes_of_training(
    source: TensorSource, contract: AdapterContract, quantization: QuantizationSection
) -> None:
    """Compare the codes that the contract samples with those that the base has, or quantizes to, here.

    Args:
        source: The base.
        contract: Of the adapter.
        quantization: How the base is quantized.

    Raises:
        AdapterError: The quantizer at hand gives other codes than the one of training.
    """
    names = [name for name in contract.quantization.get(NF4_CODES) or () if name in source]
    codes = {name: sampled_codes(source, name, quantization.bnb_4bit_quant_type) for name in names}
    base = contract.base
    contract.require_match(BaseFacts(base.id, fingerprint=base.fingerprint, quantization={NF4_CODES: codes}))


def sampled_codes(source: TensorSource, name: str, quant_type: str) -> str:
    """``four_bit.code_sample`` of a weight as bitsandbytes quantizes it, from the blocks that the sample lies in.

    Args:
        source: The base.
        name: Of the weight; one that its file holds in 4 bits is sampled as it is.
        quant_type: ``nf4`` or ``fp4``.
    """
    import torch
    from bitsandbytes.functional import quantize_4bit

    count = prod(source.shape(name))
    if source.dtype(name) == "U8":
        return bytes(int(source.numbers(name, place, place + 1)) for place in sampled_places(count)).hex()
    places = sampled_places(-(-count // 2))
    blocks = sorted({2 * place // BLOCK_SIZE for place in places})  # the last may be shorter, as the weight's last
    numbers = [
        source.numbers(name, block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, count)).float() for block in blocks
    ]
    codes, _ = quantize_4bit(torch.cat(numbers), blocksize=BLOCK_SIZE, quant_type=quant_type)
    packed, half = codes.reshape(-1), BLOCK_SIZE // 2
    return bytes(int(packed[blocks.index(place // half) * half + place % half]) for place in places).hex()
