"""The configuration as a run folder keeps it: readable from anywhere, and compared when the run is resumed."""

from __future__ import annotations

import os
from pathlib import Path

from qlora_kit.config import RunConfig, load_config
from qlora_kit.errors import ConfigError, Fault

CONFIG_FILE = "config.yaml"
# What may differ in a resumed run: where it lies, what it tells and what it keeps; no step's result depends on it.
FREE_KEYS = ("name", "output_dir", "train.save_total_limit", "train.report_to")
FREE_PREFIXES = ("eval.", "train.logging")


def portable(config: RunConfig) -> RunConfig:
    """The same configuration, its data paths relative to the current folder also where they lay beside the YAML."""
    paths = {name: tuple(map(os.path.relpath, found)) for name, found in _data_paths(config).items()}
    return config.model_copy(update={"data": config.data.model_copy(update=paths)})


def require_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to resume a run with settings that it did not begin with.

    Raises:
        ConfigError: With every key that differs, its old and its new value.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no {CONFIG_FILE}, so that nothing says how this run began",
            expected="the configuration that a run writes before its first step",
            fix="start again with --overwrite",
        )
    began, now = _flat(load_config(path)), _flat(config)
    faults = [
        Fault(
            f"--resume: {key} is {now.get(key)!r}, the run began with {began.get(key)!r}",
            "the settings of the run that is resumed",
            f"set {key} back, or start a new run in another output_dir",
        )
        for key in sorted({*began, *now})
        if began.get(key) != now.get(key) and key not in FREE_KEYS and not key.startswith(FREE_PREFIXES)
    ]
    if faults:
        raise ConfigError.of(faults)


def _flat(config: RunConfig) -> dict[str, object]:
    """Every key, dotted, with its value; data files by their place on the disk."""
    flat: dict[str, object] = {}
    for section, value in config.model_dump(mode="json").items():
        flat |= (
            {f"{section}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {section: value}
        )
    for name, paths in _data_paths(config).items():
        flat[f"data.{name}"] = [str(path.resolve()) for path in paths]
    return flat


def _data_paths(config: RunConfig) -> dict[str, list[Path]]:
    data = config.data
    named = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: [config.resolve(path) for path in paths] for name, paths in named.items()}
