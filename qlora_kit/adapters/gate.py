"""The gate for adapters: checks a folder, before PEFT sees it, for one sound LoRA adapter and nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit.adapters.contract_file import CONTRACT_FILE
from qlora_kit.adapters.lora_settings import LoraSettings, read_lora_settings
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.safetensors_header import TensorInfo, read_safetensors_header, shown

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAX_HEADER_BYTES = 16_000_000
MAX_FAULTS = 20
# The state that Hugging Face's Trainer leaves in run folders and checkpoints: never opened here, never copied.
_TRAINER_STATE = ("training_args.bin", "optimizer", "scheduler", "scaler", "rng_state")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_FLOATS = ("F16", "BF16", "F32", "F64")
_BLOCK_BYTES = 1 << 22
_PREFIX = "base_model.model."
_PAIR_ENDS = (".lora_A.weight", ".lora_B.weight")
_MAGNITUDE_END = ".lora_magnitude_vector"
_TOKENS_END = ".token_adapter.trainable_tokens_delta"
_UNTRUSTED = "do not load this adapter; get it from its author again, or train it again"


@dataclass(frozen=True)
class LoraPair:
    """The two factors of one adapted linear layer: A is (r, in_features), B is (out_features, r)."""

    r: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter folder that passed the gate.

    Attributes:
        folder: The folder.
        weights: Its ``adapter_model.safetensors``.
        config: Its LoRA settings.
        contract: Its ``qlora_kit.json``, None for a plain PEFT adapter.
        tensors: Every tensor of the file.
        pairs: By the base's module name (``model.layers.0.self_attn.q_proj``).
        extra_tensors: Tensors beside the pairs that the configuration declares (magnitudes, saved modules, tokens).
        base_tensors: Biases that loading would write over the base's own (``bias`` in the configuration): such an
            adapter must not be loaded onto a base that other adapters share.
        bytes: Size of its own files together.
    """

    folder: Path
    weights: Path
    config: LoraSettings
    contract: Path | None
    tensors: Mapping[str, TensorInfo]
    pairs: Mapping[str, LoraPair]
    extra_tensors: tuple[str, ...]
    base_tensors: tuple[str, ...]
    bytes: int


def check_adapter_folder(folder: Path) -> AdapterFiles:
    """Check that ``folder`` holds one sound LoRA adapter and nothing that loading could do harm with.

    Checked are its files, configuration, tensor names, shapes, dtypes, and that every value is finite (read in blocks).

    Raises:
        AdapterError: With every fault (at most 20) of the first step that finds one: files, then configuration, header,
            names and shapes, values.
    """
    if not folder.is_dir():
        fix = "give the folder of a trained adapter, or its name in the store"
        raise AdapterError(f"{folder}: there is no such folder", expected="an adapter folder", fix=fix)
    _require_sound_files(folder)
    settings = read_lora_settings(folder / CONFIG_FILE)
    weights = folder / WEIGHTS_FILE
    tensors = read_safetensors_header(weights, error=AdapterError, max_header_bytes=MAX_HEADER_BYTES)
    faults, pairs, extra, base = _sort_tensors(weights, tensors, settings)
    if faults:
        raise _all_of(faults)
    faults = _value_faults(weights, tensors)
    if faults:
        raise _all_of(faults)
    contract = folder / CONTRACT_FILE
    own = [weights, folder / CONFIG_FILE, *([contract] if contract.is_file() else [])]
    return AdapterFiles(
        folder=folder,
        weights=weights,
        config=settings,
        contract=contract if contract.is_file() else None,
        tensors=tensors,
        pairs=pairs,
        extra_tensors=tuple(extra),
        base_tensors=tuple(base),
        bytes=sum(path.stat().st_size for path in own),
    )


