"""How the verbs that answer prompts open an engine: on the base that was asked for, or on the adapters' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.engine import Engine


def open_engine(base: str | None, adapters: Sequence[str], store: Path) -> Engine:
    """An engine on ``base``, or where it is None on the base of the first adapter that has a contract, else ``tiny``.

    The adapter's contract also says whether the base is loaded in 4 bits.
    """
    from qlora_kit.adapters import AdapterStore
    from qlora_kit.config import QuantizationSection
    from qlora_kit.engine import Engine

    contracts = [AdapterStore(store).show(adapter).contract for adapter in adapters]
    contract = next((contract for contract in contracts if contract is not None), None)
    if contract is None:
        return Engine("tiny" if base is None else base, store=store)
    known = QuantizationSection.model_fields
    quantization = QuantizationSection(
        **{name: value for name, value in contract.quantization.items() if name in known}
    )
    return Engine(
        contract.base.id if base is None else base,
        revision=contract.base.revision if base is None else None,
        quantization=quantization,
        store=store,
    )
