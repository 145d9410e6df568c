"""Reads PEFT's ``adapter_config.json`` strictly: only settings whose effect the kit knows, each in its bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qlora_kit.adapters.lora_setting_kinds import KINDS
from qlora_kit.adapters.module_pattern import (
    MAX_NAME_CHARACTERS,
    ModulePattern,
    is_plain,
    module_matcher,
    names_module,
    pattern_names_end_of,
)
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.safetensors_header import shown
from qlora_kit.strict_json import read_json_object

MAX_CONFIG_BYTES = 4_000_000
MAX_FAULTS = 20
# Keys without effect on a loaded adapter; any value will do.
_INERT_KEYS = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "lora_dropout",
    "corda_config",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
)
_OFF: tuple[Any, ...] = (None, False, {}, [])
_EXPRESSION_COST = 100
_FIX = "get the adapter from its author again, or train it with settings of this list"


@dataclass(frozen=True)
class LoraSettings:
    """What an ``adapter_config.json`` declares; the names are PEFT's own.

    Attributes:
        r: Rank of every pair that ``rank_pattern`` does not name.
        lora_alpha: Scale numerator of every pair that ``alpha_pattern`` does not name.
        target_modules: Module names or endings, or one regular expression.
        ensure_weight_tying: Whether what is tied to a saved embedding follows it.
        base_model_name_or_path: As the file says; nothing is looked up there.
        peft_version: Of the PEFT that wrote the file; None from versions that did not say.
    """

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]]
    bias: str
    use_rslora: bool
    use_dora: bool
    ensure_weight_tying: bool
    base_model_name_or_path: str | None
    peft_version: str | None

    def targets(self, module: str) -> bool:
        """Whether ``module`` (``model.layers.0.self_attn.q_proj``) is adapted: PEFT's own rules."""
        if (
            self.saves_module(module)
            or names_module(self._excluded, module)
            or not names_module(self._targeted, module)
        ):
            return False
        by_ending = isinstance(self._targeted, frozenset) and module not in self._targeted
        return (
            not by_ending
            or self.layers_to_transform is None
            or _layer(self.layers_pattern, module) in self.layers_to_transform
        )

    @property
    def matching_cost(self) -> int:
        """How long the patterns take on one module name, in comparisons with a plain name."""
        patterns = [*self.rank_pattern, *self.alpha_pattern]
        plain = sum(is_plain(pattern) for pattern in patterns)
        modules = [value for value in (self._targeted, self._excluded) if isinstance(value, ModulePattern)]
        names = len(self.layers_pattern) + len(self.modules_to_save) + len(self.trainable_token_indices)
        return 1 + plain + names + _EXPRESSION_COST * (len(patterns) - plain + len(modules))

    @cached_property
    def _targeted(self) -> frozenset[str] | ModulePattern | None:
        return module_matcher(self.target_modules)

    @cached_property
    def _excluded(self) -> frozenset[str] | ModulePattern | None:
        return module_matcher(self.exclude_modules)

    def rank_of(self, module: str) -> int:
        """The rank of ``module``'s pair."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """The ``lora_alpha`` of ``module``'s pair."""
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha)

    def scaling_of(self, module: str) -> float:
        """The factor before B·A: alpha/r, or alpha/√r for rsLoRA (https://arxiv.org/abs/2312.03732)."""
        r = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(r) if self.use_rslora else r)

    def saves_module(self, name: str) -> bool:
        """Whether the module ``name`` belongs to ``modules_to_save``, or lies in one that does."""
        return any(f".{module}." in f".{name}." for module in self.modules_to_save)

    def saves_tensor(self, name: str) -> bool:
        """Whether the tensor ``name`` is a parameter of one of ``modules_to_save``, which for PEFT are endings."""
        module = name.rpartition(".")[0]
        return module.endswith(self.modules_to_save) if module else False

    def declares_bias(self, tensor: str) -> bool:
        """Whether ``tensor`` is a bias of the base that ``bias`` says was trained."""
        if not tensor.endswith(".bias"):
            return False
        module = tensor.removesuffix(".bias")
        if module.endswith(".base_layer"):
            return self.bias != "none" and self.targets(module.removesuffix(".base_layer"))
        return self.bias == "all" and "lora_" not in module

    def token_ids_of(self, module: str) -> tuple[int, ...]:
        """The rows of ``module`` that ``trainable_token_indices`` declares."""
        for key, rows in self.trainable_token_indices.items():
            if module == key or module.endswith(f".{key}"):
                return rows
        return ()

    def adapts_tokens(self, module: str, shape: tuple[int, ...]) -> bool:
        """Whether ``trainable_token_indices`` declares rows of ``module``, as many as ``shape`` has."""
        return len(shape) == 2 and 0 < shape[0] == len(self.token_ids_of(module))


