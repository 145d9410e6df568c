"""Checks of a merge's inputs that need no weight: base, output folder, disk, memory, and whether the parts fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

from qlora_kit.adapters import AdapterFiles, pair_faults
from qlora_kit.adapters.trained_base import REPORT_FILE, read_trained_base
from qlora_kit.base_files import BaseRef
from qlora_kit.base_layout import BaseLayout
from qlora_kit.checkpoint import TensorSource, TensorSpec, require_free_space
from qlora_kit.errors import AdapterError, BaseModelError, Fault, OutputError
from qlora_kit.host_memory import free_memory_bytes
from qlora_kit.merging.onto import Chosen
from qlora_kit.prequantized import PackedWeight, Prequantization
from qlora_kit.safetensors_header import shown

WEIGHT_DTYPES = ("F16", "BF16", "F32")
SMALL_FILES_BYTES = 64 * 2**20
_FP32_BYTES = 4
_VERIFY_BYTES = 400 * 2**20  # logits of two models, and activations
_VERIFY_COPIES = 3  # of the largest layer's weight in fp32


def refuse_unmergeable_base(ref: BaseRef, held: Prequantization | None, onto: Chosen) -> None:
    """A merge is no base, and files of 4-bit weights have no original ones.

    Raises:
        BaseModelError: With the way on.
    """
    trained = read_trained_base(ref.path)
    if trained is not None:
        raise BaseModelError(
            f"{ref.path}: is the trained base of {trained.base.id}, written once for servers; rounded to 16 bits",
            expected="the base model that the adapter was trained on",
            fix=f"merge onto that base: --base {trained.base.id}",
        )
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


def refuse_overlap(out: Path, inputs: Mapping[str, Path]) -> None:
    """Refuse an output that would lie in, replace or hold one of the folders that are read.

    Raises:
        OutputError: With the folder's role.
    """
    target = out.resolve()
    for name, path in inputs.items():
        source = path.resolve()
        if target == source or target in source.parents or source in target.parents:
            raise OutputError(
                f"{out}: lies in, or holds, the folder of the {name} ({path})",
                expected="a folder of its own",
                fix="give another path with --out",
            )


def require_space(out: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse what would not fit the disk.

    Raises:
        OutputError: With what is free.
    """
    require_free_space(out, sum(spec.size_bytes for spec in specs.values()) + SMALL_FILES_BYTES)


def require_memory(layout: BaseLayout) -> None:
    """Verifying holds a layer at a time in fp32; better refused here than killed after the writing.

    Raises:
        OutputError: With what is free.
    """
    largest = max((prod(shape) for name, shape in layout.linear_shapes.items() if name not in layout.tied), default=0)
    needed_bytes = _VERIFY_BYTES + _VERIFY_COPIES * _FP32_BYTES * largest
    free_bytes = free_memory_bytes()
    if free_bytes is not None and free_bytes < needed_bytes:
        raise OutputError(
            f"verifying takes {needed_bytes / 2**30:.1f} GiB of memory, {free_bytes / 2**30:.1f} GiB are free",
            expected="room for the largest layer in fp32 and the logits of two models",
            fix="free memory, merge on a larger machine, or give --no-verify (the writing itself needs little)",
        )


def refuse_misfit(
    files: AdapterFiles, layout: BaseLayout, source: TensorSource, packed: Mapping[str, PackedWeight]
) -> None:
    """Refuse an adapter whose layers are not the base's, or share a weight, and a base without its weights.

    Raises:
        AdapterError: With every layer.
        BaseModelError: With every tensor.
    """
    faults = pair_faults(files, layout.linear_shapes)
    for module in sorted(files.pairs.keys() & layout.tied):
        what = f"{files.weights}: adapts {shown(module)}, which shares its weight with another module of this base"
        fix = "train the adapter without it in target_modules: a merge would change the embedding as well"
        faults.append(Fault(what, "layers with a weight of their own", fix))
    if faults:
        raise AdapterError.of(faults)
    refuse_wrong_weights((files.pairs.keys() | layout.quantized) - layout.tied, layout, source, packed)


def refuse_wrong_weights(
    modules: Iterable[str], layout: BaseLayout, source: TensorSource, packed: Mapping[str, PackedWeight]
) -> None:
    """Refuse a base in whose files the weights of ``modules`` are missing or of another shape or dtype.

    Raises:
        BaseModelError: With every tensor.
    """
    faults = [
        fault for module in sorted(modules) if (fault := _weight_fault(module, layout, source, packed)) is not None
    ]
    if faults:
        raise BaseModelError.of(faults)


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
