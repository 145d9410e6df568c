"""TensorBoard and Weights & Biases: refused before anything costly where missing, and written into the run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit.config import load_config
from qlora_kit.errors import ConfigError
from qlora_kit.training import train
from qlora_kit.training.reporters import require_reporters

MISSING_TENSORBOARD = "transformers.integrations.integration_utils.is_tensorboard_available"
SHORT = ("train.max_steps=3", "train.save_strategy=no", "data.validation=[]", "eval.report_samples=0")


@pytest.mark.parametrize("names", [(), ("none",)])
def test_nothing_is_asked_of_nobody(names: tuple[str, ...]) -> None:
    require_reporters(names)


def test_an_unknown_tracker_is_told() -> None:
    with pytest.raises(ConfigError, match=r"names 'tensorbord'(.|\n)*did you mean 'tensorboard'"):
        require_reporters(("tensorbord",))
    with pytest.raises(ConfigError, match=r"'none' beside others(.|\n)*leave none out"):
        require_reporters(("none", "tensorboard"))


@pytest.mark.parametrize("name", ["neptune", "mlflow", "dagshub", "flyte", "comet_ml"])
def test_any_tracker_that_is_not_installed_is_refused_in_three_parts(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for library in ("neptune", "mlflow", "dagshub", "flytekit", "comet"):
        monkeypatch.setattr(f"transformers.integrations.integration_utils.is_{library}_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"report_to is {name}, whose library cannot be used") as refused:
        require_reporters((name,))
    assert f"install the library of {name}; or set train.report_to=none" in refused.value.faults[0].fix
    assert capfd.readouterr().err == ""


def test_a_missing_library_is_told_before_anything_is_read(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MISSING_TENSORBOARD, lambda: False)
    monkeypatch.setattr("qlora_kit.training.run.tokenised_data", None)
    config = load_config(run_yaml, [f"output_dir={tmp_path}/run", "train.report_to=tensorboard"])
    with pytest.raises(ConfigError, match=r"pip install 'qlora-kit\[tensorboard\]'; or set train.report_to=none"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_tensorboard_reads_the_losses_of_the_run(run_yaml: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard is not installed: it is in the extras dev and tensorboard",
    )
    folder = tmp_path / "run"
    result = train(load_config(run_yaml, [f"output_dir={folder}", "train.report_to=tensorboard", *SHORT]))
    (logs,) = (folder / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(logs)).Reload()
    logged = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(logged) == 3
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)


def test_wandb_writes_one_run_into_the_run_folder(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: it is in the extras dev and wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    train(load_config(run_yaml, ["output_dir=run", "train.report_to=wandb", *SHORT]))
    assert wandb.run is None  # ended with the training
    assert len(list((tmp_path / "run" / "runs" / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
