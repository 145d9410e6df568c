"""A signal or a failure while answers are generated: the run stops within a token, and nothing trained is lost."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.adapters import AdapterContract, check_adapter_folder
from qlora_kit.config import load_config
from qlora_kit.errors import Interrupted
from qlora_kit.training import TrainResult, samples, stop_rate, train
from qlora_kit.training.checkpoints import checkpoints, step_of
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.task_metric import TaskMetric

WEIGHTS = "adapter_model.safetensors"
METRIC = (
    "train.num_train_epochs=1",
    "train.metric_for_best_model=accuracy",
    "train.metric_rows=24",
    "eval.batch_size=4",
)
NOT_SAVED = ("train.max_steps=3", "train.save_strategy=no")


@pytest.fixture
def run(run_yaml: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains ``run_yaml`` with overrides into ``tmp_path/NAME``."""

    def start(*overrides: str, name: str = "run", **options: Any) -> TrainResult:
        return train(load_config(run_yaml, [f"output_dir={tmp_path / name}", *overrides]), **options)

    return start


def test_a_signal_while_the_metric_is_measured_stops_before_the_next_token(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(*METRIC, name="whole")
    calls: list[int] = []
    original = TaskMetric.measure

    def counted(self: TaskMetric, model: Any, *, interrupt: Callable[[], None]) -> float:
        def ask() -> None:
            calls.append(1)
            if len(calls) == 7:
                os.kill(os.getpid(), signal.SIGTERM)
            interrupt()

        return original(self, model, interrupt=ask)

    with monkeypatch.context() as patched:
        patched.setattr(TaskMetric, "measure", counted)
        with pytest.raises(Interrupted, match=r"SIGTERM after step 6 of 6(.|\n)*--resume") as stopped:
            run(*METRIC)
    assert stopped.value.exit_code == 143
    assert len(calls) == 7
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [6]
    resumed = run(*METRIC, resume=True)
    assert resumed.task_metric == whole.task_metric is not None
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("answering", [stop_rate, samples], ids=["stop rate", "samples"])
def test_a_signal_after_the_last_step_keeps_the_finished_adapter(
    answering: Any, run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is saved on the way here, so that the adapter itself is all that there is."""
    run(*NOT_SAVED, name="whole")
    original = answering.generate

    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(answering, "generate", signalled)
    with pytest.raises(Interrupted, match=r"SIGINT after the last step(.|\n)*nothing is lost") as stopped:
        run(*NOT_SAVED)
    assert stopped.value.exit_code == 130
    folder = tmp_path / "run"
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    check_adapter_folder(folder)
    assert AdapterContract.load(folder).metrics.keys() <= AdapterContract.load(tmp_path / "whole").metrics.keys()
    figures = json.loads((folder / "metrics.json").read_text())
    assert (figures["steps"], figures["stop_rate"]) == (3, None)
    assert (folder / "report.html").is_file()


def test_a_failure_after_the_last_step_keeps_the_finished_adapter(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(stop_rate, "generate", broken)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(*NOT_SAVED)
    check_adapter_folder(tmp_path / "run")
    assert AdapterContract.load(tmp_path / "run").base.id


def test_a_failure_in_the_last_evaluation_keeps_the_steps_before_it(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("train.num_train_epochs=1", name="whole")

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(GuardedTrainer, "prediction_step", broken)
        with pytest.raises(RuntimeError, match="the device is gone"):
            run("train.num_train_epochs=1", "train.save_strategy=no")
    assert [step_of(path) for path in checkpoints(tmp_path / "run")] == [6]
    resumed = run("train.num_train_epochs=1", "train.save_strategy=no", resume=True)
    assert resumed.eval_loss == whole.eval_loss
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
