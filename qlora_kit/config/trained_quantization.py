"""How an adapter's contract says that its base was quantized, as the configuration that loads it so again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.config.sections import QuantizationSection
from qlora_kit.errors import AdapterError


def trained_quantization(contract_file: Path, trained: Mapping[str, Any]) -> QuantizationSection:
    """The quantization of a base that the contract's ``quantization`` describes.

    Args:
        contract_file: Where it was read from, for the message.
        trained: ``AdapterContract.quantization``.

    Raises:
        AdapterError: It describes no quantization that bitsandbytes has.
    """
    if not trained["load_in_4bit"]:
        return QuantizationSection(load_in_4bit=False)
    kind, double = trained.get("bnb_4bit_quant_type"), trained.get("bnb_4bit_use_double_quant")
    if kind not in ("nf4", "fp4") or not isinstance(double, bool):
        raise AdapterError(
            f"{contract_file}: quantization is bnb_4bit_quant_type {kind!r}, bnb_4bit_use_double_quant {double!r}",
            expected="nf4 or fp4, and true or false",
            fix="restore the contract from where the adapter was published, or train the adapter again",
        )
    return QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double)
