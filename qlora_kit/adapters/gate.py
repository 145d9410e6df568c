"""The gate for adapters: checks a folder, before PEFT sees it, for one sound LoRA adapter and nothing else."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qlora_kit.adapters.contract_file import CONTRACT_FILE
from qlora_kit.adapters.lora_settings import LoraSettings, read_lora_settings
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.regular_file import open_regular
from qlora_kit.safetensors_header import DTYPE_BYTES, TensorInfo, read_open_header, shown

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
MAX_HEADER_BYTES = 16_000_000
MAX_WEIGHTS_BYTES = 1 << 36
MAX_FEATURES = 1 << 22
MAX_FAULTS = 20
# Comparisons of a module's name with a pattern: about 10 seconds, a hundred times what the largest real adapters need.
_MAX_COMPARISONS = 10_000_000
# The state that Hugging Face's Trainer leaves in run folders and checkpoints: never opened here, never copied.
_TRAINER_STATE = ("training_args.bin", "optimizer", "scheduler", "scaler", "rng_state")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_FLOATS = ("F16", "BF16", "F32", "F64")
_BLOCK_BYTES = 1 << 22
_PREFIX = "base_model.model."
_PAIR_ENDS = (".lora_A.weight", ".lora_B.weight")
_MAGNITUDE_END = ".lora_magnitude_vector"
_TOKENS_END = ".token_adapter.trainable_tokens_delta"
UNTRUSTED = "do not load this adapter; get it from its author again, or train it again"


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
        token_rows: Trained rows of embedding and head: the base's module name to the rows' numbers.
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
    token_rows: Mapping[str, tuple[int, ...]]
    base_tensors: tuple[str, ...]
    bytes: int

    @staticmethod
    def token_tensor(module: str) -> str:
        """The tensor that holds the trained rows of ``module``: (rows, hidden size)."""
        return f"{_PREFIX}{module}{_TOKENS_END}"

    @staticmethod
    def pair_tensors(module: str) -> tuple[str, str]:
        """The tensors that hold A (r, in_features) and B (out_features, r) of ``module``."""
        a, b = (f"{_PREFIX}{module}{end}" for end in _PAIR_ENDS)
        return a, b

    @staticmethod
    def magnitude_tensor(module: str) -> str:
        """The tensor that holds DoRA's magnitude of ``module``: (out_features,)."""
        return f"{_PREFIX}{module}{_MAGNITUDE_END}"


def check_adapter_folder(folder: Path) -> AdapterFiles:
    """Check that ``folder`` holds one sound LoRA adapter and nothing that loading could do harm with.

    Checked are its files, configuration, tensor names, shapes, dtypes, and that every value is finite (read in blocks).

    Raises:
        AdapterError: With every fault (at most 20) of the first step that finds one: files, then configuration, header,
            names and shapes, values.
    """
    with open_adapter(folder) as (files, weights):
        faults = [
            fault
            for name in files.tensors
            if (fault := value_fault(files, name, read_blocks(weights, files, name))) is not None
        ]
        if faults:
            raise AdapterError.of(faults, at_most=MAX_FAULTS)
        return files


@contextmanager
def open_adapter(folder: Path) -> Iterator[tuple[AdapterFiles, BinaryIO]]:
    """The adapter in ``folder`` with everything checked but its values, and its open weights file.

    What is read from the open file is what was checked, whatever takes the file's place meanwhile.

    Raises:
        AdapterError: As ``check_adapter_folder``; at the end also when the weights were written to meanwhile.
    """
    if not os.path.isdir(folder):
        fix = "give the folder of a trained adapter, or its name in the store"
        raise AdapterError(f"{folder}: there is no such folder", expected="an adapter folder", fix=fix)
    weights = folder / WEIGHTS_FILE
    try:
        _require_sound_files(folder)
        settings = read_lora_settings(folder / CONFIG_FILE)
        with open_regular(weights, follow_links=False) as file:
            before = os.fstat(file.fileno())
            if before.st_size > MAX_WEIGHTS_BYTES:
                what, expected = f"{weights}: holds {before.st_size} bytes", f"at most {MAX_WEIGHTS_BYTES} bytes"
                raise AdapterError(what, expected=expected, fix=UNTRUSTED)
            yield _described(folder, settings, file), file
            after = os.fstat(file.fileno())
            if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
                raise _changed(weights)
    except OSError as error:
        fix = "make the folder readable, and leave it alone while it is read"
        what = f"{folder}: cannot be read: {error.strerror}"
        raise AdapterError(what, expected="an adapter folder", fix=fix) from error


