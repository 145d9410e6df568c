"""What an adapter is merged onto: ``dequantized`` or ``original`` weights, by its contract and what was asked for."""

from __future__ import annotations

from typing import Literal

from qlora_kit.adapters import CONTRACT_FILE, AdapterContract, AdapterFiles
from qlora_kit.config import QuantizationSection
from qlora_kit.config.trained_quantization import trained_quantization
from qlora_kit.errors import AdapterError, ConfigError

Onto = Literal["dequantized", "original", "auto"]
Chosen = Literal["dequantized", "original"]
BaseMatch = Literal["fingerprint", "nf4_codes"]
_CHOICES: tuple[Onto, ...] = ("dequantized", "original", "auto")
_IN_PLACE = ("quantized", "4bit", "bnb-4bit", "nf4", "fp4", "in-place")


def parse_onto(text: str) -> Onto:
    """What a user asked for.

    Raises:
        ConfigError: It is none of the choices; for the 4-bit weights themselves, with the reason.
    """
    for choice in _CHOICES:
        if text == choice:
            return choice
    if text in _IN_PLACE:
        raise ConfigError(
            f"--onto {text}: a merge into the 4-bit weights in place would quantize base + adapter again, and most of "
            "what the adapter learned is smaller than a step of 4 bits: it is rounded away",
            expected="16-bit weights to add the adapter to",
            fix="merge --onto dequantized, which keeps what was trained in 16 bits; or serve the adapter beside the "
            "4-bit base",
        )
    raise ConfigError(f"--onto is {text!r}", expected=f"one of {', '.join(_CHOICES)}", fix=f"give {_CHOICES[-1]}")


def parse_onto_of_base(text: str) -> None:
    """Refuse to write a trained base of anything but the weights of training.

    Raises:
        ConfigError: Of ``original`` weights, with the reason, or of none of the choices.
    """
    if parse_onto(text) == "original":
        raise ConfigError(
            "--base-only --onto original: the original weights are the base itself, and nothing would change",
            expected="--onto dequantized, or nothing: what the 4-bit layers compute with",
            fix="use the base as it is, or leave --onto out",
        )


def choose_onto(
    files: AdapterFiles, contract: AdapterContract | None, onto: Onto
) -> tuple[Chosen, QuantizationSection]:
    """What to merge onto, ``auto`` as the adapter was trained, and how the base is (or was) quantized.

    Raises:
        AdapterError: Without a contract ``auto`` means nothing; 16-bit training has no dequantized weights.
    """
    if contract is None:
        if onto == "auto":
            raise AdapterError(
                f"{files.folder}: the adapter has no contract, so what base it was trained on is not known",
                expected="--onto dequantized (trained on 4-bit weights) or --onto original (trained on 16-bit weights)",
                fix="give --onto as the adapter was trained, or write its contract: `qlora-kit adapters adopt`",
            )
        return onto, QuantizationSection(load_in_4bit=onto == "dequantized")
    quantization = trained_quantization(files.folder / CONTRACT_FILE, contract.quantization)
    if onto == "dequantized" and not quantization.load_in_4bit:
        raise AdapterError(
            f"{files.folder}: trained on 16-bit weights, which a merge onto dequantized ones would replace",
            expected="--onto original",
            fix="leave --onto out: the contract says how the adapter was trained",
        )
    if onto == "auto":
        return ("dequantized" if quantization.load_in_4bit else "original"), quantization
    return onto, quantization


def base_match(contract: AdapterContract | None, onto: Chosen) -> BaseMatch | None:
    """By what the base is recognised as that of training; None without a contract."""
    if contract is None:
        return None
    return "nf4_codes" if onto == "original" and contract.quantization.get("prequantized") else "fingerprint"


def require_16_bit_base(files: AdapterFiles, contract: AdapterContract | None, onto: Chosen, base: str | None) -> None:
    """``original`` needs the 16-bit model; the contract of a base that was quantized already cannot name it.

    Raises:
        AdapterError: It is not given.
    """
    if base is None and contract is not None and base_match(contract, onto) == "nf4_codes":
        raise AdapterError(
            f"{files.folder}: trained on {contract.base.id}, whose files hold 4-bit weights: --onto original needs the "
            "16-bit model that they were quantized from",
            expected="--base with that model; its weights must quantize to the 4-bit codes of training",
            fix="give it with --base, or leave --onto out to merge into the weights that were trained on",
        )
