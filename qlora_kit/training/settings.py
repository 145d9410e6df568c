"""What a run began with: written before its first step, compared when it is resumed; and its config made portable."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import AdapterStore, base_fingerprint, weights_sha256
from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.atomic import atomic_file
from qlora_kit.base_files import TINY, BaseRef
from qlora_kit.config import PartSection, RunConfig, Source
from qlora_kit.data.chat import chat_template_sha256
from qlora_kit.data.ledger import SPLITS, Problem
from qlora_kit.data.sources import Sources, locate_file
from qlora_kit.errors import ConfigError, Fault
from qlora_kit.launched import process_count
from qlora_kit.strict_json import read_json_object
from qlora_kit.suggest import advice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "config.yaml"
START_FILE = "run.json"
MAX_START_BYTES = 2**24
RECORDED_LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets")
# What may differ in a resumed run: where it lies, what it tells and what it keeps; no step's result depends on it.
FREE_KEYS = (
    *("name", "output_dir", "train.memory", "train.save_total_limit", "train.report_to"),
    "train.embedding_on_host",
    *("eval.limit", "eval.metrics", "eval.stop_rate_rows", "eval.report_samples"),
)
FREE_PREFIXES = ("train.logging",)
_ANEW = "start again with --overwrite, or in another output_dir"
_HASHED = {
    "model.base.weights": "the base holds other weights (model.base.weights)",
    "model.tokenizer": "the base's tokenizer is another one (model.tokenizer)",
    "model.chat_template": "the base's chat template renders otherwise (model.chat_template)",
}
_PLACE_OF_BASE = {"model.base", "model.revision", "model.base.commit"}
# The saved weights and optimizer have the shape of these settings; or they chose the best adapter so far, and say
# when the next evaluation is due.
_FIXED_PREFIXES = (
    *("lora.", "train.optim", "train.lr_scheduler_type", "model.adapter"),
    *("train.loraplus", "train.layerwise", "train.unfreeze"),
    *("train.metric", "train.eval_s", "train.save_s", "data.validation"),
)
_ROWS_OF_A_STEP = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "processes")
_CHANGEABLE = ("lora.lora_alpha", "lora.lora_dropout")

logger = logging.getLogger(__name__)


def portable(config: RunConfig) -> RunConfig:
    """The same configuration with paths that hold without its YAML and in another folder.

    Data are named relative to the current folder if they lie in it, a base's folder absolutely: the contract names
    it as well.
    """
    mix = tuple(part.model_copy(update=_portable_sources(config, part)) for part in config.data.mix)
    data = config.data.model_copy(update={**_portable_sources(config, config.data), "mix": mix})
    base = config.model.base
    if base != TINY and Path(base).is_dir():
        base = os.path.abspath(base)
    return config.model_copy(update={"data": data, "model": config.model.model_copy(update={"base": base})})


def _portable_sources(config: RunConfig, part: PartSection) -> dict[str, tuple[Source, ...]]:
    return {
        split: tuple(
            _shortest(locate_file(config, entry)) if isinstance(entry, str) else entry for entry in part.of(split)
        )
        for split in SPLITS
    }


def _shortest(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path.absolute()) if relative.startswith(os.pardir) else relative


@dataclass(frozen=True)
class Start:
    """What a run began with.

    Attributes:
        settings: Dotted key -> value, with hashes in place of data, base and tokenizer.
        told: What may change, but is told: library versions, the device.
        began_sha256: Of the settings of the first start; each checkpoint carries it.
        changes: What was allowed to change since: the checkpoint gone on from, the key, both values.
    """

    settings: dict[str, Any]
    told: dict[str, Any]
    began_sha256: str
    changes: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, config: RunConfig, tokenizer: PreTrainedTokenizerBase, ref: BaseRef, device: torch.device) -> Start:
        """What a run of ``config`` begins with."""
        settings = json.loads(json.dumps({**_settings(config), **_identity(tokenizer, ref)}))
        told = {name: version(name) for name in RECORDED_LIBRARIES} | {"device": device.type}
        return cls(settings, told, _hash(settings))

    def write(self, folder: Path) -> None:
        """Note it in a run folder."""
        with atomic_file(folder / START_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Start:
        """What the run in ``folder`` began with.

        Raises:
            ConfigError: There is no usable note of it.
        """
        path = folder / START_FILE
        values = read_json_object(path, max_bytes=MAX_START_BYTES, error=ConfigError, fix=_ANEW)
        try:
            return cls(**{**values, "changes": tuple(values["changes"])})
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: is not what the kit writes ({error})", expected="it as it was", fix=_ANEW
            ) from error


def resumed_start(began: Start, now: Start, *, allowed: Sequence[str], checkpoint: Path) -> Start:
    """What a resumed run goes on with: the same settings, but for changes that ``allowed`` names.

    Args:
        began: From the run folder.
        now: Of the configuration at hand.
        allowed: Keys; ``model.base`` also stands for the base's weights.
        checkpoint: It goes on from there.

    Raises:
        ConfigError: With every other key that differs, its old and its new value; or a name in ``allowed`` is no key,
            or one that what was saved depends on; or a step would take another number of rows.
    """
    keys = sorted({*began.settings, *now.settings})
    _require_changeable(allowed, keys)
    differing = [key for key in keys if began.settings.get(key) != now.settings.get(key) and not _is_free(key)]
    if not any(key in differing for key in _HASHED):  # the same base, in another place or by another name
        for key in _PLACE_OF_BASE & {*differing}:
            logger.warning("%s: the same base", _difference(key, began.settings.get(key), now.settings.get(key)))
        differing = [key for key in differing if key not in _PLACE_OF_BASE]
    permitted = [key for key in differing if any(key == name or key.startswith(name + ".") for name in allowed)]
    faults = [
        Fault(
            _difference(key, began.settings.get(key), now.settings.get(key)),
            "what the run began with",
            f"set {key} back, {'' if _is_fixed(key) else f'allow the change with --allow-changed {key}, '}or {_ANEW}",
        )
        for key in differing
        if key not in permitted
    ]
    if faults:
        raise ConfigError.of(faults)
    _require_same_rows_of_a_step(began, now, checkpoint)
    for key in permitted:
        logger.warning("%s, as allowed", _difference(key, began.settings.get(key), now.settings.get(key)))
    for name in sorted({*began.told, *now.told}):
        was, is_now = began.told.get(name), now.told.get(name)
        if was != is_now:
            logger.warning("--resume: %s is %s, the run began with %s: the last bits may differ", name, is_now, was)
    changes = [
        {"from": checkpoint.name, "key": key, "old": began.settings.get(key), "new": now.settings.get(key)}
        for key in permitted
    ]
    return replace(now, began_sha256=began.began_sha256, changes=(*began.changes, *changes))


def _require_same_rows_of_a_step(began: Start, now: Start, checkpoint: Path) -> None:
    """A checkpoint says after which step it was saved; with other rows in a step, that is another place in the data."""
    before, after = (math.prod(int(start.settings[key]) for key in _ROWS_OF_A_STEP) for start in (began, now))
    if before != after:
        raise ConfigError(
            f"--resume: a step would take {after} rows, the run began with {before}: {checkpoint.name} counts steps, "
            "and rows would be trained again or left out",
            expected=f"{before} rows: " + " x ".join(_ROWS_OF_A_STEP),
            fix="change one against the other; for another number of rows, begin a new run that goes on from the "
            "adapter of this one (model.adapter)",
        )


def _require_changeable(allowed: Sequence[str], keys: Sequence[str]) -> None:
    known = "a setting such as train.learning_rate, data.train or model.base"
    faults = [
        Fault(f"--allow-changed: {name!r} is no setting of this run", known, advice(name, keys))
        for name in allowed
        if name not in keys
    ]
    faults += [
        Fault(
            f"--allow-changed: {name} cannot change, what was saved depends on it", known, f"leave it out, or {_ANEW}"
        )
        for name in allowed
        if _is_fixed(name)
    ]
    if faults:
        raise ConfigError.of(faults)


def _is_fixed(key: str) -> bool:
    return key.startswith(_FIXED_PREFIXES) and key not in _CHANGEABLE


def _is_free(key: str) -> bool:
    return key in FREE_KEYS or key.startswith(FREE_PREFIXES)


def _difference(key: str, began: object, now: object) -> str:
    if key in {f"data.{split}" for split in SPLITS}:
        return f"--resume: the files of {key} hold other data"
    if key == "model.adapter" and began is not None and now is not None:
        return "--resume: model.adapter names other weights"
    if key in _HASHED:
        return f"--resume: {_HASHED[key]}"
    return f"--resume: {key} is {now!r}, the run began with {began!r}"


def _identity(tokenizer: PreTrainedTokenizerBase, ref: BaseRef) -> dict[str, object]:
    return {
        "model.base.weights": base_fingerprint(ref.path),
        "model.base.commit": ref.revision,
        "model.tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "model.chat_template": chat_template_sha256(tokenizer),
        "processes": process_count(),
    }


def _hash(settings: dict[str, Any]) -> str:
    fixed = {key: value for key, value in settings.items() if not _is_free(key)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def _settings(config: RunConfig) -> dict[str, object]:
    """Every key of the configuration, dotted, with its value; in place of files and adapters, hashes of their bytes."""
    flat: dict[str, object] = {}
    for section, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{section}.{key}": item for key, item in value.items()}
        else:
            flat[section] = value
    if config.model.adapter is not None:
        flat["model.adapter"] = weights_sha256(AdapterStore(DEFAULT_STORE).get(config.model.adapter))
    flat["data.mix"] = [part.model_dump(mode="json", exclude=set(SPLITS)) for part in config.data.mix]
    sources = Sources(config)
    for split in SPLITS:
        flat[f"data.{split}"] = [
            source.sha256()
            for entry in config.sources(split)
            if not isinstance(named := sources.of(entry), Problem)
            for source in named
        ]
    return flat
