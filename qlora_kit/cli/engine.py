"""How the verbs that answer prompts open an engine: on the base that was asked for, or on the adapters' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.cli.output import say

if TYPE_CHECKING:
    from qlora_kit.adapters import AdapterContract
    from qlora_kit.base_files import BaseRef
    from qlora_kit.config import QuantizationSection
    from qlora_kit.engine import Engine


@dataclass(frozen=True)
class EnginePlan:
    """An engine that can be opened: its adapters and the files of its base are checked, and nothing is loaded.

    Attributes:
        base: What names it, and ``revision`` of it where it is a contract's.
        ref: Its files.
        quantization: How to load it; None for the default.
        contracts: Of each adapter, by the name or folder that was asked for; None for one trained elsewhere.
        store: Where requests look adapters up.
    """

    base: str
    revision: str | None
    ref: BaseRef
    quantization: QuantizationSection | None
    contracts: Mapping[str, AdapterContract | None]
    store: Path

    def open(self, *, max_batch: int = 32, kv_bytes: int | None = None) -> Engine:
        """Load the base; ``Engine`` says what the arguments are."""
        from qlora_kit.engine import Engine

        return Engine(
            self.base,
            revision=self.revision,
            quantization=self.quantization,
            store=self.store,
            max_batch=max_batch,
            kv_bytes=kv_bytes,
        )


def plan_engine(base: str | None, adapters: Sequence[str], store: Path) -> EnginePlan:
    """An engine on ``base``, or where it is None on the base of the first adapter, or ``tiny`` without adapters.

    ``adapters`` are written as requests write them: names or folders, scaled and summed.

    The adapter's contract also says whether the base is loaded in 4 bits. Unsound files, and adapters of other weights,
    are refused here, before the base is loaded; ``Engine.load`` compares the rest.

    Raises:
        AdapterError: No such adapter, its files are unsound, it was trained on another base, or nothing says on which.
        BaseModelError: The base cannot be found, or its ``config.json`` cannot be used.
    """
    from qlora_kit.adapters import CONTRACT_FILE, BaseFacts, base_fingerprint
    from qlora_kit.adapters.mixing import parse_adapter
    from qlora_kit.base_files import read_model_config, resolve_base
    from qlora_kit.config.trained_quantization import trained_quantization
    from qlora_kit.prequantized import read_prequantization

    names = list(dict.fromkeys(name for adapter in adapters for name, _ in parse_adapter(adapter)))
    folders = _checked_folders(base, names, store)
    contracts = {name: contract for name, (_, contract) in folders.items()}
    known = [(folder, contract) for folder, contract in folders.values() if contract is not None]
    if not known:
        named = "tiny" if base is None else base
        return EnginePlan(named, None, resolve_base(named), None, contracts, store)
    folder, first = known[0]
    named, revision = (first.base.id, first.base.revision) if base is None else (base, None)
    quantization = trained_quantization(folder / CONTRACT_FILE, first.quantization)
    ref = resolve_base(named, revision)
    held = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    facts = BaseFacts(ref.id, ref.revision, base_fingerprint(ref.path), quantization={"prequantized": held is not None})
    for _, contract in known:
        contract.require_match(facts)
    return EnginePlan(named, revision, ref, quantization, contracts, store)


def open_store_engine(base: str | None, store: Path, *, max_batch: int, kv_bytes: int | None = None) -> Engine:
    """An engine for the adapters of a whole store: on ``base``, or where it is None on the one they were trained on.

    What the first usable adapter was trained with decides how the base is loaded. The others are not loaded here.

    Raises:
        ConfigError: No base is given, and the adapters have several.
        BaseModelError: The base cannot be found or loaded.
    """
    from qlora_kit.adapters import AdapterStore
    from qlora_kit.errors import AdapterError, ConfigError

    cards = AdapterStore(store).list()
    bases = sorted({card.base_model for card in cards if card.base_model is not None and card.origin is not None})
    if base is None and len(bases) > 1:
        raise ConfigError(
            f"{store}: the adapters were trained on {len(bases)} bases: {', '.join(bases)}",
            expected="one base to serve",
            fix=f"give one: --base {bases[0]}; the adapters of the others are left out",
        )
    for card in cards:
        if card.origin is not None and card.base_model in (base, *bases):
            try:
                return plan_engine(base, (card.name,), store).open(max_batch=max_batch, kv_bytes=kv_bytes)
            except AdapterError:  # unsound, or of other weights: it is left out when the store is looked through
                continue
    return plan_engine(base, (), store).open(max_batch=max_batch, kv_bytes=kv_bytes)


def _checked_folders(
    base: str | None, adapters: Sequence[str], store: Path
) -> dict[str, tuple[Path, AdapterContract | None]]:
    """Adapter -> its folder and contract; the files of all are checked."""
    from qlora_kit.adapters import AdapterStore, check_adapter_folder, no_base_given

    found = {}
    for adapter in adapters:
        details = AdapterStore(store).show(adapter)
        check_adapter_folder(details.card.path)
        if details.contract is None and base is None:
            raise no_base_given(details.card.path, details.card.base_model)
        found[adapter] = details.card.path, details.contract
    without = [folder.name for folder, contract in found.values() if contract is None]
    if without:
        unchecked = "no contract, so base, chat template and stop tokens cannot be checked"
        say(f"{', '.join(without)}: {unchecked}; `qlora-kit adapters adopt` writes one from what can be measured")
    return found
