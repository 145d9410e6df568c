"""Refuses what can be refused before a weight is read: adapter, base, output, disk and memory in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qlora_kit.adapters import (
    AdapterContract,
    AdapterFiles,
    BaseFacts,
    base_fingerprint,
    check_adapter_folder,
    no_base_given,
    token_row_faults,
)
from qlora_kit.base_files import TINY, BaseRef, read_model_config, resolve_base
from qlora_kit.base_layout import BaseLayout, read_layout, require_described_packing, require_described_shapes
from qlora_kit.checkpoint import TensorSource, TensorSpec
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import AdapterError, BaseModelError
from qlora_kit.merging.base_tensors import output_specs
from qlora_kit.merging.input_checks import (
    refuse_misfit,
    refuse_overlap,
    refuse_unmergeable_base,
    refuse_wrong_weights,
    require_memory,
    require_space,
)
from qlora_kit.merging.onto import BaseMatch, Chosen, Onto, base_match, choose_onto, require_16_bit_base
from qlora_kit.merging.same_codes import layout_of_codes, require_codes_of_training, require_same_codes
from qlora_kit.merging.saved_tensors import locate_saved_tensors
from qlora_kit.merging.token_rows import TrainedRows, locate_trained_rows
from qlora_kit.models import base_facts, base_quantization, load_tokenizer
from qlora_kit.prequantized import PackedWeight, Prequantization, read_packed_weights, read_prequantization
from qlora_kit.safetensors_header import locate_tensors


@dataclass(frozen=True)
class MergePlan:
    """A merge, or a trained base alone, that passed every check.

    Attributes:
        adapter: The checked adapter; None where the trained base is written alone.
        contract: Its contract, None for a plain PEFT adapter and for a trained base.
        base: The base it is merged onto.
        onto: ``dequantized`` or ``original``.
        quantization: How the base is quantized: for ``dequantized``, before the merge; else as trained, if known.
        layout: The base's linear layers.
        packed: Those of the base's tensors that are 4-bit weights in its files already.
        base_specs: The base's tensors as a merge writes them.
        specs: The tensors of the output.
        replaced: Tensors of the output in whose place the adapter brings its own; their names in the adapter.
        copied_from: Tensors of the output that the base has under another name.
        config: Keys of ``config.json`` that the adapter changes.
        token_rows: Tensors of the output with rows that the adapter brings trained.
        base_match: What shows that the base is the one of training: its ``fingerprint``; or, for the 16-bit model of a
            base that was quantized already, the ``nf4_codes`` that it quantizes to. None without a contract.
        device: Where products are computed: ``cpu``, or ``cuda``.
    """

    adapter: AdapterFiles | None
    contract: AdapterContract | None
    base: BaseRef
    onto: Chosen
    quantization: QuantizationSection
    layout: BaseLayout
    packed: Mapping[str, PackedWeight]
    base_specs: Mapping[str, TensorSpec]
    specs: Mapping[str, TensorSpec]
    replaced: Mapping[str, str]
    copied_from: Mapping[str, str]
    config: Mapping[str, Any]
    token_rows: Mapping[str, TrainedRows]
    base_match: BaseMatch | None
    device: str

    @property
    def files(self) -> AdapterFiles:
        """The adapter, where there must be one."""
        if self.adapter is None:
            raise ValueError("a trained base is written without an adapter")
        return self.adapter

    @property
    def vocabulary(self) -> int:
        """At least as many logits as the output has at a position: rows of its longest tensor."""
        return max(spec.shape[0] for spec in self.specs.values() if spec.shape)

    def is_quantized(self, tensor: str) -> bool:
        """Whether the base's tensor is the weight of a 4-bit layer once the base is loaded in 4 bits."""
        return _weight_of(tensor) in self.layout.quantized

    def round_trips(self, tensor: str) -> bool:
        """Whether the base's tensor goes through its 4-bit round trip."""
        return self.onto == "dequantized" and self.is_quantized(tensor)

    def target(self, tensor: str) -> str | None:
        """The adapted module whose weight the base's tensor is, or None."""
        module = _weight_of(tensor)
        return module if self.adapter is not None and module in self.adapter.pairs else None


def plan_merge(
    adapter: Path, out: Path, *, base: str | None, revision: str | None, onto: Onto, verify: bool, device: str
) -> MergePlan:
    """Check all that is cheap; torch is imported only once adapter, contract, base files and disk are found in order.

    Raises:
        AdapterError: The adapter is unsound, of a kind that is not merged yet, changes nothing, or fits another base.
        BaseModelError: The base is missing, incomplete, quantized already, or a merge itself.
        OutputError: The output would replace base or adapter, or does not fit; or verifying does not fit memory.
    """
    files = check_adapter_folder(adapter)
    contract = None if files.contract is None else AdapterContract.load(files.contract)
    chosen, quantization = choose_onto(files, contract, onto)
    require_16_bit_base(files, contract, chosen, base)
    ref = find_base(files, contract, base, revision)
    held = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    refuse_unmergeable_base(ref, held, chosen)
    refuse_overlap(out, {"adapter": adapter, "base": ref.path})
    match = base_match(contract, chosen)
    with TensorSource(ref.path) as source:
        if contract is not None and match == "fingerprint":
            _require_weights_of_training(contract, ref, held)
        quantization = base_quantization(ref, quantization)
        packed = read_packed_weights(locate_tensors(ref.path, error=BaseModelError))
        specs = output_specs(source, packed)
        require_space(out, specs)
        if contract is not None:
            _require_conversation_match(contract, ref)
        if held is not None:
            require_described_shapes(ref)
            require_described_packing(ref)
        layout = read_layout(ref, four_bit=verify or chosen == "dequantized")
        if verify:
            require_memory(layout)
        if contract is not None and match == "nf4_codes":
            layout = layout_of_codes(layout, contract, files.folder)
        refuse_misfit(files, layout, source, packed)
        rows = _token_rows(files, layout, specs, packed)
        saved = locate_saved_tensors(files, specs, layout)
        require_space(out, saved.specs)
        if contract is not None and match == "nf4_codes":
            require_same_codes(source, contract, quantization)
        elif contract is not None and quantization.load_in_4bit and (verify or chosen == "dequantized"):
            require_codes_of_training(source, contract, quantization)
    return MergePlan(
        adapter=files,
        contract=contract,
        base=ref,
        onto=chosen,
        quantization=quantization,
        layout=layout,
        packed=packed,
        base_specs=specs,
        specs=saved.specs,
        replaced=saved.replaced,
        copied_from=saved.copied_from,
        config=saved.config,
        token_rows={name: found for name, found in rows.items() if name not in saved.replaced},
        base_match=match,
        device=device,
    )


