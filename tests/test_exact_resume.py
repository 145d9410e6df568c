"""A resumed run is the run that was never stopped: weights byte for byte, and every figure that is not a time."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlora_kit.config import load_config
from qlora_kit.errors import Interrupted
from qlora_kit.fast import FastPath, fast_path
from qlora_kit.training import TrainResult, fast_switch, train
from qlora_kit.training.checkpoints import checkpoints, step_of
from qlora_kit.training.guarded_trainer import GuardedTrainer

WEIGHTS = "adapter_model.safetensors"
NEEDED_BY_UNPADDING = ("segments", "head", "unpadding")
PIECES_ALONE = [("projections",), ("mlp",), ("segments",), ("head",), NEEDED_BY_UNPADDING]
TIMES = ("runtime", "per_second", "seconds", "peak_bytes")
# Six steps of two epochs, with dropout; a checkpoint after each step.
SHORT = (
    "lora.lora_dropout=0.1",
    "train.per_device_train_batch_size=4",
    "train.gradient_accumulation_steps=4",
    "train.save_strategy=steps",
    "train.save_steps=1",
    "train.eval_strategy=steps",
    "train.eval_steps=1",
    "train.save_total_limit=20",
)
PACKED = (*SHORT, "train.packing=true", "train.per_device_train_batch_size=1", "train.max_length=256")
BY_EPOCH = ("train.eval_strategy=epoch", "train.load_best_model_at_end=false", "train.logging_strategy=epoch")
ONE_LAYER = ("train.gradient_checkpointing=true", "train.checkpointed_layers=1")
OTHER_OPTIMIZER = ("train.optim=adafactor", "train.lr_scheduler_type=reduce_lr_on_plateau")
ALL = (1, 2, 3, 4, 5, 6)
CASES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {  # overrides, the steps to resume from
    "packing, fewer log lines than steps": ((*PACKED, "train.max_steps=6", "train.logging_steps=5"), (2,)),
    "evaluated at the end of epochs, without dropout": ((*SHORT, *BY_EPOCH, "lora.lora_dropout=0"), (3,)),
}
MORE_CASES: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "qlora, the best adapter kept": (SHORT, ALL),
    "lora on the 16-bit base": ((*SHORT, "quantization.load_in_4bit=false"), ALL),
    "by the libraries' own path": ((*SHORT, "train.fast=off"), (2, 3)),
    "packing": (PACKED, (1, 2, 3)),
    "without dropout, some layers checkpointed": ((*SHORT, *ONE_LAYER, "lora.lora_dropout=0"), (2, 3)),
    "rest of an epoch": ((*SHORT, "train.gradient_accumulation_steps=5", "train.logging_steps=4"), (2, 3, 4, 5)),
    "evaluated at the end of epochs": ((*SHORT, *BY_EPOCH), ALL),
    "ends in mid-epoch": ((*SHORT, "train.max_steps=5"), (3, 4, 5)),
    "ends in mid-epoch, evaluated there": ((*SHORT, *BY_EPOCH, "train.max_steps=5"), (3, 4, 5)),
    "order drawn from the global state": ((*SHORT, "train.train_sampling_strategy=group_by_length"), ALL),
    "order without a seed of its own": ((*SHORT, "train.accelerator_config={use_seedable_sampler: false}"), ALL),
    "worker processes": ((*SHORT, "train.dataloader_num_workers=2"), (2, 3)),
    "rows by weight": ((*SHORT, "data.weight=1.5"), (2, 5)),
    "saved when best": ((*SHORT, "train.save_strategy=best"), ()),
    "another optimizer and schedule": ((*SHORT, *OTHER_OPTIMIZER), (2, 3, 4)),
    "8-bit optimizer": ((*SHORT, "train.optim=adamw_8bit"), (2, 3)),
    "noise on embeddings": ((*SHORT, "train.neftune_noise_alpha=5", "train.gradient_checkpointing=true"), (2, 3)),
}


def figures(folder: Path) -> dict[str, Any]:
    """What a run measured, without times."""

    def timeless(entry: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in entry.items() if not name.endswith(TIMES)}

    metrics = json.loads((folder / "metrics.json").read_text())
    return {**timeless(metrics), "history": [timeless(entry) for entry in metrics["history"]]}


def cut_back(whole: Path, folder: Path, *, step: int) -> Path:
    """A copy of a run as it was when it had saved ``step`` and nothing after it."""
    folder.mkdir()
    shutil.copy(whole / "run.json", folder)
    for checkpoint in checkpoints(whole):
        if step_of(checkpoint) <= step:
            shutil.copytree(checkpoint, folder / checkpoint.name)
    return folder


def assert_same_run(folder: Path, whole: Path) -> None:
    assert figures(folder) == figures(whole)
    assert (folder / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


@pytest.fixture
def run(run_yaml: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains ``run_yaml`` with overrides into ``tmp_path/NAME``."""

    def start(*overrides: str, name: str = "run", **options: Any) -> TrainResult:
        return train(load_config(run_yaml, [f"output_dir={tmp_path / name}", *overrides]), **options)

    return start


