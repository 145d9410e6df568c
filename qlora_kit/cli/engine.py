"""How the verbs that answer prompts open an engine: on the base that was asked for, or on the adapters' own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.cli.output import say

if TYPE_CHECKING:
    from qlora_kit.adapters import AdapterContract
    from qlora_kit.engine import Engine


def open_engine(base: str | None, adapters: Sequence[str], store: Path, *, max_batch: int = 32) -> Engine:
    """An engine on ``base``, or where it is None on the base of the first adapter, or ``tiny`` without adapters.

    ``adapters`` are written as requests write them: names or folders, scaled and summed.

    The adapter's contract also says whether the base is loaded in 4 bits. Unsound files, and adapters of other weights,
    are refused here, before the base is loaded; ``Engine.load`` compares the rest.

    Raises:
        AdapterError: No such adapter, its files are unsound, it was trained on another base, or nothing says on which.
        BaseModelError: The base cannot be found or loaded.
    """
    from qlora_kit.adapters import CONTRACT_FILE, BaseFacts, base_fingerprint
    from qlora_kit.adapters.mixing import parse_adapter
    from qlora_kit.base_files import read_model_config, resolve_base
    from qlora_kit.config.trained_quantization import trained_quantization
    from qlora_kit.prequantized import read_prequantization

    names = list(dict.fromkeys(name for adapter in adapters for name, _ in parse_adapter(adapter)))
    contracts = _checked_contracts(base, names, store)
    if not contracts:
        named = "tiny" if base is None else base
        resolve_base(named)  # before torch is imported
        from qlora_kit.engine import Engine

        return Engine(named, store=store, max_batch=max_batch)
    folder, contract = next(iter(contracts.items()))
    named, revision = (contract.base.id, contract.base.revision) if base is None else (base, None)
    quantization = trained_quantization(folder / CONTRACT_FILE, contract.quantization)
    ref = resolve_base(named, revision)
    held = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    facts = BaseFacts(ref.id, ref.revision, base_fingerprint(ref.path), quantization={"prequantized": held is not None})
    for other in contracts.values():
        other.require_match(facts)
    from qlora_kit.engine import Engine

    return Engine(named, revision=revision, quantization=quantization, store=store, max_batch=max_batch)


def open_store_engine(base: str | None, store: Path, *, max_batch: int) -> Engine:
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
                return open_engine(base, (card.name,), store, max_batch=max_batch)
            except AdapterError:  # unsound, or of other weights: it is left out when the store is looked through
                continue
    return open_engine(base, (), store, max_batch=max_batch)


def _checked_contracts(base: str | None, adapters: Sequence[str], store: Path) -> dict[Path, AdapterContract]:
    """Adapter folder -> contract, of those that have one; the files of all are checked."""
    from qlora_kit.adapters import AdapterStore, check_adapter_folder, no_base_given

    contracts = {}
    without = []
    for adapter in adapters:
        details = AdapterStore(store).show(adapter)
        folder = details.card.path
        check_adapter_folder(folder)
        if details.contract is not None:
            contracts[folder] = details.contract
            continue
        if base is None:
            raise no_base_given(folder, details.card.base_model)
        without.append(details.card.name)
    if without:
        unchecked = "no contract, so base, chat template and stop tokens cannot be checked"
        say(f"{', '.join(without)}: {unchecked}; `qlora-kit adapters adopt` writes one from what can be measured")
    return contracts
