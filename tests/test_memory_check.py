"""Training compares its plan with the memory at hand: refuses before the base is loaded, adapts, or tries anyway."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qlora_kit.base_files import resolve_description
from qlora_kit.config import RunConfig, load_config
from qlora_kit.data.ledger import Ledger
from qlora_kit.errors import ConfigError
from qlora_kit.memory.cards import GIB
from qlora_kit.memory.planner import fastest_that_fits
from qlora_kit.training import TrainResult, train
from qlora_kit.training.memory_check import within_memory

CPU = torch.device("cpu")


@pytest.fixture
def have(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Makes the host have so much memory free."""

    def give(free_bytes: int | None) -> None:
        monkeypatch.setattr("qlora_kit.training.memory_check.free_memory_bytes", lambda: free_bytes)

    return give


@pytest.fixture
def ledger() -> Ledger:
    """Of 5,000 rows of 10 tokens and one of 300; for validation, two of 20."""
    found = Ledger()
    found.lengths["train"].update({10: 5000, 300: 1})
    found.lengths["validation"].update({20: 2})
    return found


def checked(config: RunConfig, ledger: Ledger, device: torch.device = CPU, **more: Any) -> RunConfig:
    ref = resolve_description(config.model.base, config.model.revision)
    return within_memory(config, ref, ledger, device=device, **more)


def test_what_fits_is_left_alone(run_yaml: Path, ledger: Ledger, have: Callable[..., None]) -> None:
    config = load_config(run_yaml)
    for free in (64 * GIB, None):
        have(free)
        assert checked(config, ledger) == config


