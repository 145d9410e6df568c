"""Damaged checkpoints, full disks and non-finite numbers: refused by name or survived, never passed over in silence."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerState

from qlora_kit import atomic
from qlora_kit.config import load_config
from qlora_kit.errors import GuardError, OutputError
from qlora_kit.training import TrainResult, exact_trainer, train
from qlora_kit.training.checkpoints import (
    MANIFEST_FILE,
    checkpoints,
    newest_sound,
    read_manifest,
    refusal,
    retire,
    write_manifest,
)
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.settings import Start

WEIGHTS = "adapter_model.safetensors"
FILES = (
    "README.md",
    "adapter_config.json",
    WEIGHTS,
    "chat_template.jinja",
    MANIFEST_FILE,
    "optimizer.pt",
    "position.json",
    "rng_state.pth",
    "rng_state_epoch.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "deleted": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "bit-flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(content: bytes) -> bytes:
    """One bit of the middle byte turned."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


class Saved(NamedTuple):
    """A copy of a finished run's checkpoints of steps 6 and 12, the second with the best adapter."""

    folder: Path
    older: Path
    newer: Path
    settings_sha256: str


@pytest.fixture
def saved(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> Saved:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained_run[0] / "run.json", folder)
    for checkpoint in checkpoints(trained_run[0]):
        shutil.copytree(checkpoint, folder / checkpoint.name)
    return Saved(folder, *checkpoints(folder), Start.read(folder).began_sha256)


def reason_of(saved: Saved) -> str:
    """Why the newer one is refused; the older one is taken."""
    found = newest_sound(saved.folder, settings_sha256=saved.settings_sha256, with_best=True)
    assert found.checkpoint == saved.older
    (refused,) = found.refused
    assert refused.checkpoint == saved.newer
    return refused.reason


