"""Memory that runs out in training, as PyTorch tells it: the run goes on in smaller pieces, or names the rows."""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from qlora_kit.config import load_config
from qlora_kit.errors import GuardError
from qlora_kit.training import TrainResult, train
from qlora_kit.training.batch_rows import longest_rows, row_pieces
from qlora_kit.training.checkpoints import checkpoints
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.run_facts import RunFacts

WEIGHTS = "adapter_model.safetensors"
SHORT = (
    "train.max_steps=3",
    "train.gradient_accumulation_steps=2",
    "train.save_strategy=steps",
    "train.save_steps=1",
    "train.save_total_limit=5",
    "data.validation=[]",
)


@pytest.fixture
def run(run_yaml: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains ``run_yaml`` with overrides into ``tmp_path/NAME``."""

    def start(*overrides: str, name: str = "run", **options: Any) -> TrainResult:
        return train(load_config(run_yaml, [f"output_dir={tmp_path / name}", *SHORT, *overrides]), **options)

    return start


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Gives the device memory for so many rows at once, and more where activations are computed again."""
    original = GuardedTrainer.compute_loss
    state = {"rows": 10**9, "recomputed": 10**9, "from_call": 0, "calls": 0}

    def limited(self: GuardedTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, inputs, *args, **kwargs)
        state["calls"] += 1
        limit = state["recomputed"] if self.recomputes else state["rows"]
        if inputs["input_ids"].shape[0] > limit and state["calls"] > state["from_call"]:
            (loss / 3).backward()  # it ran out half way: some gradients are there
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return loss

    def set_to(rows: int, *, recomputed: int = 0, from_call: int = 0) -> None:
        state.update(rows=rows, recomputed=recomputed, from_call=from_call, calls=0)
        monkeypatch.setattr(GuardedTrainer, "compute_loss", limited)

    return set_to


def assert_close(folder: Path, other: Path) -> None:
    """The same training, but for the order in which floats are added up."""
    found, expected = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    losses = [
        [e["loss"] for e in json.loads((f / "metrics.json").read_text())["history"] if "loss" in e]
        for f in (folder, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_pieces_hold_every_row_once() -> None:
    batch = {"input_ids": torch.arange(21).reshape(7, 3), "attention_mask": torch.ones(7, 3), "use_cache": False}
    for pieces in (1, 2, 3, 4, 100):
        parts = row_pieces(batch, pieces)
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), batch["input_ids"])
        assert all(part["attention_mask"].shape == part["input_ids"].shape for part in parts)
        assert all(part["use_cache"] is False for part in parts)
        assert max(len(part["input_ids"]) for part in parts) <= max(1, 7 // pieces)
    assert len(row_pieces({"input_ids": torch.zeros(4, 9), "position_ids": torch.zeros(4, 9)}, 2)) == 1


def test_the_longest_rows_are_found() -> None:
    rows = Dataset.from_dict({"input_ids": [[1] * length for length in (3, 9, 1, 7, 9, 2)]})
    assert set(longest_rows(rows, 3)) == {1, 3, 4}
    assert set(longest_rows(rows.select([5, 3, 0]), 1)) == {1}
    assert len(longest_rows(rows, 100)) == 6


def test_micro_batches_are_split_and_the_step_keeps_its_rows(
    run: Callable[..., TrainResult], memory: Callable[..., None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(name="whole")
    memory(2, from_call=3)  # memory runs out in the second micro-batch of the second step
    with caplog.at_level(logging.WARNING):
        split = run(name="split")
    assert "step 2: out of memory; micro-batches are split into 4 from now on" in caplog.text
    assert_close(tmp_path / "split", tmp_path / "whole")
    assert split.steps == whole.steps
    counts = [[e["num_tokens"] for e in r.history if "num_tokens" in e] for r in (whole, split)]
    assert counts[0] == counts[1]
    # A run that is resumed goes on in these pieces, to the bit.
    shutil.copytree(tmp_path / "split", tmp_path / "cut")
    for name in ("qlora_kit.json", WEIGHTS):
        (tmp_path / "cut" / name).unlink()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-3")
    run(name="cut", resume=True)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "split" / WEIGHTS).read_bytes()


@pytest.mark.faults
@pytest.mark.parametrize(
    "overrides",
    [(), ("train.gradient_checkpointing=true", "train.checkpointed_layers=1")],
    ids=["none", "of one layer"],
)
def test_activations_are_computed_again_where_one_row_is_too_much(
    run: Callable[..., TrainResult],
    memory: Callable[..., None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    overrides: tuple[str, ...],
) -> None:
    run(*overrides, name="whole")
    memory(0, recomputed=1)
    with caplog.at_level(logging.WARNING):
        run(*overrides)
    assert "split into 8" in caplog.text and "activations are computed again" in caplog.text
    assert_close(tmp_path / "run", tmp_path / "whole")


def test_rows_that_do_not_fit_are_named_and_the_steps_before_are_saved(
    run: Callable[..., TrainResult], memory: Callable[..., None], tmp_path: Path
) -> None:
    memory(0, from_call=4)
    with pytest.raises(
        GuardError, match=r"out of memory in step 3, on the rows .*train\.jsonl:\d+ (.|\n)*--resume"
    ) as stopped:
        run("train.save_strategy=no")
    assert stopped.value.exit_code == 3
    assert stopped.value.faults[0].what.count("train.jsonl:") == 1
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-2"]


@pytest.mark.faults
def test_the_longest_batch_is_tried_first_and_leaves_no_trace(
    run: Callable[..., TrainResult],
    memory: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run("lora.lora_dropout=0.1", name="whole")

    def probing(*args: Any, **kwargs: Any) -> RunFacts:
        return RunFacts(*args, **{**kwargs, "probe": True})

    monkeypatch.setattr("qlora_kit.training.fitting.RunFacts", functools.partial(probing))
    run("lora.lora_dropout=0.1", name="probed")
    assert (tmp_path / "probed" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    memory(4)
    with caplog.at_level(logging.WARNING):
        run(name="split")
    assert "step 1: out of memory; micro-batches are split into 2" in caplog.text


def test_out_of_memory_in_an_evaluation_loses_no_step(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.training.guarded_trainer import GuardedTrainer

    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    config = load_config(run_yaml, [f"output_dir={tmp_path}/run", "train.num_train_epochs=1"])
    with monkeypatch.context() as patched:
        patched.setattr(GuardedTrainer, "prediction_step", full)
        with pytest.raises(GuardError, match=r"in the evaluation after step 6 \(no room\)(.|\n)*--resume"):
            train(config)
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    resumed = train(config, resume=True)
    assert resumed.resumed_from is not None
    assert resumed.eval_loss is not None
