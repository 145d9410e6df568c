"""Whether a 16-bit model is what a base of 4-bit files was quantized from: its codes against those of a contract."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qlora_kit.adapters import AdapterContract
from qlora_kit.adapters.contract_file import NF4_CODES
from qlora_kit.base_layout import BaseLayout
from qlora_kit.checkpoint import TensorSource
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import AdapterError, BaseModelError
from qlora_kit.four_bit import code_sample
from qlora_kit.merging.arithmetic import quantize_as_loaded

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
    """Quantize each weight whose codes the contract samples, one at a time, and compare.

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
        if code_sample(quantize_as_loaded(source.get(name), quantization)[0]) != sample
    ]
    if different:
        share = f"{len(different)} of {len(samples)} weights"
        raise BaseModelError(
            f"{source.folder}: {share} quantize to other 4-bit codes than those of {contract.base.id}, the first is "
            f"{different[0]}",
            expected="the 16-bit model that the adapter's base was quantized from",
            fix="give that model with --base, or leave --base and --onto out to merge into the weights of training",
        )
