"""An adapter's contract in words: rows of a card that fits 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.output import in_units

if TYPE_CHECKING:
    from qlora_kit.adapters import AdapterCard, AdapterContract, AdapterDetails

_HASH_DIGITS = 12
_UNKNOWN = "not known: the adapter has no contract; `qlora-kit adapters adopt` writes one"


def card_json(card: AdapterCard) -> dict[str, Any]:
    """The keys of an adapter that other programs rely on."""
    names = ("name", "task", "base_model", "r", "bytes", "created", "origin")
    return {name: vars(card)[name] for name in names}


def card_rows(details: AdapterDetails) -> dict[str, str]:
    """Label to text of everything that the card shows."""
    card, contract = details.card, details.contract
    rows = {
        "task": card.task or "not known",
        "base": card.base_model or "not known",
        "size": f"rank {card.r}, {in_units(card.bytes)}",
    }
    if contract is None:
        return {**rows, "weights written": card.created, "contract": _UNKNOWN}
    return {**rows, **_contract_rows(contract)}


def _contract_rows(contract: AdapterContract) -> dict[str, str]:
    data = [
        f"{file.split}: {file.name}, {file.rows:,} rows, sha256 {file.sha256[:_HASH_DIGITS]}" for file in contract.data
    ]
    rows = {
        "revision": contract.base.revision or "",
        "fingerprint": short_hash(contract.base.fingerprint),
        "base loaded in": quantization_text(contract.quantization),
        "chat template": short_hash(contract.chat_template_sha256 or "none"),
        "stop tokens": _stop_text(contract),
        "system prompt": contract.system_prompt or "none",
        "generation": ", ".join(f"{key} {value}" for key, value in contract.generation.items()),
        "metrics of the task": ", ".join(contract.metric_names),
        "data": "\n".join(data),
        "measured": "\n".join(f"{key} {_number(value)}" for key, value in contract.metrics.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in contract.versions.items()),
        "combined from": _parts_text(contract),
        "origin": f"{contract.origin}, contract of {contract.created}, qlora-kit {contract.kit_version}",
        "not measured": ", ".join(contract.not_measured),
    }
    return {label: text for label, text in rows.items() if text}


def _parts_text(contract: AdapterContract) -> str:
    """``cat of sentiment x 0.7, translation x 0.3``; empty for other origins."""
    combined = contract.combined_from
    if combined is None:
        return ""
    return f"{combined.method} of " + ", ".join(f"{part.name} x {part.weight:g}" for part in combined.parts)


def short_hash(text: str) -> str:
    """The first digits of a hash, behind its kind if it names one."""
    kind, colon, digits = text.rpartition(":")
    return f"{kind}{colon}{digits[:_HASH_DIGITS]}"


def quantization_text(quantization: Mapping[str, Any]) -> str:
    """How a base was loaded: ``4 bits: nf4, double quantization, codes of 14 tensors``."""
    if not quantization["load_in_4bit"]:
        return "16 bits"
    details = [str(quantization.get("bnb_4bit_quant_type"))]
    if quantization.get("bnb_4bit_use_double_quant"):
        details.append("double quantization")
    if quantization.get("nf4_codes"):
        details.append(f"codes of {len(quantization['nf4_codes'])} tensors")
    if quantization.get("prequantized"):
        details.append("in the base's own files")
    return f"4 bits: {', '.join(details)}"


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return " to ".join(_number(item) for item in value)
    return str(value)


def _stop_text(contract: AdapterContract) -> str:
    """Ids, with the token's text where the base's files are at hand."""
    texts = _stop_token_of(contract.base.id)
    return ", ".join(f"{token} {texts[token]}" if token in texts else str(token) for token in contract.stop_token_ids)


def _stop_token_of(base: str) -> dict[int, str]:
    """The base's stop token by its id; empty where finding it would take a download, or its files are damaged."""
    from qlora_kit.base_files import TINY, read_model_config, resolve_description
    from qlora_kit.data.template_file import read_stop_facts
    from qlora_kit.errors import BaseModelError

    if base != TINY and not Path(base).is_dir():
        return {}
    try:
        ref = resolve_description(base)
        facts = read_stop_facts(ref.path, read_model_config(ref))
    except BaseModelError:
        return {}
    return {} if facts.token_id is None or facts.token is None else {facts.token_id: facts.token}
