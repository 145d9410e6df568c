"""How the verbs that answer prompts open an engine: on the base that was asked for, or on the adapters' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qlora_kit.engine import Engine


def open_engine(base: str | None, adapters: Sequence[str], store: Path) -> Engine:
    """An engine on ``base``, or where it is None on the base of the first adapter that has a contract, else ``tiny``.

    The adapter's contract also says whether the base is loaded in 4 bits. Adapters of other weights are refused here,
    before the base is loaded; ``Engine.load`` compares the rest.

    Raises:
        AdapterError: No such adapter, or it was trained on another base.
        BaseModelError: The base cannot be found or loaded.
    """
    from qlora_kit.adapters import AdapterStore, BaseFacts, base_fingerprint
    from qlora_kit.base_files import resolve_base
    from qlora_kit.config import QuantizationSection

    shown = [AdapterStore(store).show(adapter).contract for adapter in adapters]
    contracts = [contract for contract in shown if contract is not None]
    contract = next(iter(contracts), None)
    if contract is not None:
        named = contract.base.id if base is None else base
        ref = resolve_base(named, contract.base.revision if base is None else None)
        facts = BaseFacts(ref.id, ref.revision, fingerprint=base_fingerprint(ref.path))
        for other in contracts:
            other.require_match(facts)
    from qlora_kit.engine import Engine

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
