"""Refuses what can be refused before a weight is read: adapter, base, output, disk and memory in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from qlora_kit.adapters import (
    AdapterContract,
    AdapterFiles,
    BaseFacts,
    base_fingerprint,
    check_adapter_folder,
    no_base_given,
    pair_faults,
    token_row_faults,
)
from qlora_kit.base_files import BaseRef, read_model_config, resolve_base
from qlora_kit.base_layout import BaseLayout, read_layout, require_described_packing, require_described_shapes
from qlora_kit.checkpoint import TensorSource, TensorSpec, require_free_space
from qlora_kit.config import QuantizationSection
from qlora_kit.errors import AdapterError, BaseModelError, Fault, OutputError
from qlora_kit.host_memory import available_memory_bytes
from qlora_kit.merging.base_tensors import output_specs
from qlora_kit.merging.onto import BaseMatch, Chosen, Onto, base_match, choose_onto, require_16_bit_base
from qlora_kit.merging.same_codes import layout_of_codes, require_codes_of_training, require_same_codes
from qlora_kit.merging.saved_tensors import locate_saved_tensors
from qlora_kit.merging.token_rows import TrainedRows, locate_trained_rows
from qlora_kit.models import base_facts, base_quantization, load_tokenizer
from qlora_kit.prequantized import PackedWeight, Prequantization, read_packed_weights, read_prequantization
from qlora_kit.safetensors_header import locate_tensors, shown

REPORT_FILE = "merge_report.json"
WEIGHT_DTYPES = ("F16", "BF16", "F32")
_SMALL_FILES_BYTES = 64 * 2**20
_FP32_BYTES = 4
_VERIFY_BYTES = 400 * 2**20  # logits of two models, and activations
_VERIFY_COPIES = 3  # of the largest layer's weight in fp32


@dataclass(frozen=True)
class MergePlan:
    """A merge that passed every check.

    Attributes:
        adapter: The checked adapter.
        contract: Its contract, None for a plain PEFT adapter.
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
    """

    adapter: AdapterFiles
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

    def is_quantized(self, tensor: str) -> bool:
        """Whether the base's tensor is the weight of a 4-bit layer once the base is loaded in 4 bits."""
        return _weight_of(tensor) in self.layout.quantized

    def round_trips(self, tensor: str) -> bool:
        """Whether the base's tensor goes through its 4-bit round trip."""
        return self.onto == "dequantized" and self.is_quantized(tensor)

    def target(self, tensor: str) -> str | None:
        """The adapted module whose weight the base's tensor is, or None."""
        module = _weight_of(tensor)
        return module if module in self.adapter.pairs else None


def plan_merge(
    adapter: Path, out: Path, *, base: str | None, revision: str | None, onto: Onto, verify: bool
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
    ref = _find_base(files, contract, base, revision)
    held = read_prequantization(read_model_config(ref), where=str(ref.path / "config.json"))
    _refuse_unmergeable_base(ref, held, chosen)
    _refuse_overlap(out, {"adapter": adapter, "base": ref.path})
    match = base_match(contract, chosen)
    with TensorSource(ref.path) as source:
        if contract is not None and match == "fingerprint":
            files_held = {"prequantized": held is not None}
            contract.require_match(BaseFacts(ref.id, ref.revision, base_fingerprint(ref.path), quantization=files_held))
        quantization = base_quantization(ref, quantization)
        packed = read_packed_weights(locate_tensors(ref.path, error=BaseModelError))
        specs = output_specs(source, packed)
        _require_space(out, specs)
        if contract is not None:
            _require_conversation_match(contract, ref)
        if held is not None:
            require_described_shapes(ref)
            require_described_packing(ref)
        layout = read_layout(ref, four_bit=verify or chosen == "dequantized")
        if verify:
            _require_memory(layout)
        if contract is not None and match == "nf4_codes":
            layout = layout_of_codes(layout, contract, files.folder)
        _refuse_misfit(files, layout, source, packed)
        rows = _token_rows(files, layout, specs, packed)
        saved = locate_saved_tensors(files, specs, layout)
        _require_space(out, saved.specs)
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
    )


def _require_conversation_match(contract: AdapterContract, ref: BaseRef) -> None:
    """Chat template and stop tokens; the weights are compared by themselves."""
    facts = base_facts(ref, load_tokenizer(ref))
    contract.require_match(replace(facts, id=contract.base.id, revision=None, fingerprint=contract.base.fingerprint))


def _weight_of(tensor: str) -> str:
    return tensor.removesuffix(".weight") if tensor.endswith(".weight") else ""


