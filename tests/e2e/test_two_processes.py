"""Two processes on the CPU, started with the shipped accelerate config: they train what one trains, stop, and go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_kit.adapters import AdapterContract
from qlora_kit.config import load_config
from qlora_kit.training import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "adapter_model.safetensors"
# With Adam's usual epsilon, the sign of a gradient near zero decides a whole step, and rounding decides the sign.
SAME = ("train.num_train_epochs=6", "train.adam_epsilon=1.0e-2", "train.logging_steps=1")
ALONE = ("train.per_device_train_batch_size=8", "train.per_device_eval_batch_size=8")
EACH = (
    "train.per_device_train_batch_size=2",
    "train.gradient_accumulation_steps=2",
    "train.per_device_eval_batch_size=4",
)


def launch(*arguments: str) -> subprocess.Popen[str]:
    """``accelerate launch`` of two processes without a GPU."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*launcher, "--config_file", "configs/accelerate/ddp.yaml", "train.py", *arguments, "--json"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def overrides(run_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """48 training and 8 validation rows: whole batches, however they are shared out."""
    validation = tmp_path_factory.mktemp("rows") / "validation.jsonl"
    lines = (run_yaml.parent / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    validation.write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    return (*SAME, f"data.validation={validation}")


@pytest.fixture(scope="module")
def command(run_yaml: Path, overrides: tuple[str, ...]) -> Callable[..., subprocess.Popen[str]]:
    """Starts two processes: ``command(folder, *options)``."""

    def start(folder: Path, *options: str) -> subprocess.Popen[str]:
        return launch(str(run_yaml), *overrides, *EACH, f"output_dir={folder}", *options)

    return start


@pytest.fixture(scope="module")
def pair(
    command: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """The folder of a run of two processes, and what it wrote to stdout and stderr."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    process = command(folder)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return folder, out, err


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def values(folder: Path, name: str) -> list[float]:
    return [entry[name] for entry in record(folder)["history"] if name in entry]


def test_two_processes_train_what_one_trains_with_all_the_rows_of_a_step(
    pair: tuple[Path, str, str], run_yaml: Path, overrides: tuple[str, ...], tmp_path: Path
) -> None:
    two, out, err = pair
    one = tmp_path / "one"
    train(load_config(run_yaml, [*overrides, *ALONE, f"output_dir={one}"]))
    losses = values(one, "loss")
    assert len(losses) == 36
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    for name in ("loss", "eval_loss", "num_tokens", "learning_rate"):
        assert values(two, name) == pytest.approx(values(one, name), rel=1e-4)
    expected, found = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)

    figures = json.loads(out)  # of one process alone
    assert err.count("loading") == 1
    assert figures["steps"] == 36
    assert figures["tokens_per_second"] * figures["seconds"] == pytest.approx(values(two, "num_tokens")[-1], rel=0.01)
    files = [{path.name for path in folder.iterdir() if path.suffix != ".png"} for folder in (two, one)]
    assert files[0] == files[1]  # the command writes plots, too
    alone, together = AdapterContract.load(one), AdapterContract.load(two)
    assert (together.base, together.quantization, together.data) == (alone.base, alone.quantization, alone.data)


def test_a_signal_to_the_launcher_leaves_a_checkpoint_that_two_processes_go_on_from(
    command: Callable[..., subprocess.Popen[str]], pair: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "stopped"
    process = command(folder)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=280)
    assert process.returncode != 0
    assert err.count("stopped by SIGTERM") == 1
    assert not (folder / WEIGHTS).exists()

    process = command(folder, "--resume")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert json.loads(out)["resumed_from"].startswith(f"{folder}/checkpoint-")
    assert (folder / WEIGHTS).read_bytes() == (pair[0] / WEIGHTS).read_bytes()
    assert values(folder, "loss") == pytest.approx(values(pair[0], "loss"), rel=1e-6)


# --- a base that is split ---

SPLIT = """
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from qlora_kit.base_files import resolve_base
from qlora_kit.config import QuantizationSection
from qlora_kit.models import load_base_model
from qlora_kit.training.sharding import shard_base

dist.init_process_group("gloo")
ids = torch.arange(48).reshape(3, 16) + 5
for dtype in ("float32", "bfloat16"):
    quantization = QuantizationSection(bnb_4bit_compute_dtype=dtype)
    results = []
    for split in (False, True):
        base = load_base_model(resolve_base("tiny", None), quantization, device=torch.device("cpu"), shardable=split)
        torch.manual_seed(0)
        settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(base, settings, autocast_adapter_dtype=True)
        whole = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        if split:
            shard_base(model, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((loss, gradients, whole))
    held = [p.to_local() for p in model.parameters() if not p.requires_grad]
    share = sum(p.numel() * p.element_size() for p in held) / results[1][2]
    (loss, gradients, _), (split_loss, split_gradients, _) = results
    worst = max((gradients[n] - split_gradients[n]).abs().max().item() for n in gradients)
    largest = max(g.abs().max().item() for g in gradients.values())
    if dist.get_rank() == 0:
        print(dtype, loss.item() == split_loss.item(), worst, largest, round(share, 3), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def test_each_process_holds_half_of_a_split_base_and_computes_the_same(tmp_path: Path) -> None:
    """The reference is the whole base: losses and gradients to the bit, in fp32 and in bf16 with fp32 adapters."""
    program = tmp_path / "split.py"
    program.write_text(SPLIT, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([*launcher, str(program)], env=environment, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    lines = [line.split() for line in found.stdout.splitlines()]
    assert [line[0] for line in lines] == ["float32", "bfloat16"]
    for _, same_loss, worst, largest, share in lines:
        assert same_loss == "True"
        assert float(worst) == 0 < float(largest)
        assert float(share) == pytest.approx(0.5, abs=0.01)


def test_a_run_with_a_split_base_is_the_run_with_whole_ones(
    command: Callable[..., subprocess.Popen[str]], pair: tuple[Path, str, str], tmp_path: Path
) -> None:
    """To the byte, although it was stopped and resumed on the way."""
    folder = tmp_path / "split"
    process = command(folder, "train.shard_base=true")
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 8/"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate(timeout=280)
    assert process.returncode != 0
    assert err.count("stopped by SIGTERM") == 1, err
    process = command(folder, "train.shard_base=true", "--resume")
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    assert json.loads(out)["resumed_from"].startswith(f"{folder}/checkpoint-")
    assert (folder / WEIGHTS).read_bytes() == (pair[0] / WEIGHTS).read_bytes()
    assert values(folder, "loss") == values(pair[0], "loss")
    assert values(folder, "eval_loss") == values(pair[0], "eval_loss")


def test_a_fault_that_the_main_process_finds_is_told_once_and_ends_both(
    command: Callable[..., subprocess.Popen[str]], pair: tuple[Path, str, str]
) -> None:
    before = sorted(pair[0].rglob("*"))
    process = command(pair[0])
    _, err = process.communicate(timeout=280)
    assert process.returncode != 0
    assert err.count("is occupied") == 1
    codes = re.findall(r"exitcode +: (-?[0-9]+)", err)  # the root cause comes last
    assert len(codes) == 2
    assert codes[-1] == "2"
    assert codes[0] in ("2", "-15")  # the launcher may be quicker to end the other
    assert sorted(pair[0].rglob("*")) == before