def pair_faults(files: AdapterFiles, linear_shapes: Mapping[str, tuple[int, int]]) -> list[Fault]:
    """What keeps an adapter from fitting a base: layers the base lacks, other sizes, targeted layers without a pair.

    Args:
        files: A checked adapter.
        linear_shapes: The base's linear layers by module name, as (out_features, in_features).
    """
    fix = "load the adapter on the base it was trained on, or train an adapter for this base"
    faults = []
    for module, pair in files.pairs.items():
        shape = linear_shapes.get(module)
        if shape is None:
            faults.append(
                Fault(f"{files.weights}: adapts {shown(module)}, which the base lacks", "a layer of the base", fix)
            )
        elif shape != (pair.out_features, pair.in_features):
            what = f"{files.weights}: adapts {shown(module)} as {(pair.out_features, pair.in_features)}"
            faults.append(Fault(what, f"the base's shape {shape}", fix))
    for module in linear_shapes:
        if module not in files.pairs and files.config.targets(module):
            what = f"{files.weights}: has no tensors for {shown(module)}, though its target_modules name it"
            faults.append(Fault(what, "a pair for each targeted layer of the base", fix))
    return faults


def require_shareable(files: AdapterFiles) -> None:
    """Refuse an adapter that loading would write over the base with: other adapters share that base.

    Raises:
        AdapterError: It brings biases of the base.
    """
    if files.base_tensors:
        raise AdapterError(
            f"{files.folder}: the adapter brings tensors of the base itself: {', '.join(files.base_tensors[:3])}",
            expected="an adapter that leaves the shared base as it is",
            fix="train it without biases (bias: none)",
        )


def require_regular_file(path: Path) -> None:
    """Refuse a path that is missing, a symbolic link, or no regular file.

    Raises:
        AdapterError: It is.
    """
    expected = "a regular file"
    if not os.path.lexists(path):
        fix = "give the folder that training wrote, or download the whole adapter"
        raise AdapterError(f"{path}: there is no such file", expected=expected, fix=fix)
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        fix = "copy the file itself into the folder (cp -L), after a look at where the link points"
        raise AdapterError(f"{path}: is a symbolic link", expected=expected, fix=fix)
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path}: is not a regular file", expected=expected, fix=_UNTRUSTED)


def _require_sound_files(folder: Path) -> None:
    faults: list[Fault] = []
    for path in sorted(folder.iterdir()):
        is_state = path.name.startswith(_TRAINER_STATE)
        if path.suffix.lower() in _PICKLE_SUFFIXES and not is_state:
            what = f"{path}: a pickle file, which can run code when it is loaded"
            fix = f"delete it if {WEIGHTS_FILE} is there too; else save the adapter again with save_pretrained"
            faults.append(Fault(what, f"weights as {WEIGHTS_FILE} only", fix))
    for name in (WEIGHTS_FILE, CONFIG_FILE, CONTRACT_FILE):
        if name == CONTRACT_FILE and not os.path.lexists(folder / name):
            continue
        try:
            require_regular_file(folder / name)
        except AdapterError as error:
            faults.extend(error.faults)
    if faults:
        raise _all_of(faults)


def _sort_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], settings: LoraSettings
) -> tuple[list[Fault], dict[str, LoraPair], list[str], list[str]]:
    """Faults, pairs by module, declared extra tensors, declared biases of the base."""
    faults: list[Fault] = []
    factors: dict[str, dict[str, TensorInfo]] = {}
    magnitudes: dict[str, TensorInfo] = {}
    extra: list[str] = []
    base: list[str] = []
    for name, info in tensors.items():
        module, end = _split_name(name)
        is_tokens = end == _TOKENS_END and settings.adapts_tokens(module, info.shape)
        is_saved = end == "" and settings.saves_module(module)
        if info.dtype not in _FLOATS:
            faults.append(_tensor_fault(path, name, f"has dtype {info.dtype}", f"one of {', '.join(_FLOATS)}"))
        if end in _PAIR_ENDS and settings.targets(module):
            factors.setdefault(module, {})[end] = info
        elif end == _MAGNITUDE_END and settings.use_dora and settings.targets(module):
            magnitudes[module] = info
            extra.append(name)
        elif is_tokens or is_saved:
            extra.append(name)
        elif end == "" and settings.declares_bias(module) and len(info.shape) == 1:
            base.append(name)
        else:
            expected = f"only tensors that {CONFIG_FILE} declares: loading others can overwrite the base model"
            faults.append(_tensor_fault(path, name, "is not declared", expected))
    if not factors and not faults:
        faults.append(Fault(f"{path}: holds no LoRA pair", "lora_A and lora_B of each adapted layer", _UNTRUSTED))
    pairs: dict[str, LoraPair] = {}
    for module, ends in factors.items():
        faults.extend(_pair_shape_faults(path, module, ends, r=settings.rank_of(module)))
        if len(ends) == 2 and all(len(info.shape) == 2 for info in ends.values()):
            a, b = ends[_PAIR_ENDS[0]].shape, ends[_PAIR_ENDS[1]].shape
            pairs[module] = LoraPair(r=a[0], in_features=a[1], out_features=b[0])
    if settings.use_dora:
        faults.extend(_magnitude_faults(path, pairs, magnitudes))
    return faults, pairs, extra, base


