"""Recognises a trained base: a folder that `merge --base-only` wrote, and the adapters that belong on it; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.adapters.contract import AdapterContract, BaseIdentity
from qlora_kit.adapters.fingerprint import base_fingerprint
from qlora_kit.errors import AdapterError, BaseModelError, Fault
from qlora_kit.strict_json import read_json_object

REPORT_FILE = "merge_report.json"
TRAINED_BASE = "trained_base"
"""The ``kind`` in the report of a trained base; a merge of an adapter has ``merge``."""
MAX_REPORT_BYTES = 16_000_000
_FIX = "write it again: `qlora-kit merge --base-only --base BASE --out DIR --overwrite`"


@dataclass(frozen=True)
class TrainedBase:
    """A base in 16 bits whose linear weights are what 4-bit layers compute with.

    Attributes:
        folder: Where it lies.
        base: The base it was made of.
        quant_type: ``nf4`` or ``fp4``.
        double_quant: Whether the block scales were quantized too.
        fingerprint: ``base_fingerprint`` of the written files.
    """

    folder: Path
    base: BaseIdentity
    quant_type: str
    double_quant: bool
    fingerprint: str

    def mismatches(self, contract: AdapterContract) -> list[Fault]:
        """Why an adapter with this contract does not belong on it; none where it was trained on these weights."""
        faults = []
        trained = contract.quantization
        if contract.base.fingerprint != self.base.fingerprint:
            what = f"{self.folder}: was made of {self.base.id}; the adapter was trained on {contract.base.id}"
            faults.append(Fault(what, f"a trained base of the fingerprint {contract.base.fingerprint}", _FIX))
        if not trained.get("load_in_4bit"):
            what = f"{self.folder}: holds what 4-bit layers compute with; the adapter was trained on 16-bit weights"
            faults.append(Fault(what, "the base itself", f"serve the adapter on {contract.base.id}"))
            return faults
        for key, held in (
            ("bnb_4bit_quant_type", self.quant_type),
            ("bnb_4bit_use_double_quant", self.double_quant),
        ):
            if trained.get(key) != held:
                what = f"{self.folder}: {key} is {held!r}; the adapter was trained with {trained.get(key)!r}"
                fix = "write it again and name the adapter: `qlora-kit merge ADAPTER --base-only --out DIR`"
                faults.append(Fault(what, f"{key} {trained.get(key)!r}", fix))
        return faults

    def require_match(self, contract: AdapterContract) -> None:
        """Refuse an adapter that was not trained on these weights.

        Raises:
            AdapterError: With every difference.
        """
        faults = self.mismatches(contract)
        if faults:
            raise AdapterError.of(faults)


def read_trained_base(folder: Path) -> TrainedBase | None:
    """What ``folder`` says of itself; None where it is no trained base (no report, or that of a merged adapter).

    Raises:
        BaseModelError: The report is damaged, or the weights are not those that it was written with.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    report = read_json_object(path, max_bytes=MAX_REPORT_BYTES, error=BaseModelError, fix=_FIX)
    if report.get("kind") != TRAINED_BASE:
        return None
    quantization = report.get("quantization")
    kinds: dict[str, tuple[Any, type]] = {
        "base": (report.get("base"), str),
        "base_fingerprint": (report.get("base_fingerprint"), str),
        "output_fingerprint": (report.get("output_fingerprint"), str),
        "quantization": (quantization, dict),
    }
    if isinstance(quantization, dict):
        kinds["quantization.bnb_4bit_quant_type"] = (quantization.get("bnb_4bit_quant_type"), str)
        kinds["quantization.bnb_4bit_use_double_quant"] = (quantization.get("bnb_4bit_use_double_quant"), bool)
    wrong = [key for key, (value, kind) in kinds.items() if type(value) is not kind]
    if wrong:
        raise BaseModelError(f"{path}: {', '.join(wrong)} missing or of another type", expected="a report", fix=_FIX)
    found = base_fingerprint(folder)
    if found != report["output_fingerprint"]:
        raise BaseModelError(
            f"{folder}: the weights are not those that {REPORT_FILE} was written with (fingerprint {found})",
            expected=f"the fingerprint {report['output_fingerprint']}",
            fix=_FIX,
        )
    revision = report.get("revision")
    return TrainedBase(
        folder=folder,
        base=BaseIdentity(report["base"], revision if isinstance(revision, str) else None, report["base_fingerprint"]),
        quant_type=report["quantization"]["bnb_4bit_quant_type"],
        double_quant=report["quantization"]["bnb_4bit_use_double_quant"],
        fingerprint=found,
    )