def _described(folder: Path, settings: LoraSettings, file: BinaryIO) -> AdapterFiles:
    weights, contract = folder / WEIGHTS_FILE, folder / CONTRACT_FILE
    tensors = read_open_header(file, weights, error=AdapterError, max_header_bytes=MAX_HEADER_BYTES)
    if len(tensors) * settings.matching_cost > _MAX_COMPARISONS:
        what = f"{folder / CONFIG_FILE}: its patterns are too many for {len(tensors)} tensors"
        raise AdapterError(what, expected="fewer or simpler patterns", fix=UNTRUSTED)
    faults, pairs, extra, base = _sort_tensors(weights, tensors, settings)
    if faults:
        raise AdapterError.of(faults, at_most=MAX_FAULTS)
    own = [folder / CONFIG_FILE, *([contract] if contract.is_file() else [])]
    return AdapterFiles(
        folder=folder,
        weights=weights,
        config=settings,
        contract=contract if contract.is_file() else None,
        tensors=tensors,
        pairs=pairs,
        extra_tensors=tuple(extra),
        token_rows={
            module: settings.token_ids_of(module) for module, end in map(_split_name, tensors) if end == _TOKENS_END
        },
        base_tensors=tuple(base),
        bytes=sum(path.stat().st_size for path in own) + os.fstat(file.fileno()).st_size,
    )


def require_regular_file(path: Path) -> None:
    """Refuse a path that is missing, a symbolic link, or no regular file.

    Raises:
        AdapterError: It is.
    """
    expected = "a regular file"
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        fix = "give the folder that training wrote, or download the whole adapter"
        raise AdapterError(f"{path}: there is no such file", expected=expected, fix=fix) from error
    if stat.S_ISLNK(mode):
        fix = "copy the file itself into the folder (cp -L), after a look at where the link points"
        raise AdapterError(f"{path}: is a symbolic link", expected=expected, fix=fix)
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path}: is not a regular file", expected=expected, fix=UNTRUSTED)


def _require_sound_files(folder: Path) -> None:
    faults: list[Fault] = []
    for path in sorted(folder.iterdir()):
        is_state = path.name.startswith(_TRAINER_STATE)
        if path.suffix.lower() in _PICKLE_SUFFIXES and not is_state:
            what = f"{folder}: {shown(path.name)} is a pickle file, which can run code when it is loaded"
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
        raise AdapterError.of(faults, at_most=MAX_FAULTS)


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
        is_saved = end == "" and settings.saves_tensor(module)
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
        faults.append(Fault(f"{path}: holds no LoRA pair", "lora_A and lora_B of each adapted layer", UNTRUSTED))
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
        if len(shape) != 2 or 0 in shape or shape[axis] != r or max(shape) > MAX_FEATURES:
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


def read_blocks(file: BinaryIO, files: AdapterFiles, name: str) -> Iterator[bytes]:
    """The bytes of the tensor ``name`` from the open weights ``file``, a few MB at a time.

    Raises:
        AdapterError: The file became shorter.
    """
    info = files.tensors[name]
    file.seek(info.start)
    remaining = info.size_bytes
    while remaining > 0:
        block = file.read(min(remaining, _BLOCK_BYTES))
        if not block or len(block) % DTYPE_BYTES[info.dtype]:
            raise _changed(files.weights)
        remaining -= len(block)
        yield block


def value_fault(files: AdapterFiles, name: str, blocks: Iterable[bytes]) -> Fault | None:
    """What is wrong with the values of the tensor ``name``, given its bytes: not finite, or too large for fp32.

    Adapters are computed with in fp32 at most, where a larger fp64 value would become infinite.
    """
    import numpy as np

    # Without their sign bit, the bits of floats are ordered as the floats are: the largest that is allowed.
    kinds: dict[str, tuple[str, int]] = {
        "F16": ("<u2", 0x7BFF),
        "BF16": ("<u2", 0x7F7F),
        "F32": ("<u4", 0x7F7F_FFFF),
        "F64": ("<u8", 0x47EF_FFFF_E000_0000),
    }
    kind, largest = kinds[files.tensors[name].dtype]
    dtype = np.dtype(kind)
    unsigned = dtype.type(2 ** (8 * dtype.itemsize - 1) - 1)
    bad = sum(int(np.count_nonzero((np.frombuffer(block, dtype) & unsigned) > largest)) for block in blocks)
    if bad == 0:
        return None
    return _tensor_fault(files.weights, name, f"holds {bad} values that are NaN or infinite", "values finite in fp32")


def _changed(path: Path) -> AdapterError:
    fix = "load it again once nothing writes to it"
    return AdapterError(f"{path}: changed while it was read", expected="a file at rest", fix=fix)


def _tensor_fault(path: Path, name: str, what: str, expected: str) -> Fault:
    return Fault(f"{path}: tensor {shown(name)} {what}", expected, UNTRUSTED)