def test_what_cannot_fit_is_refused_before_anything_is_loaded_or_made(
    run_yaml: Path, tmp_path: Path, have: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.training.run.load_base_model", lambda *args, **kwargs: pytest.fail("loaded"))
    have(GIB // 2)
    with pytest.raises(ConfigError, match=r"GiB free(.|\n)*expected: (.|\n)*train.memory=ignore"):
        train(load_config(run_yaml, [f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_the_refusal_holds_lines_that_fit(run_yaml: Path, ledger: Ledger, have: Callable[..., None]) -> None:
    overrides = ["train.per_device_train_batch_size=4096", "data.validation="]
    have(2 * GIB)
    with pytest.raises(ConfigError) as caught:
        checked(load_config(run_yaml, overrides), ledger)
    text = str(caught.value)
    assert "in each optimizer step" in text
    lines = re.search(r"^ +train:\n(?: +\w+: \S+\n)+", text, re.MULTILINE)
    assert lines is not None
    pasted = yaml.safe_load(textwrap.dedent(lines[0]))["train"]
    fits = load_config(run_yaml, [*overrides, *(f"train.{key}={json.dumps(value)}" for key, value in pasted.items())])
    assert checked(fits, ledger) == fits


def test_ignore_tries_anyway(run_yaml: Path, ledger: Ledger, have: Callable[..., None]) -> None:
    have(1)
    config = load_config(run_yaml, ["train.memory=ignore"])
    assert checked(config, ledger) == config


def test_the_longest_row_counts_and_not_max_length(run_yaml: Path, ledger: Ledger, have: Callable[..., None]) -> None:
    config = load_config(run_yaml, ["train.max_length=32768", "train.per_device_train_batch_size=64"])
    have(4 * GIB)
    assert checked(config, ledger) == config
    packed = ["train.max_length=32768", "train.packing=true"]
    with pytest.raises(ConfigError):  # by a mask of length x length, which the fused path does without
        checked(load_config(run_yaml, [*packed, "train.fast=off"]), ledger)
    config = load_config(run_yaml, packed)
    assert checked(config, ledger) == config


def test_there_are_no_more_rows_than_the_data_have(run_yaml: Path, ledger: Ledger, have: Callable[..., None]) -> None:
    have(2 * GIB)
    ledger.lengths["train"].clear()
    ledger.lengths["train"].update({300: 3})
    for changed in (["train.packing=true", "train.max_length=8192"], []):
        config = load_config(run_yaml, ["train.per_device_train_batch_size=4096", *changed])
        assert checked(config, ledger) == config
    weighted = load_config(run_yaml, ["train.per_device_train_batch_size=4096", "data.weight=1000"])
    with pytest.raises(ConfigError):
        checked(weighted, ledger)


def test_auto_takes_the_fastest_that_fits_and_keeps_the_rows_of_a_step(
    run_yaml: Path, ledger: Ledger, have: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    have(2 * GIB)
    given = ["train.memory=auto", "train.per_device_train_batch_size=4096", "data.validation="]
    config = load_config(run_yaml, given)
    adapted = checked(config, ledger)
    section = adapted.train
    assert section.per_device_train_batch_size * section.gradient_accumulation_steps == 4096
    assert section.per_device_train_batch_size < 4096
    assert adapted.model_copy(update={"train": config.train}) == config
    assert "train.memory=auto sets per_device_train_batch_size=" in caplog.text
    assert adapted.sft_arguments()["gradient_accumulation_steps"] == section.gradient_accumulation_steps
    with pytest.raises(ConfigError):
        checked(config, ledger, adapt=False)


def test_auto_refuses_what_no_setting_makes_fit(run_yaml: Path, ledger: Ledger, have: Callable[..., None]) -> None:
    have(GIB // 2)
    with pytest.raises(ConfigError):
        checked(load_config(run_yaml, ["train.memory=auto"]), ledger)


def test_a_family_that_is_not_known_is_told(
    run_yaml: Path, ledger: Ledger, have: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    have(1)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    config = load_config(run_yaml, [f"model.base={tmp_path}"])
    assert checked(config, ledger) == config
    assert "memory is not checked" in caplog.text


def test_a_gpu_is_asked_for_what_is_free_of_it(run_yaml: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name = "NVIDIA GeForce RTX 3090"
        major = 8

    free = 2 * GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    config = load_config(run_yaml)
    cuda = torch.device("cuda", 0)
    assert checked(config, ledger, cuda) == config
    free = 10_000_000  # with what this process's own context has already
    with pytest.raises(ConfigError, match=r"the GPU \(NVIDIA GeForce RTX 3090\)"):
        checked(config, ledger, cuda)


def test_a_resumed_run_keeps_the_settings_that_auto_chose(
    run_yaml: Path, tmp_path: Path, have: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run is cut to half of its rows at once; with more memory later, resuming must not change that."""
    folder = tmp_path / "run"
    overrides = [f"output_dir={folder}", "train.memory=auto", "train.num_train_epochs=1", "data.validation="]
    config = load_config(run_yaml, overrides)

    def half(workload: Any, card: Any, **more: Any) -> Any:
        return workload.with_(batch_size=4, accumulation=2)

    monkeypatch.setattr("qlora_kit.training.memory_check.fastest_that_fits", half)
    have(64 * GIB)
    first: TrainResult = train(config)
    began = json.loads((folder / "run.json").read_text())["settings"]
    assert (began["train.per_device_train_batch_size"], began["train.gradient_accumulation_steps"]) == (4, 2)
    assert first.steps == 6
    shutil.copytree(folder, tmp_path / "again")
    monkeypatch.setattr("qlora_kit.training.memory_check.fastest_that_fits", fastest_that_fits)
    (tmp_path / "again" / "qlora_kit.json").unlink()  # as if the end had not been reached
    again = load_config(run_yaml, [*overrides, f"output_dir={tmp_path / 'again'}"])
    assert train(again, resume=True).resumed_from is not None
    other = load_config(run_yaml, [*overrides, f"output_dir={folder}", "train.gradient_accumulation_steps=3"])
    (folder / "qlora_kit.json").unlink()
    with pytest.raises(ConfigError, match="gradient_accumulation_steps"):
        train(other, resume=True)
