"""Refuses what can be refused before a weight is read: adapter, base, output, disk and memory in, a plan out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_kit.adapters import (
    CONTRACT_FILE,
    AdapterContract,
    AdapterFiles,
    BaseFacts,
    base_fingerprint,
    check_adapter_folder,
    no_base_given,
    pair_faults,
)
from qlora_kit.base_files import BaseRef, read_model_config, resolve_base
from qlora_kit.checkpoint import TensorSource, require_free_space
from qlora_kit.config import QuantizationSection
from qlora_kit.config.trained_quantization import trained_quantization
from qlora_kit.errors import AdapterError, BaseModelError, Fault, OutputError
from qlora_kit.models import base_facts, load_tokenizer
from qlora_kit.safetensors_header import DTYPE_BYTES, shown

REPORT_FILE = "merge_report.json"
WEIGHT_DTYPES = ("F16", "BF16", "F32")
_SMALL_FILES_BYTES = 64 * 2**20
_FP32_BYTES = 4
_VERIFY_MARGIN = 1.3  # activations, logits, and what loading holds beside the weights

Onto = Literal["dequantized", "original", "auto"]


@dataclass(frozen=True)
class BaseLayout:
    """The base's linear layers, as transformers builds them.

    Attributes:
        linear_shapes: (out_features, in_features) by module name, the head included.
        quantized: Those that loading in 4 bits replaces (transformers leaves the head, and whatever is tied, alone).
        tied: Modules whose weight is shared with another one.
    """

    linear_shapes: Mapping[str, tuple[int, int]]
    quantized: frozenset[str]
    tied: frozenset[str]


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
    """

    adapter: AdapterFiles
    contract: AdapterContract | None
    base: BaseRef
    onto: Literal["dequantized", "original"]
    quantization: QuantizationSection
    layout: BaseLayout

    def round_trips(self, tensor: str) -> bool:
        """Whether the base's tensor goes through its 4-bit round trip."""
        return self.onto == "dequantized" and _weight_of(tensor) in self.layout.quantized

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
    _refuse_unsupported(files)
    contract = None if files.contract is None else AdapterContract.load(files.contract)
    chosen, quantization = _choose_onto(files, contract, onto)
    ref = _find_base(files, contract, base, revision)
    _refuse_unmergeable_base(ref)
    _refuse_overlap(out, {"adapter": adapter, "base": ref.path})
    with TensorSource(ref.path) as source:
        if contract is not None:
            facts = BaseFacts(id=ref.id, revision=ref.revision, fingerprint=base_fingerprint(ref.path))
            contract.require_match(facts)
        require_free_space(out, source.total_bytes + _SMALL_FILES_BYTES)
        if verify:
            _require_memory(source)
        if contract is not None:
            contract.require_match(base_facts(ref, load_tokenizer(ref)))
        layout = read_layout(ref)
        _refuse_misfit(files, layout, source)
    return MergePlan(files, contract, ref, chosen, quantization, layout)