@pytest.fixture
def run(run_yaml: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains ``run_yaml`` with overrides into ``tmp_path/run``."""

    def start(*overrides: str, name: str = "run", **options: Any) -> TrainResult:
        return train(load_config(run_yaml, [f"output_dir={tmp_path / name}", *overrides]), **options)

    return start


# --- damaged checkpoints ---


def test_these_are_all_the_files(saved: Saved) -> None:
    assert {path.name for path in saved.newer.iterdir()} == set(FILES)
    assert newest_sound(saved.folder, settings_sha256=saved.settings_sha256, with_best=True).refused == ()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_earlier_checkpoint_taken(saved: Saved, name: str, damage: str) -> None:
    DAMAGES[damage](saved.newer / name)
    assert name in reason_of(saved)


def test_a_run_that_falls_back_ends_as_if_nothing_had_happened(
    run: Callable[..., TrainResult],
    saved: Saved,
    trained_run: tuple[Path, TrainResult],
    caplog: pytest.LogCaptureFixture,
) -> None:
    DAMAGES["bit-flipped"](saved.newer / "optimizer.pt")
    (saved.folder / ".checkpoint-12.0123456789ab.partial").mkdir()
    with caplog.at_level(logging.WARNING):
        result = run(resume=True)
    assert result.resumed_from == str(saved.older)
    assert "refused checkpoint-12: optimizer.pt is damaged" in caplog.text
    assert "half written: .checkpoint-12.0123456789ab.partial" in caplog.text
    assert (saved.folder / WEIGHTS).read_bytes() == (trained_run[0] / WEIGHTS).read_bytes()
    assert [path.name for path in checkpoints(saved.folder)] == ["checkpoint-6", "checkpoint-12"]
    assert refusal(saved.newer, settings_sha256=saved.settings_sha256, with_best=True) is None


def test_without_a_sound_checkpoint_every_one_is_named(run: Callable[..., TrainResult], saved: Saved) -> None:
    (saved.newer / "scheduler.pt").unlink()
    (saved.older / WEIGHTS).write_bytes(b"")
    with pytest.raises(OutputError, match=r"checkpoint-12: scheduler.pt is missing; checkpoint-6: .*holds 0 bytes"):
        run(resume=True)
    assert len(checkpoints(saved.folder)) == 2


def test_files_that_were_not_saved_are_refused_unread(saved: Saved) -> None:
    (saved.newer / "pytorch_model.bin").write_bytes(b"a pickle that transformers would load")
    assert reason_of(saved) == "pytorch_model.bin is not in its manifest.json"


def test_links_are_refused(saved: Saved) -> None:
    (saved.newer / "optimizer.pt").unlink()
    (saved.newer / "optimizer.pt").symlink_to(saved.older / "optimizer.pt")
    assert reason_of(saved) == "optimizer.pt is not a regular file"


def test_a_checkpoint_of_another_run_or_step_is_refused(saved: Saved) -> None:
    manifest = read_manifest(saved.newer)
    write_manifest(saved.newer, step=12, best_step=12, settings_sha256="0" * 64)
    assert reason_of(saved) == "is a checkpoint of a run with other settings"
    write_manifest(saved.newer, step=11, best_step=12, settings_sha256=manifest.settings_sha256)
    assert reason_of(saved) == "manifest.json is that of step 11"


def test_numbers_that_are_not_finite_are_refused_though_their_hash_is_right(saved: Saved) -> None:
    def rewrite() -> None:
        write_manifest(saved.newer, step=12, best_step=12, settings_sha256=saved.settings_sha256)

    weights = load_file(saved.newer / WEIGHTS)
    name, tensor = next(iter(weights.items()))
    broken = tensor.clone()
    broken[0, 0] = float("nan")
    save_file({**weights, name: broken}, saved.newer / WEIGHTS)
    rewrite()
    assert reason_of(saved) == f"{WEIGHTS}: {name} holds values that are not finite"
    save_file(weights, saved.newer / WEIGHTS)
    optimizer = torch.load(saved.newer / "optimizer.pt", weights_only=True)
    optimizer["state"][0]["exp_avg"][0, 0] = float("inf")
    torch.save(optimizer, saved.newer / "optimizer.pt")
    rewrite()
    assert reason_of(saved) == "optimizer.pt: exp_avg of parameter 0 holds values that are not finite"


def test_a_damaged_best_adapter_refuses_what_depends_on_it(saved: Saved) -> None:
    """Without it, the run would end with another adapter and say nothing."""
    write_manifest(saved.newer, step=12, best_step=6, settings_sha256=saved.settings_sha256)
    DAMAGES["zeroed"](saved.older / WEIGHTS)
    with pytest.raises(OutputError, match="checkpoint-12: the best adapter so far is that of checkpoint-6: adapter"):
        newest_sound(saved.folder, settings_sha256=saved.settings_sha256, with_best=True)
    found = newest_sound(saved.folder, settings_sha256=saved.settings_sha256, with_best=False)
    assert found.checkpoint == saved.newer


def test_the_best_adapter_is_verified_before_it_is_kept(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GuardedTrainer._finalize_training

    def damage(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
        DAMAGES["bit-flipped"](Path(self.state.best_model_checkpoint) / WEIGHTS)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, "_finalize_training", damage)
    with pytest.raises(GuardError, match=f"best adapter was damaged while the run went on: .*{WEIGHTS}"):
        run("train.num_train_epochs=1")
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_no_pickle_runs_code(saved: Saved, tmp_path: Path) -> None:
    """What is unpickled is limited to tensors, even where someone made a manifest for it."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "run-by-pickle").touch, ())

    torch.save({"state": {0: {"step": Evil()}}}, saved.newer / "optimizer.pt")
    write_manifest(saved.newer, step=12, best_step=12, settings_sha256=saved.settings_sha256)
    assert "optimizer.pt" in reason_of(saved)
    assert not (tmp_path / "run-by-pickle").exists()


# --- what is kept ---


def test_retention_keeps_the_newest_and_what_they_need(saved: Saved) -> None:
    for step, best in ((18, 6), (24, 6), (30, 30)):
        shutil.copytree(saved.older, saved.folder / f"checkpoint-{step}")
        write_manifest(
            saved.folder / f"checkpoint-{step}", step=step, best_step=best, settings_sha256=saved.settings_sha256
        )

    def left(limit: int) -> list[str]:
        retire(saved.folder, limit=limit, newest=saved.folder / "checkpoint-30", refused=())
        return [path.name.removeprefix("checkpoint-") for path in checkpoints(saved.folder)]

    assert left(3) == ["6", "18", "24", "30"]
    assert left(2) == ["6", "24", "30"]
    assert left(1) == ["30"]


# --- no space ---

TWO_SAVES = ("train.save_strategy=steps", "train.save_steps=1", "train.max_steps=2", "data.validation=[]")


def full(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def full_for_torch(*args: Any, **kwargs: Any) -> None:
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


SEAMS: dict[str, tuple[object, str, Callable[..., None]]] = {
    "weights": (PeftModel, "save_pretrained", full),
    "optimizer": (GuardedTrainer, "_save_optimizer_and_scheduler", full_for_torch),
    "trainer state": (TrainerState, "save_to_json", full),
    "manifest": (exact_trainer, "write_manifest", full),
    "sync to disk": (atomic, "_sync_tree", full),
}


@pytest.mark.parametrize("seam", SEAMS)
def test_a_full_disk_keeps_the_earlier_checkpoint(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seam: str
) -> None:
    owner, name, fault = SEAMS[seam]
    original_save = GuardedTrainer._save_checkpoint

    def second_save_fails(self: GuardedTrainer, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 2:
            monkeypatch.setattr(owner, name, fault)
        original_save(self, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, "_save_checkpoint", second_save_fails)
    with pytest.raises(OutputError, match=r"checkpoint-2: the disk is full(.|\n)*--resume") as error:
        run(*TWO_SAVES)
    assert error.value.exit_code == 2
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {"run.json", "checkpoint-1"}
    settings = Start.read(folder).began_sha256
    assert newest_sound(folder, settings_sha256=settings, with_best=True).checkpoint.name == "checkpoint-1"


def test_space_is_looked_for_before_a_checkpoint_is_begun(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.training.checkpoints._SPACE_FACTOR", 1e12)
    with pytest.raises(OutputError, match=r"checkpoint-2: cannot be saved, .* MiB are free(.|\n)*--resume"):
        run(*TWO_SAVES)
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 900 kB: room for two checkpoints and a half."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        told = mounted.stderr.decode(errors="replace").strip()
        pytest.skip(f"mounting a small file system needs root ({told}): no disk that is really full was tried")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("checked", [True, False])
def test_a_disk_that_is_really_full(
    run: Callable[..., TrainResult], small_disk: Path, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    monkeypatch.setattr("qlora_kit.training.run.require_space_for_run", lambda *args, **kwargs: None)
    if not checked:
        monkeypatch.setattr("qlora_kit.training.checkpoints._SPACE_FACTOR", 0.0)
    many = ("train.save_strategy=steps", "train.save_steps=1", "data.validation=[]", "train.save_total_limit=9")
    with pytest.raises(OutputError, match=r"the disk is full|MiB are free"):
        run(*many, name="disk/run")
    kept = checkpoints(small_disk / "run")
    assert len(kept) >= 2
    settings = Start.read(small_disk / "run").began_sha256
    assert newest_sound(small_disk / "run", settings_sha256=settings, with_best=True).checkpoint == kept[-1]


# --- numbers that are not finite ---


def poison_after(monkeypatch: pytest.MonkeyPatch, method: str, *, call: int, poison: Callable[[Any], Any]) -> None:
    """Let ``poison`` change what a method of the trainer returns at its n-th call."""
    calls: list[int] = []
    original = getattr(GuardedTrainer, method)

    def poisoned(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        found = original(self, *args, **kwargs)
        return poison(self, found) if len(calls) == call else found

    monkeypatch.setattr(GuardedTrainer, method, poisoned)


def trainable(trainer: GuardedTrainer) -> torch.nn.Parameter:
    return next(p for p in trainer.model.parameters() if p.requires_grad)


def poison_gradient(trainer: GuardedTrainer, batches: Any) -> Any:
    trainable(trainer).register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    return batches


def poison_weight(trainer: GuardedTrainer, norm: Any) -> Any:
    """The optimizer's own state is broken, so that a sound gradient makes a weight of it that is not."""
    parameter = trainable(trainer)
    trainer.optimizer.state[parameter]["exp_avg"][0, 0] = float("nan")
    return norm


POISONS = {
    "loss": ("compute_loss", 5, lambda trainer, loss: loss * float("nan"), "the loss became nan in step 3", 4),
    "gradient": ("get_batch_samples", 3, poison_gradient, r"the gradient's norm became (inf|nan) in step 3", 8),
    "weight": ("_get_grad_norm", 3, poison_weight, "1 trained tensors hold .* in step 3", 8),
}


ALL_POISONS = [(name, packing) for name in POISONS for packing in (False, True)]
SAMPLE = [("loss", False), ("weight", True)]


@pytest.mark.parametrize(
    ("poisoned", "packing"),
    [case if case in SAMPLE else pytest.param(*case, marks=pytest.mark.faults) for case in ALL_POISONS],
)
def test_a_number_that_is_not_finite_stops_the_step_and_names_its_rows(
    run: Callable[..., TrainResult],
    run_yaml: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: str,
    packing: bool,
) -> None:
    method, call, poison, message, rows = POISONS[poisoned]
    seen: list[torch.Tensor] = []
    original = GuardedTrainer.training_step

    def watch(self: GuardedTrainer, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, "training_step", watch)
    poison_after(monkeypatch, method, call=call, poison=poison)
    batch = ("train.packing=true", "train.per_device_train_batch_size=1", "train.max_length=256") if packing else ()
    batch = batch or ("train.per_device_train_batch_size=4",)
    with pytest.raises(GuardError, match=message) as stopped:
        run(*TWO_SAVES, "train.max_steps=4", "train.gradient_accumulation_steps=2", *batch)
    assert stopped.value.exit_code == 3
    folder = tmp_path / "run"
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    for checkpoint in checkpoints(folder):
        assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / WEIGHTS).values())
    assert not (folder / WEIGHTS).exists()
    named = stopped.value.faults[0].what.split("on the rows ")[1].split("; ")
    assert packing or len(named) == rows
    assert set(named) == set(rows_with(run_yaml.parent / "train.jsonl", seen[4:], folder))


def rows_with(file: Path, batches: list[torch.Tensor], folder: Path) -> list[str]:
    """The training file's rows whose text stands in the batches, found by decoding them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint-1")
    text = "\n".join(tokenizer.decode(row) for batch in batches for row in batch)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [f"{file}:{number}" for number, row in enumerate(rows, start=1) if row["text"] in text]
