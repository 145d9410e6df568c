"""Puts an adapter that passed the gate on a base through PEFT: whole, or not at all.

PEFT gets a configuration of resolved module names and the tensors that were checked, never the adapter's folder. So it
reads no file, imports nothing that a file names, tries no pattern of the author's, and cannot open what took a checked
file's place. The names and shapes that it then expects must be those of the file: it would load others over the base.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import AdapterFiles, AdapterSnapshot, pair_faults
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.four_bit import linear4bit_modules
from qlora_kit.models import linear_shapes
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

MAX_FAULTS = 20
_PREFIX = "base_model.model."
_TOKENS_END = ".token_adapter.trainable_tokens_delta"
_BIAS_END = ".bias"
_FIX = "load the adapter on the base it was trained on, or train an adapter for this base"


@dataclass(frozen=True)
class BaseModules:
    """The modules of a base as they are before any adapter is put on it.

    Attributes:
        linear_shapes: Name of each linear layer to its (out_features, in_features).
        biases: Name of each module with a bias to the bias's shape.
        parameters: Name of each module to the shapes of its own parameters by name; None where an adapter cannot save
            the module: it holds other modules, or its weight is in 4 bits.
    """

    linear_shapes: Mapping[str, tuple[int, int]]
    biases: Mapping[str, tuple[int, ...]]
    parameters: Mapping[str, Mapping[str, tuple[int, ...]] | None]


def base_modules(model: torch.nn.Module) -> BaseModules:
    """Describe ``model``, which must carry no adapter."""
    four_bit = {id(module) for module in linear4bit_modules(model).values()}
    parameters: dict[str, Mapping[str, tuple[int, ...]] | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in four_bit or any(True for _ in module.children()):
            parameters[name] = None
        else:
            own = module.named_parameters(recurse=False)
            parameters[name] = {key: tuple(parameter.shape) for key, parameter in own}
    biases = {
        name.removesuffix(_BIAS_END): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.endswith(_BIAS_END)
    }
    return BaseModules(linear_shapes(model), biases, parameters)


def extra_faults(files: AdapterFiles, base: BaseModules) -> list[Fault]:
    """What keeps the saved modules and trained tokens of an adapter from fitting a base (``pair_faults`` has the rest).

    Args:
        files: A checked adapter.
        base: The base.
    """
    faults: list[Fault] = []
    expected: dict[str, tuple[int, ...]] = {}
    for saved in files.config.modules_to_save:
        for module in _ending_with(saved, base, files, faults):
            own = base.parameters[module] or {}
            expected.update({f"{_PREFIX}{module}.{name}": shape for name, shape in own.items()})
    for key, rows in files.config.trainable_token_indices.items():
        for module in _ending_with(key, base, files, faults):
            shape = (base.parameters[module] or {}).get("weight", ())
            if len(shape) != 2 or not rows or len(set(rows)) < len(rows) or max(rows) >= shape[0]:
                what = f"{files.folder}: trainable_token_indices of {shown(module)} do not fit its shape {shape}"
                faults.append(Fault(what, "different tokens of the base's vocabulary", _FIX))
            else:
                expected[f"{_PREFIX}{module}{_TOKENS_END}"] = (len(rows), shape[1])
    if faults:
        return faults
    magnitudes = {f"{_PREFIX}{module}.lora_magnitude_vector" for module in files.pairs}
    found = {name: files.tensors[name].shape for name in files.extra_tensors if name not in magnitudes}
    return _differences(files, found, expected)


def bias_faults(files: AdapterFiles, base: BaseModules) -> list[Fault]:
    """What keeps the trained biases of an adapter from taking the place of a base's."""
    found = {name: files.tensors[name].shape for name in files.base_tensors}
    expected = {}
    for module, shape in base.biases.items():
        name = f"{_PREFIX}{module}{'.base_layer' if module in files.pairs else ''}{_BIAS_END}"
        if name in found:  # one that is not there stays the base's
            expected[name] = shape
    return _differences(files, found, expected)


def require_fit(files: AdapterFiles, base: BaseModules) -> None:
    """Refuse an adapter that this base cannot take beside others.

    Raises:
        AdapterError: Its tensors do not fit the base; with every fault.
    """
    faults = pair_faults(files, base.linear_shapes) + extra_faults(files, base) + bias_faults(files, base)
    if faults:
        raise AdapterError.of(faults, at_most=MAX_FAULTS)


