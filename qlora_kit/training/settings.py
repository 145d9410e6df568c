"""What a run began with: written before its first step, compared when it is resumed; and its config made portable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from qlora_kit.adapters import AdapterStore
from qlora_kit.adapters.store import DEFAULT_STORE
from qlora_kit.config import PartSection, RunConfig, Source
from qlora_kit.data.ledger import SPLITS, Problem
from qlora_kit.data.sources import Sources, locate_file
from qlora_kit.errors import ConfigError, Fault
from qlora_kit.strict_json import read_json_object
from qlora_kit.training.continuing import weights_sha256

CONFIG_FILE = "config.yaml"
START_FILE = "run.json"
MAX_START_BYTES = 2**20
_START_AGAIN = "start again with --overwrite, or in another output_dir"
# What may differ in a resumed run: where it lies, what it tells and what it keeps; no step's result depends on it.
FREE_KEYS = ("name", "output_dir", "train.memory", "train.save_total_limit", "train.report_to")
FREE_PREFIXES = ("eval.", "train.logging")


def portable(config: RunConfig) -> RunConfig:
    """The same configuration with data paths that hold without its YAML: relative to the current folder if under it."""
    mix = tuple(part.model_copy(update=_portable_sources(config, part)) for part in config.data.mix)
    data = config.data.model_copy(update={**_portable_sources(config, config.data), "mix": mix})
    return config.model_copy(update={"data": data})


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


def write_start(config: RunConfig, folder: Path) -> None:
    """Note in ``folder`` what the run begins with."""
    (folder / START_FILE).write_text(json.dumps(_settings(config), indent=2) + "\n", encoding="utf-8")


def read_start(folder: Path) -> dict[str, Any]:
    """What the run in ``folder`` began with: every key of its configuration, dotted.

    Raises:
        ConfigError: There is no sound file.
    """
    return read_json_object(folder / START_FILE, max_bytes=MAX_START_BYTES, error=ConfigError, fix=_START_AGAIN)


def require_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to resume a run with settings or data that it did not begin with.

    Raises:
        ConfigError: With every key that differs, its old and its new value.
    """
    began = read_start(folder)
    now = json.loads(json.dumps(_settings(config)))
    faults = [
        Fault(
            _difference(key, began.get(key), now.get(key)),
            "what the run began with",
            f"set {key} back, or {_START_AGAIN}",
        )
        for key in sorted({*began, *now})
        if began.get(key) != now.get(key) and key not in FREE_KEYS and not key.startswith(FREE_PREFIXES)
    ]
    if faults:
        raise ConfigError.of(faults)


def _difference(key: str, began: object, now: object) -> str:
    if key in {f"data.{split}" for split in SPLITS}:
        return f"--resume: the files of {key} hold other data"
    if key == "model.adapter" and began is not None and now is not None:
        return "--resume: model.adapter names other weights"
    return f"--resume: {key} is {now!r}, the run began with {began!r}"


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
