"""What a process knows of its place in a run of several; ``tests/e2e/test_two_processes.py`` launches two."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from qlora_kit.base_files import BaseRef
from qlora_kit.config import load_config
from qlora_kit.errors import ConfigError
from qlora_kit.launched import is_main_process, process_count
from qlora_kit.models import default_device
from qlora_kit.training import memory_check, sharding, train
from qlora_kit.training.processes import from_main, gathered, main_first, raised_in_all


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert is_main_process()
    assert process_count() == 1
    calls: list[int] = []
    assert from_main(lambda: calls.append(1) or 7) == 7
    assert main_first(lambda: calls.append(2) or 8) == 8
    assert calls == [1, 2]
    assert gathered(["a"]) == ["a"]


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert default_device() == torch.device("cuda", 1)


def test_the_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "free_memory_bytes", lambda: 1000)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    card = memory_check._card(torch.device("cpu"))
    assert card is not None
    assert card.free_bytes == 250


def test_an_error_of_all_is_printed_by_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def told() -> bool:
        return raised_in_all(ConfigError("a", expected="b", fix="c")).told

    assert not told()
    monkeypatch.setenv("RANK", "1")
    assert told()


@pytest.mark.parametrize(("key", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")])
def test_splitting_the_model_is_refused(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str
) -> None:
    monkeypatch.setenv(key, "true")
    with pytest.raises(ConfigError, match=rf"is set to {name}, (.|\n)*configs/accelerate/ddp\.yaml"):
        train(load_config(run_yaml, [f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_a_base_is_split_over_several_processes_alone(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_base: Path
) -> None:
    monkeypatch.setattr("qlora_kit.training.run.load_base_model", lambda *args, **options: pytest.fail("loaded"))
    split = [f"output_dir={tmp_path / 'run'}", "train.shard_base=true"]
    with pytest.raises(ConfigError, match=r"there is one process(.|\n)*fsdp_qlora\.yaml"):
        train(load_config(run_yaml, split))
    monkeypatch.setattr(sharding, "process_count", lambda: 2)
    measured = load_config(run_yaml, [*split, "train.metric_for_best_model=accuracy"])
    with pytest.raises(
        ConfigError, match=r"cannot answer with a part of the base(.|\n)*metric_for_best_model=eval_loss"
    ):
        sharding.require_shardable(measured, BaseRef("base", random_base))
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    config = json.loads((random_base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="is quantized already"):
        sharding.require_shardable(load_config(run_yaml, split), BaseRef("base", quantized))


def test_the_warnings_are_those_of_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora_kit.cli.app import _quiet_libraries

    levels: list[str] = []
    monkeypatch.setattr(logging, "basicConfig", lambda **options: levels.append(options["level"]))
    monkeypatch.delenv("QLORA_KIT_LOG", raising=False)
    _quiet_libraries()
    monkeypatch.setenv("RANK", "1")
    _quiet_libraries()
    assert levels == ["WARNING", "ERROR"]
