"""A run's schedule against its number of steps: as transformers counts them, and told where it has no effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trl import SFTConfig

from qlora_kit.config import TrainSection, load_config
from qlora_kit.errors import ConfigError
from qlora_kit.training import train
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.schedule import check_schedule, effectless, steps_of_run

SHORT = ("data.validation=[]", "train.save_strategy=no", "train.logging_steps=1")


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., SFTConfig]:
    """TRL's configuration as the kit makes it, with changes."""

    def make(**changes: Any) -> SFTConfig:
        values = {"learning_rate": 1e-3, "warmup_steps": 0.03, "lr_scheduler_type": "cosine", "use_cpu": True}
        return SFTConfig(output_dir=str(tmp_path), bf16=False, report_to="none", **(values | changes))

    return make


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.num_train_epochs=2",),
        ("train.num_train_epochs=1.5", "train.per_device_train_batch_size=5", "train.gradient_accumulation_steps=3"),
        ("train.max_steps=4",),
        ("train.num_train_epochs=1", "train.per_device_train_batch_size=7", "train.dataloader_drop_last=true"),
        ("train.num_train_epochs=1", "train.packing=true", "train.max_length=256"),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    overrides: tuple[str, ...], run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []

    def count(train_section: TrainSection, arguments: SFTConfig, steps: int) -> None:
        counted.append(steps)

    monkeypatch.setattr("qlora_kit.training.run.check_schedule", count)
    monkeypatch.setattr("qlora_kit.training.fitting.check_schedule", count)

    def begun(self: GuardedTrainer) -> None:
        counted.append(self.state.max_steps)
        raise InterruptedError

    monkeypatch.setattr(GuardedTrainer, "restore_position", begun)
    with pytest.raises(InterruptedError):
        train(load_config(run_yaml, [f"output_dir={tmp_path / 'run'}", *SHORT, *overrides]))
    assert len(counted) == 2
    assert counted[0] == counted[1]


def test_several_processes_share_the_rows(arguments: Callable[..., SFTConfig]) -> None:
    each = arguments(per_device_train_batch_size=2, num_train_epochs=1)
    assert steps_of_run(each, 48, processes=2) == 12
    assert steps_of_run(each, 49, processes=2) == 13


# --- the learning rate ---


def test_a_run_of_one_step_learns(run_yaml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        result = train(
            load_config(
                run_yaml, [f"output_dir={tmp_path / 'run'}", *SHORT, "train.max_steps=1", "train.warmup_steps=0.03"]
            )
        )
    (entry,) = [line for line in result.history if "learning_rate" in line]
    assert entry["learning_rate"] == 0.01
    assert "warmup_steps=0.03 of 1 step would be all of them, at learning rate 0: there is no warm-up" in caplog.text


def test_a_run_that_is_all_warm_up_is_refused(arguments: Callable[..., SFTConfig]) -> None:
    with pytest.raises(ConfigError, match=r"rate is 0 in every step: the run has 1, and 1 of them are warm-up"):
        check_schedule(TrainSection(), arguments(warmup_steps=1), 1)


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_a_warm_up_longer_than_the_run_is_told(
    scheduler: str, arguments: Callable[..., SFTConfig], caplog: pytest.LogCaptureFixture
) -> None:
    check_schedule(TrainSection(), arguments(lr_scheduler_type=scheduler, warmup_steps=100), 10)
    assert "reaches 9e-05, not 0.001: the run has 10 steps and the warm-up takes 100" in caplog.text


@pytest.mark.parametrize("steps", [2, 3, 10, 1000])
def test_a_usual_schedule_is_left_alone(
    steps: int, arguments: Callable[..., SFTConfig], caplog: pytest.LogCaptureFixture
) -> None:
    for scheduler in ("cosine", "linear", "constant", "reduce_lr_on_plateau"):
        given = arguments(lr_scheduler_type=scheduler, eval_strategy="epoch")
        check_schedule(TrainSection(), given, steps)
        assert given.warmup_steps == 0.03
    assert caplog.text == ""


# --- what has no effect ---


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"eval_steps": 5}, ["train.eval_steps=5 has no effect: train.eval_strategy is epoch; set"]),
        ({"save_steps": 5}, ["train.save_steps=5 has no effect: train.save_strategy is epoch; set"]),
        (
            {"save_steps": 5, "save_strategy": "no"},
            ["train.save_strategy is no; set train.save_strategy=steps", "the last adapter is kept, not the best one"],
        ),
        ({"save_strategy": "no"}, ["train.save_strategy is no; set train.save_strategy=epoch, or train.load_best"]),
        ({"save_strategy": "no", "load_best_model_at_end": False}, []),
        ({"save_steps": 50, "save_strategy": "steps"}, ["save_steps=50 is past the last step, 20: the run saves at"]),
        ({"eval_steps": 50, "eval_strategy": "steps"}, ["past the last step, 20: the run evaluates at its end alone"]),
        ({"eval_steps": 5, "eval_strategy": "steps"}, []),
        ({"eval_steps": 0.25, "eval_strategy": "steps", "early_stopping_patience": 3}, []),
        ({"metric_rows": 32}, ["train.metric_rows=32 has no effect: train.metric_for_best_model is eval_loss"]),
        ({"metric_rows": 32, "metric_for_best_model": "accuracy"}, []),
        ({"early_stopping_patience": 3}, ["patience=3 cannot end the run: it has 3 evaluations; lower it"]),
        ({"early_stopping_patience": 2}, []),
        ({}, []),
    ],
)
def test_what_has_no_effect_is_told(values: dict[str, Any], told: list[str]) -> None:
    lines = effectless(TrainSection.model_validate(values), evaluates=True, steps=20)
    assert len(lines) == len(told)
    assert all(words in line for words, line in zip(told, lines, strict=True))


def test_without_validation_rows_nothing_is_evaluated() -> None:
    section = TrainSection.model_validate({"eval_steps": 5, "eval_strategy": "steps"})
    (line,) = effectless(section, evaluates=False, steps=20)
    assert "no effect: there is no validation data; remove it" in line


@pytest.mark.parametrize(
    ("strategy", "why"), [("epoch", "there is no validation data"), ("no", "train.eval_strategy is no")]
)
def test_a_best_adapter_that_nothing_can_find_is_told_where_it_was_asked_for(strategy: str, why: str) -> None:
    asked = TrainSection.model_validate({"load_best_model_at_end": True, "eval_strategy": strategy})
    (line,) = effectless(asked, evaluates=False, steps=20)
    assert line.startswith(f"train.load_best_model_at_end has no effect: {why}; ")
    assert effectless(TrainSection(eval_strategy=strategy), evaluates=False, steps=20) == []


def test_the_run_tells_it(run_yaml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        train(
            load_config(run_yaml, [f"output_dir={tmp_path / 'run'}", *SHORT, "train.max_steps=2", "train.save_steps=1"])
        )
    assert "train.save_steps=1 has no effect: train.save_strategy is no" in caplog.text
