"""What a resumed run may differ in: refused by name, told, or allowed by name and then really applied."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from qlora_kit.base_files import resolve_base
from qlora_kit.cli import main
from qlora_kit.config import load_config
from qlora_kit.errors import ConfigError, OutputError
from qlora_kit.models import load_tokenizer
from qlora_kit.training import TrainResult, train
from qlora_kit.training.checkpoints import checkpoints
from qlora_kit.training.run_folder import run_folder_lock
from qlora_kit.training.settings import Start, resumed_start

CHECKPOINT = Path("checkpoint-6")


@pytest.fixture
def start_of(run_yaml: Path) -> Callable[..., Start]:
    """What a run of ``run_yaml`` with overrides begins with."""

    def make(*overrides: str) -> Start:
        config = load_config(run_yaml, overrides)
        ref = resolve_base(config.model.base)
        return Start.of(config, load_tokenizer(ref), ref, torch.device("cpu"))

    return make


@pytest.fixture
def other_base(random_base: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "other-base"
    shutil.copytree(random_base, folder)
    return folder


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["sentiment"])
    tokenizer.save_pretrained(folder)


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are Qwen", "You are someone"))


SETTINGS = {
    "train.learning_rate": "train.learning_rate=0.5",
    "train.max_length": "train.max_length=200",
    "data.train": "data.train=[]",
    "train.seed": "train.seed=1",
    "quantization.load_in_4bit": "quantization.load_in_4bit=false",
}


@pytest.mark.parametrize("key", SETTINGS)
def test_a_changed_setting_is_refused_by_name_unless_it_is_allowed(
    start_of: Callable[..., Start], run_yaml: Path, key: str
) -> None:
    override = SETTINGS[key].replace("data.train=[]", f"data.train=[{run_yaml.parent}/test.jsonl]")
    began, now = start_of(), start_of(override)
    with pytest.raises(ConfigError) as refused:
        resumed_start(began, now, allowed=(), checkpoint=CHECKPOINT)
    (fault,) = refused.value.faults
    assert key in fault.what
    assert f"--allow-changed {key}" in fault.fix
    allowed = resumed_start(began, now, allowed=(key,), checkpoint=CHECKPOINT)
    assert allowed.settings == now.settings
    assert allowed.began_sha256 == began.began_sha256 != now.began_sha256
    assert [(change["from"], change["key"]) for change in allowed.changes] == [("checkpoint-6", key)]
    again = resumed_start(allowed, now, allowed=(), checkpoint=CHECKPOINT)
    assert again == allowed


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (other_weights, "model.base.weights"),
        (other_tokenizer, "model.tokenizer"),
        (other_template, "model.chat_template"),
    ],
)
def test_a_changed_base_is_refused(
    start_of: Callable[..., Start], other_base: Path, change: Callable[[Path], None], key: str
) -> None:
    began = start_of(f"model.base={other_base}")
    change(other_base)
    now = start_of(f"model.base={other_base}")
    with pytest.raises(ConfigError) as refused:
        resumed_start(began, now, allowed=(), checkpoint=CHECKPOINT)
    assert [key in fault.what for fault in refused.value.faults] == [True]
    assert resumed_start(began, now, allowed=(key,), checkpoint=CHECKPOINT).changes


def test_model_base_stands_for_its_weights_too(start_of: Callable[..., Start], other_base: Path) -> None:
    began = start_of()
    other_weights(other_base)
    now = start_of(f"model.base={other_base}")
    keys = [
        change["key"] for change in resumed_start(began, now, allowed=["model.base"], checkpoint=CHECKPOINT).changes
    ]
    assert keys == ["model.base", "model.base.weights"]


def test_the_same_base_in_another_place_is_told(
    start_of: Callable[..., Start], other_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        resumed_start(start_of(), start_of(f"model.base={other_base}"), allowed=(), checkpoint=CHECKPOINT)
    assert "other-base" in caplog.text and "the same base" in caplog.text


def test_what_does_not_matter_may_differ(start_of: Callable[..., Start]) -> None:
    now = start_of("output_dir=elsewhere", "train.logging_steps=3", "train.save_total_limit=7", "eval.limit=9")
    assert resumed_start(start_of(), now, allowed=(), checkpoint=CHECKPOINT).changes == ()
    assert now.began_sha256 == start_of().began_sha256


def test_other_library_versions_are_told(start_of: Callable[..., Start], caplog: pytest.LogCaptureFixture) -> None:
    began = start_of()
    began.told["torch"] = "1.0"
    with caplog.at_level(logging.WARNING):
        resumed_start(began, start_of(), allowed=(), checkpoint=CHECKPOINT)
    assert "the run began with 1.0" in caplog.text


def test_names_that_are_no_settings_or_cannot_change_are_refused(start_of: Callable[..., Start]) -> None:
    for fixed in ("train.metric_for_best_model", "train.metric_rows", "train.loraplus_lr_ratio", "data.validation"):
        with pytest.raises(ConfigError, match=f"{fixed} cannot change"):
            resumed_start(start_of(), start_of(), allowed=[fixed], checkpoint=CHECKPOINT)
    with pytest.raises(ConfigError, match=r"eval\.max_new_tokens is 9"):  # the best adapter was chosen by such answers
        resumed_start(start_of(), start_of("eval.max_new_tokens=9"), allowed=(), checkpoint=CHECKPOINT)
    names = ["train.learning_rat", "train", "lora.r"]
    with pytest.raises(ConfigError) as refused:
        resumed_start(start_of(), start_of(), allowed=names, checkpoint=CHECKPOINT)
    whats = [fault.what for fault in refused.value.faults]
    assert ["train.learning_rat" in whats[0], "'train'" in whats[1], "lora.r cannot change" in whats[2]] == [True] * 3
    assert "did you mean 'train.learning_rate'?" in refused.value.faults[0].fix


@pytest.fixture
def half_done(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """A copy of a run that was cut off after step 6 of 12."""
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained_run[0] / "run.json", folder)
    shutil.copytree(trained_run[0] / "checkpoint-6", folder / "checkpoint-6")
    return folder


def rates(result: TrainResult) -> dict[int, float]:
    return {entry["step"]: entry["learning_rate"] for entry in result.history if "learning_rate" in entry}


def test_an_allowed_learning_rate_is_the_one_trained_with(
    half_done: Path, run_yaml: Path, trained_run: tuple[Path, TrainResult]
) -> None:
    """Optimizer and scheduler keep the old one in the checkpoint."""
    config = load_config(run_yaml, [f"output_dir={half_done}", "train.learning_rate=0.02", "train.weight_decay=0.25"])
    with pytest.raises(ConfigError, match=r"train\.learning_rate is 0\.02, the run began with 0\.01"):
        train(config, resume=True)
    result = train(config, resume=True, allow_changed=["train.learning_rate", "train.weight_decay"])
    before = rates(trained_run[1])
    assert rates(result) == {step: rate * (1 if step <= 6 else 2) for step, rate in before.items()}
    saved = torch.load(half_done / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in saved["param_groups"]} == {0.0, 0.25}  # norms and biases have none
    assert json.loads((half_done / "run.json").read_text())["changes"][0]["new"] == 0.02
    assert train(config, resume=True).steps == 12


BATCH = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def test_a_step_keeps_its_rows_however_they_are_divided(
    half_done: Path, run_yaml: Path, trained_run: tuple[Path, TrainResult], start_of: Callable[..., Start]
) -> None:
    """What is trained on after the resumption is what the whole run was trained on, in the same steps."""
    divided = [f"{BATCH[0]}=2", f"{BATCH[1]}=4"]
    config = load_config(run_yaml, [f"output_dir={half_done}", *divided])
    with pytest.raises(ConfigError) as refused:
        train(config, resume=True)
    assert [key for fault in refused.value.faults for key in BATCH if key in fault.what] == [BATCH[1], BATCH[0]]
    result = train(config, resume=True, allow_changed=BATCH)
    whole = trained_run[1]
    seen = [[(e["step"], e["num_tokens"]) for e in r.history if "num_tokens" in e] for r in (result, whole)]
    assert seen[0] == seen[1]
    losses = [[e["loss"] for e in r.history if "loss" in e] for r in (result, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    for override, rows in ((f"{BATCH[0]}=4", 4), (f"{BATCH[1]}=2", 16)):
        with pytest.raises(ConfigError, match=rf"a step would take {rows} rows, the run began with 8: checkpoint-6"):
            resumed_start(start_of(), start_of(override), allowed=BATCH, checkpoint=CHECKPOINT)


def test_the_command_takes_the_names(half_done: Path, run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as end:
            main(["train", str(run_yaml), f"output_dir={half_done}", "train.learning_rate=0.02", *arguments])
        return end.value.code, capsys.readouterr().err

    code, error = command("--resume", "--allow-changed", "train.warmup_steps, train.seed")
    assert code == 2 and "--allow-changed train.learning_rate" in error
    code, error = command("--allow-changed", "train.learning_rate")
    assert code == 2 and "--allow-changed without --resume" in error


def test_two_processes_cannot_train_in_one_folder(half_done: Path, run_yaml: Path) -> None:
    config = load_config(run_yaml, [f"output_dir={half_done}"])
    with run_folder_lock(half_done), pytest.raises(OutputError, match="another process is training in it"):
        train(config, resume=True)
    assert len(checkpoints(half_done)) == 1