def plan_trained_base(
    out: Path, *, base: str | None, revision: str | None, adapter: Path | None, verify: bool, device: str
) -> MergePlan:
    """Check all that is cheap before a base is written as the 4-bit layers of training compute with it.

    Args:
        out: The folder to write.
        base: Its name; None for the adapter's, or ``tiny``.
        revision: Of a Hub id.
        adapter: One that was trained on it: its contract says how the base is quantized. None for NF4 with double
            quantization, or as the base's own files hold it.
        verify: Whether the written files will be verified.
        device: As in ``MergePlan``.

    Raises:
        AdapterError: The adapter is unsound, has no contract, or was trained on another base or on 16-bit weights.
        BaseModelError: The base is missing, incomplete, or a merge itself.
        OutputError: As for ``plan_merge``.
    """
    files = None if adapter is None else check_adapter_folder(adapter)
    contract = None if files is None else _contract_for_base(files)
    quantization = QuantizationSection()
    if files is not None:
        quantization = choose_onto(files, contract, "dequantized")[1]
    if files is None:
        ref = resolve_base(TINY if base is None else base, revision)
    else:
        ref = find_base(files, contract, base, revision)
    held = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    refuse_unmergeable_base(ref, held, "dequantized")
    refuse_overlap(out, {"base": ref.path} if adapter is None else {"adapter": adapter, "base": ref.path})
    with TensorSource(ref.path) as source:
        if contract is not None:
            _require_weights_of_training(contract, ref, held)
        quantization = base_quantization(ref, quantization)
        packed = read_packed_weights(locate_tensors(ref.path, error=BaseModelError))
        specs = output_specs(source, packed)
        require_space(out, specs)
        if held is not None:
            require_described_shapes(ref)
            require_described_packing(ref)
        layout = read_layout(ref)
        if verify:
            require_memory(layout)
        refuse_wrong_weights(layout.quantized, layout, source, packed)
        if contract is not None:
            require_codes_of_training(source, contract, quantization)
    return MergePlan(
        adapter=None,
        contract=None,
        base=ref,
        onto="dequantized",
        quantization=quantization,
        layout=layout,
        packed=packed,
        base_specs=specs,
        specs=specs,
        replaced={},
        copied_from={},
        config={},
        token_rows={},
        base_match=None if contract is None else "fingerprint",
        device=device,
    )


def _contract_for_base(files: AdapterFiles) -> AdapterContract:
    if files.contract is None:
        raise AdapterError(
            f"{files.folder}: the adapter has no contract, so how its base was quantized is not known",
            expected="an adapter with a contract, or none at all",
            fix="leave it out (NF4 with double quantization), or write its contract with `qlora-kit adapters adopt`",
        )
    return AdapterContract.load(files.contract)


def _require_weights_of_training(contract: AdapterContract, ref: BaseRef, held: Prequantization | None) -> None:
    facts = {"prequantized": held is not None}
    contract.require_match(BaseFacts(ref.id, ref.revision, base_fingerprint(ref.path), quantization=facts))


def _require_conversation_match(contract: AdapterContract, ref: BaseRef) -> None:
    """Chat template and stop tokens; the weights are compared by themselves."""
    facts = base_facts(ref, load_tokenizer(ref))
    contract.require_match(replace(facts, id=contract.base.id, revision=None, fingerprint=contract.base.fingerprint))


def _weight_of(tensor: str) -> str:
    return tensor.removesuffix(".weight") if tensor.endswith(".weight") else ""


def find_base(files: AdapterFiles, contract: AdapterContract | None, base: str | None, revision: str | None) -> BaseRef:
    """The base that is meant: the one given, else the contract's.

    Raises:
        AdapterError: Neither is there.
        BaseModelError: It cannot be found.
    """
    if base is not None:
        return resolve_base(base, revision)
    if contract is not None:
        return resolve_base(contract.base.id, contract.base.revision if revision is None else revision)
    raise no_base_given(files.folder, files.config.base_model_name_or_path)


def _token_rows(
    files: AdapterFiles, layout: BaseLayout, specs: Mapping[str, TensorSpec], packed: Mapping[str, PackedWeight]
) -> dict[str, TrainedRows]:
    matrices = {_weight_of(name): spec.shape for name, spec in specs.items() if name not in packed}
    matrices = {name: shape for name, shape in matrices.items() if name not in layout.quantized | files.pairs.keys()}
    faults = token_row_faults(files, {name: shape for name, shape in matrices.items() if len(shape) == 2})
    if faults:
        raise AdapterError.of(faults)
    return locate_trained_rows(files, specs, layout.tied)