def attach_adapter(
    model: PreTrainedModel, peft_model: PeftModel | None, adapter: AdapterSnapshot, *, slot: str
) -> PeftModel:
    """Put ``adapter`` on the base beside those that are there; whatever goes wrong, the base is left as it was.

    Its biases are left out (``trained_biases``): the base has one of each, and PEFT would write over it.

    Args:
        model: The base.
        peft_model: What the first call returned; None to make it.
        adapter: What passed the gate and fits the base (``require_fit``).
        slot: PEFT's name for it; never used before, not even by one that failed.

    Raises:
        AdapterError: PEFT does not take it, or expects other tensors than the file holds.
    """
    wrapped = {id(module) for _, module in _wrappers(model)}
    try:
        made = _attached(model, peft_model, adapter, slot)
    except BaseException as error:
        _detach(model, slot, wrapped)
        if peft_model is not None:
            peft_model.peft_config.pop(slot, None)
        elif "peft_config" in vars(model):
            del model.peft_config
        if isinstance(error, TypeError | ValueError):
            what = f"{adapter.files.folder}: PEFT does not take this adapter: {error}"
            raise AdapterError(what, expected="one that fits this base and the adapters on it", fix=_FIX) from error
        raise
    made.eval()
    return made


def detach_adapter(model: PreTrainedModel, slot: str, *, is_last: bool) -> None:
    """Take an attached adapter off again.

    Args:
        model: The base.
        slot: PEFT's name for it.
        is_last: No other adapter is attached: the base gets its own modules back.
    """
    _detach(model, slot, set() if is_last else {id(module) for _, module in _wrappers(model)})
    if is_last:
        del model.peft_config
    else:
        model.peft_config.pop(slot, None)


def _attached(model: PreTrainedModel, peft_model: PeftModel | None, adapter: AdapterSnapshot, slot: str) -> PeftModel:
    import torch
    from peft import get_peft_model

    if peft_model is None:
        peft_model = get_peft_model(model, _peft_settings(adapter.files), adapter_name=slot)
    else:
        peft_model.add_adapter(slot, _peft_settings(adapter.files))
    _refuse_double_wrapping(model, adapter.files)
    # PEFT's own functions for this fail on every adapter beside one with trained tokens (0.21).
    own = {
        _name_in_file(name, slot): parameter for name, parameter in model.named_parameters() if slot in name.split(".")
    }
    brought = adapter.files.tensors.keys() - set(adapter.files.base_tensors)
    found = {name: adapter.files.tensors[name].shape for name in brought}
    faults = _differences(adapter.files, found, {name: tuple(parameter.shape) for name, parameter in own.items()})
    if faults:
        raise AdapterError.of(faults, at_most=MAX_FAULTS)
    with torch.no_grad():
        tensors = adapter_tensors(adapter)
        for name in brought:
            own[name].copy_(tensors[name])
    require_finite(adapter.files, own)
    return peft_model


def trained_biases(adapter: AdapterSnapshot) -> dict[str, torch.Tensor]:
    """Copies of the biases that an adapter brings, by the base's module name."""
    tensors = adapter_tensors(adapter)
    return {
        name.removeprefix(_PREFIX).removesuffix(_BIAS_END).removesuffix(".base_layer"): tensors[name].clone()
        for name in adapter.files.base_tensors
    }


def _name_in_file(parameter: str, slot: str) -> str:
    """The name under which PEFT saves a ``parameter`` of the adapter ``slot``."""
    name = f"{_PREFIX}{parameter}".replace(f".modules_to_save.{slot}.", ".").replace(f".{slot}", "")
    return name.removesuffix(".weight") if name.endswith(".lora_magnitude_vector.weight") else name