def _split_name(name: str) -> tuple[str, str]:
    """Module and ending of a tensor name: no module without PEFT's prefix, all module without a known ending."""
    if not name.startswith(_PREFIX):
        return "", name
    module = name.removeprefix(_PREFIX)
    for end in (*_PAIR_ENDS, _MAGNITUDE_END, _TOKENS_END):
        if module.endswith(end):
            return module.removesuffix(end), end
    return module, ""


def _pair_shape_faults(path: Path, module: str, ends: Mapping[str, TensorInfo], *, r: int) -> list[Fault]:
    faults = []
    for end, axis in zip(_PAIR_ENDS, (0, 1), strict=True):
        name = f"{_PREFIX}{module}{end}"
        if end not in ends:
            faults.append(_tensor_fault(path, name, "is missing", "both factors of each pair"))
            continue
        shape = ends[end].shape
        if len(shape) != 2 or 0 in shape or shape[axis] != r:
            wanted = f"({r}, in_features)" if axis == 0 else f"(out_features, {r})"
            faults.append(
                _tensor_fault(path, name, f"has shape {shape}", f"{wanted}, the rank that {CONFIG_FILE} gives")
            )
    return faults


def _magnitude_faults(path: Path, pairs: Mapping[str, LoraPair], magnitudes: Mapping[str, TensorInfo]) -> list[Fault]:
    faults = []
    for module in sorted(pairs.keys() | magnitudes.keys()):
        name = f"{_PREFIX}{module}{_MAGNITUDE_END}"
        if module not in magnitudes:
            faults.append(
                _tensor_fault(path, name, "is missing", "a magnitude for each pair, because use_dora is true")
            )
        elif module not in pairs:
            faults.append(_tensor_fault(path, name, "has no pair", "lora_A and lora_B beside each magnitude"))
        elif magnitudes[module].shape != (pairs[module].out_features,):
            faults.append(
                _tensor_fault(path, name, f"has shape {magnitudes[module].shape}", f"({pairs[module].out_features},)")
            )
    return faults


def _value_faults(path: Path, tensors: Mapping[str, TensorInfo]) -> list[Fault]:
    import numpy as np

    # All bits of the exponent set: infinite or not a number.
    kinds: dict[str, tuple[np.dtype[Any], int]] = {
        "F16": (np.dtype("<u2"), 0x7C00),
        "BF16": (np.dtype("<u2"), 0x7F80),
        "F32": (np.dtype("<u4"), 0x7F80_0000),
        "F64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
    }
    faults = []
    with path.open("rb") as file:
        for name, info in tensors.items():
            dtype, exponent = kinds[info.dtype]
            mask = dtype.type(exponent)
            file.seek(info.start)
            remaining = info.size_bytes
            not_finite = 0
            while remaining > 0:
                block = file.read(min(remaining, _BLOCK_BYTES))
                if not block or len(block) % dtype.itemsize:
                    raise AdapterError(
                        f"{path}: became shorter while it was read", expected="a file at rest", fix=_UNTRUSTED
                    )
                remaining -= len(block)
                bits = np.frombuffer(block, dtype=dtype)
                not_finite += int(np.count_nonzero((bits & mask) == mask))
            if not_finite:
                faults.append(
                    _tensor_fault(path, name, f"holds {not_finite} values that are NaN or infinite", "finite values")
                )
    return faults


def _tensor_fault(path: Path, name: str, what: str, expected: str) -> Fault:
    return Fault(f"{path}: tensor {shown(name)} {what}", expected, _UNTRUSTED)


def _all_of(faults: list[Fault]) -> Exception:
    if len(faults) > MAX_FAULTS:
        rest = Fault(f"... and {len(faults) - MAX_FAULTS} more faults of this adapter", "none", _UNTRUSTED)
        faults = [*faults[:MAX_FAULTS], rest]
    return AdapterError.of(faults)