def _find_base(
    files: AdapterFiles, contract: AdapterContract | None, base: str | None, revision: str | None
) -> BaseRef:
    if base is not None:
        return resolve_base(base, revision)
    if contract is not None:
        return resolve_base(contract.base.id, contract.base.revision if revision is None else revision)
    raise no_base_given(files.folder, files.config.base_model_name_or_path)


def _refuse_unmergeable_base(ref: BaseRef, held: Prequantization | None, onto: Chosen) -> None:
    if (ref.path / REPORT_FILE).exists():
        raise BaseModelError(
            f"{ref.path}: is a merge itself (it holds {REPORT_FILE})",
            expected="the base model that the adapter was trained on",
            fix="merge onto that base; two adapters in one model are combined first, then merged once",
        )
    if held is not None and onto == "original":
        raise BaseModelError(
            f"{ref.path}: the base is quantized already (quantization_config in config.json)",
            expected="16-bit or 32-bit weights for --onto original: a merge into quantized ones would be rounded away",
            fix="give the unquantized model with --base, or merge --onto dequantized",
        )


def _refuse_overlap(out: Path, inputs: Mapping[str, Path]) -> None:
    target = out.resolve()
    for name, path in inputs.items():
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(
                f"{out}: lies in, or holds, the folder of the {name} ({path})",
                expected="a folder of its own",
                fix="give another path with --out",
            )


def _require_space(out: Path, specs: Mapping[str, TensorSpec]) -> None:
    require_free_space(out, sum(spec.size_bytes for spec in specs.values()) + _SMALL_FILES_BYTES)


def _require_memory(layout: BaseLayout) -> None:
    """Verifying holds a layer at a time in fp32; better refused here than killed after the writing."""
    largest = max((prod(shape) for name, shape in layout.linear_shapes.items() if name not in layout.tied), default=0)
    needed_bytes = _VERIFY_BYTES + _VERIFY_COPIES * _FP32_BYTES * largest
    available_bytes = available_memory_bytes()
    if available_bytes is not None and available_bytes < needed_bytes:
        raise OutputError(
            f"verifying takes {needed_bytes / 2**30:.1f} GiB of memory, {available_bytes / 2**30:.1f} GiB are free",
            expected="room for the largest layer in fp32 and the logits of two models",
            fix="free memory, merge on a larger machine, or give --no-verify (the writing itself needs little)",
        )


def _refuse_misfit(
    files: AdapterFiles, layout: BaseLayout, source: TensorSource, packed: Mapping[str, PackedWeight]
) -> None:
    faults = pair_faults(files, layout.linear_shapes)
    for module in sorted(files.pairs.keys() & layout.tied):
        what = f"{files.weights}: adapts {shown(module)}, which shares its weight with another module of this base"
        fix = "train the adapter without it in target_modules: a merge would change the embedding as well"
        faults.append(Fault(what, "layers with a weight of their own", fix))
    if faults:
        raise AdapterError.of(faults)
    changed = sorted((files.pairs.keys() | layout.quantized) - layout.tied)
    faults = [fault for module in changed if (fault := _weight_fault(module, layout, source, packed)) is not None]
    if faults:
        raise BaseModelError.of(faults)


def _token_rows(
    files: AdapterFiles, layout: BaseLayout, specs: Mapping[str, TensorSpec], packed: Mapping[str, PackedWeight]
) -> dict[str, TrainedRows]:
    matrices = {_weight_of(name): spec.shape for name, spec in specs.items() if name not in packed}
    matrices = {name: shape for name, shape in matrices.items() if name not in layout.quantized | files.pairs.keys()}
    faults = token_row_faults(files, {name: shape for name, shape in matrices.items() if len(shape) == 2})
    if faults:
        raise AdapterError.of(faults)
    return locate_trained_rows(files, specs, layout.tied)


def _weight_fault(
    module: str, layout: BaseLayout, source: TensorSource, packed: Mapping[str, PackedWeight]
) -> Fault | None:
    name = f"{module}.weight"
    fix = (
        "give the complete checkpoint of an architecture whose tensors are named as its modules (Qwen2, Llama, Mistral)"
    )
    if name not in source:
        return Fault(f"{source.folder}: there is no tensor {shown(name)}", "the weight of each linear layer", fix)
    spec, shape = source.spec(name), layout.linear_shapes[module]
    found = packed[name].shape if name in packed else spec.shape
    if found != shape:
        return Fault(f"{source.file(name)}: tensor {shown(name)} has shape {found}", f"{shape}", fix)
    if spec.dtype not in WEIGHT_DTYPES and name not in packed:
        expected = f"one of {', '.join(WEIGHT_DTYPES)}"
        return Fault(f"{source.file(name)}: tensor {shown(name)} has dtype {spec.dtype}", expected, fix)
    return None