def _refuse_double_wrapping(model: torch.nn.Module, files: AdapterFiles) -> None:
    """A saved copy and trained tokens of one module, by two adapters: PEFT nests its wrappers and loses one of them."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    for name, module in _wrappers(model):
        if isinstance(module, AuxiliaryTrainingWrapper) and isinstance(
            module.original_module, AuxiliaryTrainingWrapper
        ):
            what = f"{files.folder}: changes {shown(name)} in another way than an adapter that is loaded already"
            fix = "load the two adapters in two engines"
            raise AdapterError(what, expected="saved modules or trained tokens, for each module", fix=fix)


def _peft_settings(files: AdapterFiles) -> LoraConfig:
    """The adapter's settings with every pattern resolved to the names of the base's modules."""
    from peft import LoraConfig

    settings = files.config
    tokens = {key: list(rows) for key, rows in settings.trainable_token_indices.items()}
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        target_modules=sorted(files.pairs),
        rank_pattern=_by_value({module: pair.r for module, pair in files.pairs.items()}, settings.r),
        alpha_pattern=_by_value({module: settings.alpha_of(module) for module in files.pairs}, settings.lora_alpha),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        modules_to_save=list(settings.modules_to_save) or None,
        trainable_token_indices=tokens or None,
        ensure_weight_tying=settings.ensure_weight_tying,
    )


def _by_value(values: Mapping[str, float], default: float) -> dict[str, float]:
    """One pattern for each value but the default: PEFT tries every pattern on every module."""
    modules: dict[float, list[str]] = {}
    for module, value in values.items():
        modules.setdefault(value, []).append(re.escape(module))
    return {"|".join(names): value for value, names in modules.items() if value != default}


def _ending_with(ending: str, base: BaseModules, files: AdapterFiles, faults: list[Fault]) -> list[str]:
    """The modules that PEFT takes ``ending`` to mean; what is wrong with them is added to ``faults``."""
    modules = [name for name in base.parameters if name.endswith(ending)]
    if not modules:
        faults.append(Fault(f"{files.folder}: {shown(ending)} names no module of the base", "a module of it", _FIX))
    for module in modules:
        if base.parameters[module] is None:
            what = f"{files.folder}: {shown(ending)} names {shown(module)}, a group of modules or a layer in 4 bits"
            faults.append(Fault(what, "single layers that are kept in 16 bits or more", _FIX))
    return modules


def _differences(
    files: AdapterFiles, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> list[Fault]:
    faults = []
    for name in sorted(found.keys() | expected.keys()):
        what = f"{files.weights}: tensor {shown(name)}"
        if name not in found:
            faults.append(Fault(f"{what} is missing", f"shape {expected[name]}", _FIX))
        elif name not in expected:
            faults.append(Fault(f"{what} is not one of this adapter on this base", "only the adapter's tensors", _FIX))
        elif found[name] != expected[name]:
            faults.append(Fault(f"{what} has shape {found[name]}", f"the base's shape {expected[name]}", _FIX))
    return faults


def adapter_tensors(adapter: AdapterSnapshot) -> dict[str, torch.Tensor]:
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    return {
        name: torch.frombuffer(adapter.tensors[name], dtype=dtypes[info.dtype]).reshape(info.shape)
        for name, info in adapter.files.tensors.items()
    }


def require_finite(files: AdapterFiles, loaded: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that took the base's dtype, in which a value of the file may not be finite.

    Raises:
        AdapterError: One of them is not.
    """
    for name, tensor in loaded.items():
        if not bool(tensor.isfinite().all()):
            what = f"{files.weights}: tensor {shown(name)} holds values that {tensor.dtype} cannot hold"
            raise AdapterError(what, expected="values finite in the base's dtype", fix=_FIX)


def _wrappers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost modules that PEFT put around the base's own, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    outer = ""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not (outer and name.startswith(outer)):
            outer = f"{name}."
            yield name, module


def _detach(model: torch.nn.Module, slot: str, wrapped: set[int]) -> None:
    """Take ``slot`` out of the wrappers ``wrapped`` (their ids); give the base back the modules inside all others."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    while added := [(name, module) for name, module in _wrappers(model) if id(module) not in wrapped]:
        for name, module in added:
            parent, _, child = name.rpartition(".")
            is_auxiliary = isinstance(module, AuxiliaryTrainingWrapper)
            setattr(model.get_submodule(parent), child, module.original_module if is_auxiliary else module.base_layer)
    for _, module in _wrappers(model):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(slot, [active for active in module.active_adapters if active != slot])
        else:
            module.delete_adapter(slot)