def read_lora_settings(path: Path) -> LoraSettings:
    """Read ``path``, an ``adapter_config.json``.

    Raises:
        AdapterError: With every fault: no LoRA, a setting out of its bounds, or one whose effect the kit does not know.
    """
    fix = "give the folder that training wrote, or download the whole adapter"
    content = read_json_object(path, max_bytes=MAX_CONFIG_BYTES, error=AdapterError, fix=fix)
    if content.get("peft_type") != "LORA":
        what = f"{path}: peft_type is {shown(str(content.get('peft_type')))}"
        raise AdapterError(what, expected="LORA: this kit loads LoRA adapters only", fix="use a LoRA adapter")
    faults = [
        Fault(f"{path}: {key} is {shown(str(content.get(key)))}", expected, _FIX)
        for key, (expected, accepts) in KINDS.items()
        if not accepts(content.get(key))
    ]
    known = f"only settings that the kit knows: {', '.join(sorted(KINDS))}"
    for key in sorted(content.keys() - KINDS.keys() - {"peft_type", *_INERT_KEYS}):
        if content[key] not in _OFF:
            faults.append(Fault(f"{path}: {shown(key)} is set to {shown(str(content[key]))}", known, _FIX))
    if isinstance(content.get("target_modules"), str) and content.get("layers_to_transform") not in (None, []):
        what = f"{path}: layers_to_transform is set beside target_modules as one text"
        faults.append(Fault(what, "layers_to_transform only beside a list of module names", _FIX))
    if faults:
        raise AdapterError.of(faults, at_most=MAX_FAULTS)
    return _settings(content)


def _settings(content: Mapping[str, Any]) -> LoraSettings:
    tokens = content.get("trainable_token_indices") or {}
    base, peft_version = content.get("base_model_name_or_path"), content.get("peft_version")
    return LoraSettings(
        r=content["r"],
        lora_alpha=content["lora_alpha"],
        target_modules=_text_or_tuple(content["target_modules"]),
        exclude_modules=_text_or_tuple(content.get("exclude_modules")),
        layers_to_transform=_numbers(content.get("layers_to_transform")),
        layers_pattern=_as_tuple(content.get("layers_pattern")),
        rank_pattern=content.get("rank_pattern") or {},
        alpha_pattern=content.get("alpha_pattern") or {},
        modules_to_save=_as_tuple(content.get("modules_to_save")),
        trainable_token_indices={
            key: tuple(rows) for key, rows in (tokens if isinstance(tokens, dict) else {"embed_tokens": tokens}).items()
        },
        bias=content.get("bias") or "none",
        use_rslora=bool(content.get("use_rslora")),
        use_dora=bool(content.get("use_dora")),
        ensure_weight_tying=bool(content.get("ensure_weight_tying")),
        base_model_name_or_path=base if isinstance(base, str) else None,
        peft_version=peft_version if isinstance(peft_version, str) else None,
    )


def _layer(patterns: tuple[str, ...], module: str) -> int | None:
    for pattern in patterns or (r"[^.]*",):
        match = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", module)
        if match is not None:
            return int(match["index"])
    return None


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    if len(module) > MAX_NAME_CHARACTERS:
        return default
    for pattern, value in patterns.items():
        if pattern_names_end_of(pattern, module):
            return value
    return default


def _text_or_tuple(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else _as_tuple(value)


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _numbers(value: Any) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    return (value,) if isinstance(value, int) else tuple(value)
