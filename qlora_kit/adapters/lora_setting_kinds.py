"""Which values each setting of PEFT's ``adapter_config.json`` may have: a table of words for people and checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from qlora_kit.adapters.module_pattern import MAX_CHARACTERS, is_plain, parse_pattern

MAX_RANK = 1024
_BIASES = ("none", "all", "lora_only")
# Other initialisations (PiSSA, OLoRA, LoftQ, CorDA, ...) run again when PEFT loads the adapter, and
# rewrite the base's weights.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
_MAX_EXPRESSIONS = 1000
_EXPRESSION = f"one regular expression of at most {MAX_CHARACTERS} characters, without repeated groups"


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1e6


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    if is_plain(value):
        return len(value) <= MAX_CHARACTERS
    try:
        parse_pattern(value)
    except ValueError:
        return False
    return True


def _is_patterns(value: Any) -> bool:
    if not isinstance(value, dict) or sum(not is_plain(key) for key in value) > _MAX_EXPRESSIONS:
        return False
    return all(_is_pattern(key) for key in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.-]{1,256}", value) is not None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(_is_name(item) for item in value)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_indices(value: Any) -> bool:
    return isinstance(value, list) and all(_is_index(item) for item in value)


def _is_token_ids(value: Any) -> bool:
    return _is_indices(value) and len(set(value)) == len(value)


def _is_auto_mapping(value: Any) -> bool:
    """PEFT imports the module named here; transformers' own are what it writes itself."""
    return value is None or (
        isinstance(value, dict) and str(value.get("parent_library")).startswith("transformers.models.")
    )


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


_Kind = tuple[str, Callable[[Any], bool]]
KINDS: dict[str, _Kind] = {
    "task_type": ("CAUSAL_LM or null", lambda value: value in (None, "CAUSAL_LM")),
    "auto_mapping": ("null, or a class of transformers", _is_auto_mapping),
    "r": (f"a whole number from 1 to {MAX_RANK}", _is_rank),
    "lora_alpha": ("a number above 0, at most a million", _is_alpha),
    "target_modules": (
        f"a list of module names, or {_EXPRESSION}",
        lambda value: (_is_names(value) and bool(value)) or _is_pattern(value),
    ),
    "exclude_modules": (
        f"null, a list of module names, or {_EXPRESSION}",
        lambda value: value is None or _is_names(value) or _is_pattern(value),
    ),
    "layers_to_transform": (
        "null, a layer number, or a list of them",
        lambda value: value is None or _is_index(value) or _is_indices(value),
    ),
    "layers_pattern": (
        "null, a module name, or a list of them",
        lambda value: value in (None, "") or _is_name(value) or _is_names(value),
    ),
    "rank_pattern": (
        f"an object of module patterns to ranks from 1 to {MAX_RANK}",
        lambda value: value is None or (_is_patterns(value) and all(_is_rank(rank) for rank in value.values())),
    ),
    "alpha_pattern": (
        "an object of module patterns to numbers above 0",
        lambda value: value is None or (_is_patterns(value) and all(_is_alpha(alpha) for alpha in value.values())),
    ),
    "modules_to_save": ("null or a list of module names", lambda value: value is None or _is_names(value)),
    "trainable_token_indices": (
        "null, a list of token ids, each once, or an object of module names to such lists",
        lambda value: (
            value is None
            or _is_token_ids(value)
            or (isinstance(value, dict) and all(_is_name(key) and _is_token_ids(rows) for key, rows in value.items()))
        ),
    ),
    "bias": (
        f"one of {', '.join(_BIASES)}",
        lambda value: value is None or (isinstance(value, str) and value in _BIASES),
    ),
    "use_rslora": ("true or false", _is_flag),
    "use_dora": ("true or false", _is_flag),
    "ensure_weight_tying": ("true or false", _is_flag),
    "init_lora_weights": (
        "true, false, gaussian, eva or orthogonal: other initialisations rewrite the base when the adapter is loaded",
        lambda value: not isinstance(value, list | dict) and value in _INITIALISATIONS,
    ),
}