def read_layout(ref: BaseRef) -> BaseLayout:
    """The base's linear layers, from its configuration alone: transformers builds the model without weights.

    Raises:
        BaseModelError: transformers has no causal language model for the configuration.
    """
    import torch
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    try:
        config = AutoConfig.from_pretrained(ref.path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(
            f"{ref.path / 'config.json'}: transformers cannot build the model ({error})",
            expected="a causal language model that transformers itself has",
            fix="check the file, or upgrade transformers",
        ) from error
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    quantizer = AutoHfQuantizer.from_config(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return BaseLayout(
        linear_shapes={name: (module.out_features, module.in_features) for name, module in linear.items()},
        quantized=frozenset(name for name, module in linear.items() if isinstance(module, Linear4bit)),
        tied=frozenset(name.removesuffix(".weight") for name in tied),
    )


def _weight_of(tensor: str) -> str:
    return tensor.removesuffix(".weight") if tensor.endswith(".weight") else ""


def _refuse_unsupported(files: AdapterFiles) -> None:
    settings = files.config
    features = {
        "use_dora": settings.use_dora,
        "modules_to_save": bool(settings.modules_to_save),
        "trainable_token_indices": bool(settings.trainable_token_indices),
        f"bias={settings.bias}": settings.bias != "none",
    }
    used = [name for name, is_used in features.items() if is_used]
    if used:
        raise AdapterError(
            f"{files.folder}: the adapter uses {', '.join(used)}, which this merge does not cover",
            expected="a LoRA adapter of pairs only (rsLoRA, rank_pattern and alpha_pattern included)",
            fix="keep it as an adapter (generate, serve), or train one without these settings",
        )


def _choose_onto(
    files: AdapterFiles, contract: AdapterContract | None, onto: Onto
) -> tuple[Literal["dequantized", "original"], QuantizationSection]:
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


def _find_base(
    files: AdapterFiles, contract: AdapterContract | None, base: str | None, revision: str | None
) -> BaseRef:
    if base is not None:
        return resolve_base(base, revision)
    if contract is not None:
        return resolve_base(contract.base.id, contract.base.revision if revision is None else revision)
    raise no_base_given(files.folder, files.config.base_model_name_or_path)


def _refuse_unmergeable_base(ref: BaseRef) -> None:
    if (ref.path / REPORT_FILE).exists():
        raise BaseModelError(
            f"{ref.path}: is a merge itself (it holds {REPORT_FILE})",
            expected="the base model that the adapter was trained on",
            fix="merge onto that base; two adapters in one model are combined first, then merged once",
        )
    if "quantization_config" in read_model_config(ref):
        raise BaseModelError(
            f"{ref.path}: the base is quantized already (quantization_config in config.json)",
            expected="16-bit or 32-bit weights: a merge into quantized ones would be rounded away",
            fix="give the unquantized model with --base",
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


def _require_memory(source: TensorSource) -> None:
    """Verifying holds a whole model in fp32; better refused here than killed after the writing."""
    needed_bytes = (
        _VERIFY_MARGIN
        * _FP32_BYTES
        * sum(source.spec(name).size_bytes // _item_bytes(source, name) for name in source.names)
    )
    available_bytes = _available_memory_bytes()
    if available_bytes is not None and available_bytes < needed_bytes:
        raise OutputError(
            f"verifying takes {needed_bytes / 2**30:.1f} GiB of memory, {available_bytes / 2**30:.1f} GiB are free",
            expected="room for the whole model in fp32",
            fix="free memory, merge on a larger machine, or give --no-verify (the writing itself needs little)",
        )


def _item_bytes(source: TensorSource, name: str) -> int:
    return DTYPE_BYTES[source.dtype(name)]


def _available_memory_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == "MemAvailable":
            return int(value.split()[0]) * 1024
    return None


def _refuse_misfit(files: AdapterFiles, layout: BaseLayout, source: TensorSource) -> None:
    faults = pair_faults(files, layout.linear_shapes)
    for module in sorted(files.pairs.keys() & layout.tied):
        what = f"{files.weights}: adapts {shown(module)}, which shares its weight with another module of this base"
        fix = "train the adapter without it in target_modules: a merge would change the embedding as well"
        faults.append(Fault(what, "layers with a weight of their own", fix))
    if faults:
        raise AdapterError.of(faults)
    changed = sorted((files.pairs.keys() | layout.quantized) - layout.tied)
    faults = [fault for module in changed if (fault := _weight_fault(module, layout, source)) is not None]
    if faults:
        raise BaseModelError.of(faults)


def _weight_fault(module: str, layout: BaseLayout, source: TensorSource) -> Fault | None:
    name = f"{module}.weight"
    fix = (
        "give the complete checkpoint of an architecture whose tensors are named as its modules (Qwen2, Llama, Mistral)"
    )
    if name not in source:
        return Fault(f"{source.folder}: there is no tensor {shown(name)}", "the weight of each linear layer", fix)
    spec, shape = source.spec(name), layout.linear_shapes[module]
    if spec.shape != shape:
        return Fault(f"{source.file(name)}: tensor {shown(name)} has shape {spec.shape}", f"{shape}", fix)
    if spec.dtype not in WEIGHT_DTYPES:
        expected = f"one of {', '.join(WEIGHT_DTYPES)}"
        return Fault(f"{source.file(name)}: tensor {shown(name)} has dtype {spec.dtype}", expected, fix)
    return None