def resume_from_each(run: Callable[..., TrainResult], folder: Path, *overrides: str, steps: tuple[int, ...]) -> None:
    run(*overrides, name="whole")
    saved = [step_of(path) for path in checkpoints(folder / "whole")]
    steps = steps or tuple(saved)
    assert set(steps) <= set(saved) and len(saved) > 1
    for step in steps:
        broken = cut_back(folder / "whole", folder / f"from-{step}", step=step)
        resumed = run(*overrides, name=broken.name, resume=True)
        assert resumed.resumed_from == str(broken / f"checkpoint-{step}")
        assert_same_run(broken, folder / "whole")


@pytest.mark.parametrize("case", CASES)
def test_from_a_checkpoint(run: Callable[..., TrainResult], tmp_path: Path, case: str) -> None:
    overrides, steps = CASES[case]
    resume_from_each(run, tmp_path, *overrides, steps=steps)


@pytest.mark.faults
@pytest.mark.parametrize("case", MORE_CASES)
def test_from_more_checkpoints(run: Callable[..., TrainResult], tmp_path: Path, case: str) -> None:
    overrides, steps = MORE_CASES[case]
    resume_from_each(run, tmp_path, *overrides, steps=steps)


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("pieces", PIECES_ALONE, ids=" ".join)
def test_with_each_piece_of_the_fused_path_alone(
    run: Callable[..., TrainResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pieces: tuple[str, ...],
    rows: str,
) -> None:
    used: list[set[str]] = []

    @contextmanager
    def some(model: Any, **unused: Any) -> Iterator[FastPath]:
        with fast_path(model, pieces=pieces) as fast:
            used.append({piece.name for piece in fast.pieces if piece.places})
            yield fast

    monkeypatch.setattr(fast_switch, "fast_path", some)
    dropout = "lora.lora_dropout=0" if pieces == NEEDED_BY_UNPADDING else "lora.lora_dropout=0.1"
    overrides = (*(PACKED if rows == "packed" else SHORT), dropout, "train.max_steps=3", "train.eval_strategy=no")
    resume_from_each(run, tmp_path, *overrides, steps=(2,))
    assert used == [set(pieces)] * 2


# --- stopped by a signal ---

FEW_SAVES = (*SHORT, "train.save_strategy=epoch", "train.eval_strategy=epoch")


@pytest.fixture(scope="module")
def whole(run_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped: six steps of four micro-batches (three in the last step of an epoch)."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    train(load_config(run_yaml, [f"output_dir={folder}", *FEW_SAVES]))
    return folder


def signal_at(monkeypatch: pytest.MonkeyPatch, method: str, *, call: int, number: signal.Signals) -> list[int]:
    """Send this process a signal inside the given call of a method of the trainer; the list counts the calls."""
    calls: list[int] = []
    original = getattr(GuardedTrainer, method)

    def counted(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(self.state.global_step)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, method, counted)
    return calls


MOMENTS = {  # method, which call of it, steps done by then, calls until the run has stopped
    "second micro-batch of the second step": ("compute_loss", 6, 1, 6),
    "last micro-batch of a step": ("compute_loss", 8, 2, 8),
    "first micro-batch of an epoch": ("compute_loss", 15, 3, 15),
    "first batch of an evaluation": ("prediction_step", 1, 3, 1),
    "last batch of the last evaluation": ("prediction_step", 4, 6, 4),
}


def sampled(names: Iterable[str], sample: Iterable[str]) -> list[Any]:
    """All of them for `make faults`, the sample for `make test`."""
    return [name if name in sample else pytest.param(name, marks=pytest.mark.faults) for name in names]


@pytest.mark.parametrize(
    "moment", sampled(MOMENTS, ["second micro-batch of the second step", "first batch of an evaluation"])
)
def test_a_signal_stops_within_a_micro_batch(
    run: Callable[..., TrainResult], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    method, call, steps, last_call = MOMENTS[moment]
    with monkeypatch.context() as inside:
        calls = signal_at(inside, method, call=call, number=signal.SIGTERM)
        with pytest.raises(Interrupted, match=rf"SIGTERM after step {steps} of 6(.|\n)*--resume") as stopped:
            run(*FEW_SAVES)
    assert stopped.value.exit_code == 143
    assert len(calls) == last_call
    assert step_of(checkpoints(tmp_path / "run")[-1]) == steps
    run(*FEW_SAVES, resume=True)
    assert_same_run(tmp_path / "run", whole)


def test_a_signal_before_the_first_step_leaves_nothing(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signal_at(monkeypatch, "compute_loss", call=2, number=signal.SIGINT)
    with pytest.raises(Interrupted, match=r"SIGINT after step 0(.|\n)*start again"):
        run(*FEW_SAVES)
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
def test_stopped_again_and_again(
    run: Callable[..., TrainResult], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process does a few micro-batches, or part of an evaluation, before it is stopped."""
    stops = 0
    while not (tmp_path / "run" / WEIGHTS).exists():
        with monkeypatch.context() as inside:
            signal_at(inside, "compute_loss", call=9, number=signal.SIGINT)
            try:
                run(*FEW_SAVES, resume=stops > 0)
            except Interrupted:
                stops += 1
    assert stops >= 3
    assert_same_run(tmp_path / "run", whole)
