"""A short QLoRA run on a random base: what it supervises, what it leaves, how it resumes, and what stops it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig

from qlora_kit.adapters import AdapterContract, AdapterStore, base_fingerprint, check_adapter_folder
from qlora_kit.base_files import resolve_base
from qlora_kit.config import load_config
from qlora_kit.errors import ConfigError, DataError, GuardError, Interrupted, OutputError
from qlora_kit.models import load_base_model
from qlora_kit.training import TrainResult, train, trl_arguments
from qlora_kit.training.checkpoints import checkpoints
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.progress import TrainingProgress
from qlora_kit.training.run_folder import open_run_folder, publish

WEIGHTS = "adapter_model.safetensors"
CONTRACT = "qlora_kit.json"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(run_yaml: Path, tmp_path: Path) -> Callable[..., TrainResult]:
    """Trains ``run_yaml`` with overrides into ``tmp_path/NAME``."""

    def start(*overrides: str, name: str = "run", **options: Any) -> TrainResult:
        return train(load_config(run_yaml, [f"output_dir={tmp_path / name}", *overrides]), **options)

    return start


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The batches that the trainer was given, as its collator made them."""
    seen: list[dict[str, torch.Tensor]] = []
    original = GuardedTrainer.training_step

    def record(self: GuardedTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append({key: value.clone() for key, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(GuardedTrainer, "training_step", record)
    return seen


def once(number: signal.Signals, *, step: int) -> Callable[[TrainingProgress], None]:
    """A progress function that sends this process one signal."""
    sent: list[int] = []

    def watch(progress: TrainingProgress) -> None:
        if progress.step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    return watch


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# --- a finished run ---


def test_a_finished_run_leaves_every_file(trained_run: tuple[Path, TrainResult]) -> None:
    folder, _ = trained_run
    names = {path.name for path in folder.iterdir()}
    expected = {WEIGHTS, "adapter_config.json", CONTRACT, "config.yaml", "ledger.jsonl", "metrics.json", "README.md"}
    assert names >= expected | {"tokenizer.json", "tokenizer_config.json", "checkpoint-12"}
    assert not any(name.startswith(".") for name in names)
    check_adapter_folder(folder)
    assert load_config(folder / "config.yaml").sha256() == AdapterContract.load(folder).config_sha256


def test_the_contract_is_that_of_the_base_and_the_data(
    trained_run: tuple[Path, TrainResult], random_base: Path, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    contract = AdapterContract.load(trained_run[0])
    assert contract.base.fingerprint == base_fingerprint(random_base)
    assert contract.stop_token_ids == (chatml_tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert contract.system_prompt == "Is this review positive, negative or neutral?"
    assert contract.generation == {"max_new_tokens": 4, "do_sample": False}
    assert [(file.split, file.name, file.rows) for file in contract.data] == [
        ("train", "train.jsonl", 48),
        ("validation", "validation.jsonl", 9),
    ]
    assert (contract.task, contract.name) == ("sentiment", "reviews")


def test_the_adapter_is_fp32_and_plain_peft_loads_it(trained_run: tuple[Path, TrainResult], random_base: Path) -> None:
    folder, result = trained_run
    tensors = load_file(folder / WEIGHTS)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert sum(tensor.numel() for tensor in tensors.values()) == result.trainable_parameters == 4 * 1024 * 2
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_base)
    assert config["target_modules"] == sorted(config["target_modules"])
    base = load_base_model(resolve_base(str(random_base)), load_config(folder / "config.yaml").quantization)
    ids = torch.arange(40, 60).reshape(1, 20)
    with torch.no_grad():
        before = base(ids).logits
        model = PeftModel.from_pretrained(base, folder).eval()
        assert not torch.allclose(model(ids).logits, before, atol=1e-2)
    loaded = {name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_loss_falls_and_the_best_validation_loss_is_reported(trained_run: tuple[Path, TrainResult]) -> None:
    folder, result = trained_run
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == result.steps == 12
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    validation = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert len(validation) == 2
    assert result.eval_loss == min(validation)
    assert result.train_loss == losses[-1]
    assert result.tokens_per_second > 0
    assert result.resumed_from is None
    assert metrics(folder)["eval_loss"] == result.eval_loss
    assert "history" not in result.to_json()


def test_supervised_tokens_are_the_answers_and_their_stop_tokens(
    trained_run: tuple[Path, TrainResult], run_yaml: Path, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = [json.loads(line) for line in (run_yaml.parent / "train.jsonl").read_text().splitlines()]
    answers = [chatml_tokenizer(row["label"] + "<|im_end|>", add_special_tokens=False)["input_ids"] for row in rows]
    assert trained_run[1].supervised_tokens == sum(map(len, answers))


@pytest.fixture
def validation_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float, int], float]], None]:
    """Lets a test change each validation loss, given that loss and the step."""
    original = GuardedTrainer.compute_loss

    def change_by(change: Callable[[float, int], float]) -> None:
        def changed(self: GuardedTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            found = original(self, model, *args, **kwargs)
            if model.training:
                return found
            loss, *rest = found if isinstance(found, tuple) else (found,)
            loss = torch.full_like(loss, change(loss.item(), self.state.global_step))
            return (loss, *rest) if isinstance(found, tuple) else loss

        monkeypatch.setattr(GuardedTrainer, "compute_loss", changed)

    return change_by


def test_the_adapter_of_the_best_validation_loss_is_kept(
    run: Callable[..., TrainResult], tmp_path: Path, validation_loss: Callable[..., None]
) -> None:
    validation_loss(lambda loss, step: loss + 100 * abs(step - 12))
    result = run("train.num_train_epochs=4")
    validation = [(entry["eval_loss"], entry["step"]) for entry in result.history if "eval_loss" in entry]
    best_loss, best_step = min(validation)
    assert (best_step, result.steps) == (12, 24)
    assert result.eval_loss == best_loss
    best = load_file(tmp_path / "run" / f"checkpoint-{best_step}" / WEIGHTS)
    kept = load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(kept[name], tensor) for name, tensor in best.items())


def test_without_the_best_the_last_is_kept_and_reported(
    run: Callable[..., TrainResult], tmp_path: Path, validation_loss: Callable[..., None]
) -> None:
    validation_loss(lambda loss, step: loss + step)
    result = run("train.load_best_model_at_end=false")
    validation = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert result.eval_loss == validation[-1] != min(validation)
    last = load_file(tmp_path / "run" / f"checkpoint-{result.steps}" / WEIGHTS)
    kept = load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(kept[name], tensor) for name, tensor in last.items())


def test_the_rows_of_each_file_are_counted(run: Callable[..., TrainResult], run_yaml: Path, tmp_path: Path) -> None:
    lines = (run_yaml.parent / "train.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("one", lines[:10]), ("two", lines[10:26])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    files = f"data.train=[{tmp_path}/one.jsonl, {tmp_path}/two.jsonl]"
    run(files, "data.validation=[]", "train.max_steps=1", "train.save_strategy=no")
    contract = AdapterContract.load(tmp_path / "run")
    assert [(file.name, file.rows) for file in contract.data] == [("one.jsonl", 10), ("two.jsonl", 16)]
    assert metrics(tmp_path / "run")["eval_loss"] is None


# --- what the loss sees ---


def test_the_trainers_own_batch_supervises_answer_and_stop_token(
    run: Callable[..., TrainResult],
    batches: list[dict[str, torch.Tensor]],
    run_yaml: Path,
    chatml_tokenizer: PreTrainedTokenizerFast,
) -> None:
    run("train.max_steps=6", "data.validation=[]", "train.save_strategy=no")
    rows = [json.loads(line) for line in (run_yaml.parent / "train.jsonl").read_text().splitlines()]
    label_of = {row["text"]: row["label"] for row in rows}
    seen = []
    for batch in batches:
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            pairs = list(zip(ids, labels, strict=True))
            assert all(label in (-100, token) for token, label in pairs)
            text = chatml_tokenizer.decode(ids).split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
            supervised = chatml_tokenizer.decode([label for label in labels if label != -100])
            assert supervised == label_of[text] + "<|im_end|>"
            seen.append(text)
    assert sorted(seen) == sorted(label_of)  # one epoch sees each row once


TWO_TURNS = [
    {"role": "user", "content": "The soup is good."},
    {"role": "assistant", "content": "positive"},
    {"role": "user", "content": "The room is cold."},
    {"role": "assistant", "content": "negative"},
]


@pytest.mark.parametrize(
    ("loss_on", "supervised"),
    [("all_assistant", "positive<|im_end|>negative<|im_end|>"), ("last", "negative<|im_end|>")],
)
def test_loss_on_chooses_the_turns(
    run: Callable[..., TrainResult],
    batches: list[dict[str, torch.Tensor]],
    chatml_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    loss_on: str,
    supervised: str,
) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": TWO_TURNS}) + "\n")
    data = (f"data.train={tmp_path}/chat.jsonl", "data.validation=[]", "data.test=[]")
    run(*data, f"data.loss_on={loss_on}", "train.max_steps=1", "train.save_strategy=no")
    labels = batches[0]["labels"][0]
    assert chatml_tokenizer.decode(labels[labels != -100]) == supervised


def test_packed_rows_do_not_see_each_other(run: Callable[..., TrainResult]) -> None:
    """The first loss of one packed sequence is that of the same rows side by side."""
    once = ("train.max_steps=1", "train.per_device_train_batch_size=48", "train.save_strategy=no", "data.validation=[]")
    apart = run(*once, name="apart")
    packed = run(*once, "train.packing=true", "train.max_length=8192", name="packed")
    assert packed.train_loss == pytest.approx(apart.train_loss, rel=1e-4)
    assert packed.supervised_tokens == apart.supervised_tokens


def test_packing_trains_and_evaluates(run: Callable[..., TrainResult]) -> None:
    result = run("train.packing=true", "train.max_length=512", "train.per_device_train_batch_size=1")
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert result.eval_loss is not None and math.isfinite(result.eval_loss)


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_whole_modules_are_trained_beside_a_base_in_16_bits(run: Callable[..., TrainResult], module: str) -> None:
    """On every GPU, that is: they are in fp32, and the answers for the report are made with them."""
    settings = ("quantization.bnb_4bit_compute_dtype=bfloat16", "eval.stop_rate_rows=2", "eval.report_samples=1")
    result = run(*settings, f"lora.modules_to_save=[{module}]", "train.max_steps=1")
    assert result.steps == 1
    assert result.stop_rate is not None


class SeesTwo(SFTConfig):
    """As where two GPUs are seen."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._n_gpu = 2


def test_one_process_trains_on_one_of_several_gpus(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers counts all that it sees, would train on all of them at once, and TRL refuses that."""
    monkeypatch.setattr(trl_arguments, "SFTConfig", SeesTwo)
    assert run("train.max_steps=1").steps == 1


def test_gradient_checkpointing_changes_memory_only(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    short = ("train.max_steps=3", "train.save_strategy=no", "data.validation=[]")
    run(*short, name="plain")
    run(*short, "train.gradient_checkpointing=true", name="all")
    run(*short, "train.gradient_checkpointing=true", "train.checkpointed_layers=1", name="one")
    plain, every, one = (load_file(tmp_path / name / WEIGHTS) for name in ("plain", "all", "one"))
    for name, tensor in plain.items():
        torch.testing.assert_close(every[name], tensor, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(one[name], tensor, rtol=1e-3, atol=1e-5)
        assert "lora_B" not in name or tensor.abs().max() > 1e-3


def test_more_checkpointed_layers_than_there_are_are_refused(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.training.run.load_base_model", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"checkpointed_layers is 3, and .* has 2 layers(.|\n)*1 to 2, or null"):
        run("train.gradient_checkpointing=true", "train.checkpointed_layers=3")
    assert not (tmp_path / "run").exists()


# --- the run folder ---


def test_an_occupied_folder_is_refused_with_three_ways_on(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    monkeypatch.setattr("qlora_kit.training.run.load_base_model", None)  # nothing may be loaded
    with pytest.raises(OutputError, match=r"occupied(.|\n)*--resume(.|\n)*--overwrite(.|\n)*output_dir="):
        run()
    with pytest.raises(OutputError, match=r"no training run wrote this folder"):
        run(overwrite=True)
    with pytest.raises(OutputError, match="no run to resume"):
        run(resume=True)
    with pytest.raises(OutputError, match="exclude each other"):
        run(resume=True, overwrite=True)
    with pytest.raises(OutputError, match="is a file"):
        run("output_dir=" + str(tmp_path / "run" / "notes.txt"))
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_overwrite_spares_what_no_run_wrote(
    trained_run: tuple[Path, TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outer" / "run"
    shutil.copytree(trained_run[0], folder)
    (folder / ".final.abc.partial").mkdir()
    (folder / "runs").mkdir()
    assert open_run_folder(folder, resume=False, overwrite=True) is None
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(OutputError, match="home folder"):
        open_run_folder(folder, resume=False, overwrite=True)
    monkeypatch.undo()
    for current in (folder, folder / "runs"):
        with monkeypatch.context() as inside:
            inside.chdir(current)
            with pytest.raises(OutputError, match="current folder"):
                open_run_folder(folder, resume=False, overwrite=True)
    (folder / "thesis.tex").write_text("mine")
    (folder / ".git").mkdir()
    with pytest.raises(OutputError, match=r"'\.git', 'thesis\.tex'"):
        open_run_folder(folder, resume=False, overwrite=True)
    AdapterStore(tmp_path / "store").add(trained_run[0])
    with pytest.raises(OutputError, match=r"is an adapter of the store"):
        open_run_folder(tmp_path / "store" / "reviews", resume=False, overwrite=True)


def test_overwrite_replaces_a_run(
    run: Callable[..., TrainResult], trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    shutil.copytree(trained_run[0], tmp_path / "run")
    result = run("train.max_steps=1", "data.validation=[]", overwrite=True)
    assert result.steps == 1
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1"}
    assert metrics(tmp_path / "run")["steps"] == 1


def test_a_wrong_row_spares_the_run_that_would_be_overwritten(
    run: Callable[..., TrainResult], trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    shutil.copytree(trained_run[0], tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError):
        run(f"data.train={tmp_path}/bad.jsonl", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_failure_while_publishing_leaves_no_contract(tmp_path: Path) -> None:
    (tmp_path / CONTRACT).write_text("old")

    def write(folder: Path) -> None:
        (folder / WEIGHTS).write_text("new")
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        publish(tmp_path, write)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {CONTRACT: "old"}


# --- resuming ---

RESUMABLE = ("lora.lora_dropout=0.1", "train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=4")


def test_a_resumed_run_ends_byte_for_byte_as_an_uninterrupted_one(
    run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    """Ctrl-C comes in the middle of an epoch, with dropout, accumulation, and an evaluation each epoch."""
    whole = run(*RESUMABLE, name="whole")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"SIGINT after step 3 of 12(.|\n)*--resume") as stopped:
        run(*RESUMABLE, name="broken", progress=once(signal.SIGINT, step=3))
    assert stopped.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is handler
    broken = tmp_path / "broken"
    checkpoint = checkpoints(broken)[-1]
    assert checkpoint.name == "checkpoint-3"
    assert not (broken / CONTRACT).exists()
    resumed = run(*RESUMABLE, name="broken", resume=True)
    assert resumed.resumed_from == str(checkpoint)
    assert resumed.steps == whole.steps
    assert resumed.eval_loss == whole.eval_loss
    assert (broken / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    losses = [[entry["loss"] for entry in result.history if "loss" in entry] for result in (whole, resumed)]
    assert losses[0] == losses[1]
    counts = [[entry["num_tokens"] for entry in run.history if "num_tokens" in entry] for run in (whole, resumed)]
    assert counts[0] == counts[1]
    tokens_here = counts[1][-1] - counts[1][2]  # of the steps after the third
    assert resumed.tokens_per_second == pytest.approx(tokens_here / resumed.seconds, rel=0.02)


def test_sigterm_ends_with_its_own_code(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(Interrupted) as stopped:
        run(progress=once(signal.SIGTERM, step=1))
    assert stopped.value.exit_code == 143
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    assert not (tmp_path / "run" / CONTRACT).exists()


def test_ctrl_c_in_the_terminal_leaves_a_checkpoint_and_exit_code_130(
    run: Callable[..., TrainResult], run_yaml: Path, tmp_path: Path
) -> None:
    steps = ("train.save_strategy=steps", "train.save_steps=1", "data.validation=[]", "train.max_steps=60")
    folder = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), str(run_yaml), f"output_dir={folder}", *steps]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    ) as process:
        while not checkpoints(folder) and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert "stopped by SIGINT" in err
    assert checkpoints(folder)
    assert not (folder / CONTRACT).exists()
    assert not list(folder.glob(".*"))
    assert run(*steps, resume=True).steps == 60
    assert (folder / CONTRACT).exists()


# --- guards ---


def test_a_loss_that_is_not_finite_stops_the_run(run: Callable[..., TrainResult], tmp_path: Path) -> None:
    with pytest.raises(GuardError, match=r"the loss became (nan|inf) in step [2-6]") as stopped:
        run("train.learning_rate=1e30", "train.lr_scheduler_type=constant")
    assert stopped.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_keeps_the_checkpoint_before_it(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GuardedTrainer.compute_loss

    def poisoned(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 8 else loss

    monkeypatch.setattr(GuardedTrainer, "compute_loss", poisoned)
    with pytest.raises(GuardError, match="the loss became nan in step 9"):
        run("data.validation=[]")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / "run" / CONTRACT).exists()
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(
    run: Callable[..., TrainResult], tmp_path: Path, validation_loss: Callable[..., None]
) -> None:
    validation_loss(lambda loss, step: float("nan"))
    with pytest.raises(GuardError, match="the validation loss became nan after step 6"):
        run()
    assert not (tmp_path / "run").exists()


def test_an_adapter_broken_by_the_last_step_is_not_published(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = GuardedTrainer.train

    def broken(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        next(p for p in self.model.parameters() if p.requires_grad).data[0, 0] = float("nan")
        return output

    monkeypatch.setattr(GuardedTrainer, "train", broken)
    with pytest.raises(GuardError, match=r"1 trained tensors hold values that are not finite"):
        run("train.max_steps=1", "train.save_strategy=no", "data.validation=[]")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_told_in_three_parts(
    run: Callable[..., TrainResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_kit.training.run.write_run_files", full)
    short = ("train.max_steps=1", "train.save_strategy=no", "data.validation=[]")
    with pytest.raises(OutputError, match=r"the disk is full(.|\n)*free some space"):
        run(*short)
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("qlora_kit.training.run_folder.FREE_SPACE_FACTOR", 1e15)
    with pytest.raises(OutputError, match="GiB are free"):
        run(*short)
    assert not (tmp_path / "run").exists()
