"""Where the fused path was not measured, a run tries it first, takes it if it is right and fast, and is not changed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fast_models import base_model, packed_batch, padded_batch, with_lora
from peft import PeftModel

from qlora_kit.errors import GuardError, Interrupted
from qlora_kit.fast import ScoredModel, mlp
from qlora_kit.fast.mlp import FastMLP
from qlora_kit.training import TrainResult, exact_trainer, fast_trial, fitting, guarded_trainer
from qlora_kit.training.fast_switch import FastSwitch
from qlora_kit.training.fast_trial import Trial, try_both
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.progress import TrainingProgress

Start = Callable[..., TrainResult]
WEIGHTS = "adapter_model.safetensors"
SHORT = ("train.max_steps=3", "lora.lora_dropout=0.1")


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device without figures, and where any speed will do: timings here say nothing."""
    monkeypatch.setattr(fitting, "MEASURED_ON", ())
    monkeypatch.setattr(fast_trial, "MOST_TIME", math.inf)


def weights(result: TrainResult) -> bytes:
    return (Path(result.output_dir) / WEIGHTS).read_bytes()


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Make every fused MLP answer otherwise in training."""
    right = FastMLP.forward

    def forward(self: FastMLP, x: Any) -> torch.Tensor:
        return change(right(self, x)) if self.training else right(self, x)

    monkeypatch.setattr(FastMLP, "forward", forward)


# --- runs ---


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.neftune_noise_alpha=5",),
        ("train.packing=true", "train.per_device_train_batch_size=1", "train.gradient_checkpointing=true"),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_a_trial_leaves_no_trace_in_the_run(
    start_run: Start, caplog: pytest.LogCaptureFixture, overrides: tuple[str, ...]
) -> None:
    with caplog.at_level(logging.INFO):
        tried = start_run(*SHORT, *overrides, name="tried")
    assert "train.fast: auto takes the fused path, tried on" in caplog.text
    assert "fused are projections in 2 of 2 layers, mlp in 2 of 2 layers, segments, head" in caplog.text
    fused = start_run(*SHORT, *overrides, "train.fast=on", name="fused")
    assert weights(tried) == weights(fused)
    assert tried.train_loss == fused.train_loss
    plain = start_run(*SHORT, *overrides, "train.fast=off", name="plain")
    assert weights(tried) != weights(plain)  # they round differently, or nothing was fused
    assert (tried.fused, fused.fused, plain.fused) == (True, True, False)


def fails(output: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nand more")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda output: output * 1.5, "its loss is "),
        (lambda output: output.detach() + 0.9 * (output - output.detach()), "its gradients of "),
        (lambda output: output * math.nan, "its loss is nan"),
        (fails, "it fails here (RuntimeError: no kernel image is available for execution on the device)"),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_what_is_wrong_is_not_used(
    start_run: Start,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[torch.Tensor], torch.Tensor],
    reason: str,
) -> None:
    plain = start_run(*SHORT, "train.fast=off", name="plain")
    spoil(monkeypatch, change)
    tried = start_run(*SHORT, name="tried")
    (told,) = [record for record in caplog.records if "nothing is fused" in record.message]
    assert told.levelno == logging.WARNING
    assert f"train.fast: nothing is fused: {reason}" in told.message
    assert weights(tried) == weights(plain)


@pytest.mark.usefixtures("unmeasured")
def test_what_is_slower_is_not_used(
    start_run: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_trial, "MOST_TIME", 0.0)
    tried = start_run(*SHORT, name="tried")
    assert "train.fast: nothing is fused: it is slower here (tried on" in caplog.text
    assert not tried.fused
    assert weights(tried) == weights(start_run(*SHORT, "train.fast=off", name="plain"))


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.usefixtures("unmeasured")
def test_a_resumed_run_goes_on_as_it_was(start_run: Start, monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    saved = (*SHORT, "train.save_strategy=steps", "train.save_steps=1", "train.eval_strategy=no")
    monkeypatch.setattr(fast_trial, "MOST_TIME", math.inf if right else 0.0)
    whole = start_run(*saved, name="whole")
    started = start_run(*saved, name="again")
    for path in Path(started.output_dir).iterdir():  # as a run that was killed after its second step
        if path.is_file() and path.name != "run.json":
            path.unlink()
    newest = Path(started.output_dir, "checkpoint-3")
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    monkeypatch.setattr(fast_trial, "MOST_TIME", 0.0 if right else math.inf)
    monkeypatch.setattr(guarded_trainer, "try_both", lambda *args: pytest.fail("tried again"))
    resumed = start_run(*saved, name="again", resume=True)
    assert resumed.resumed_from is not None
    assert weights(resumed) == weights(whole)


@pytest.mark.usefixtures("unmeasured")
def test_a_run_that_is_resumed_on_another_card_tries_again(
    start_run: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was found on the first, which may be a CPU, says nothing of it."""
    saved = (*SHORT, "train.save_strategy=steps", "train.save_steps=1", "train.eval_strategy=no")
    started = start_run(*saved, name="again")
    for path in Path(started.output_dir).iterdir():  # as a run that was killed after its last step
        if path.is_file() and path.name != "run.json":
            path.unlink()
    monkeypatch.setattr(exact_trainer, "card_of", lambda device: "NVIDIA of another kind")
    monkeypatch.setattr(guarded_trainer, "card_of", lambda device: "NVIDIA of another kind")
    monkeypatch.setattr(fast_trial, "MOST_TIME", 0.0)
    caplog.clear()
    assert start_run(*saved, name="again", resume=True).resumed_from is not None
    assert "train.fast: nothing is fused: it is slower here (tried on" in caplog.text


@pytest.mark.usefixtures("unmeasured")
def test_a_gpu_that_fails_for_good_is_told(start_run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access no other call on it succeeds, those that clear up after the trial neither."""

    def dead(*args: object) -> Trial:
        monkeypatch.setattr(GuardedTrainer, "_put_back", broken)
        return broken()

    def broken(*args: object) -> Trial:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nand more")

    monkeypatch.setattr(guarded_trainer, "try_both", dead)
    with pytest.raises(GuardError, match=r"an illegal memory access was encountered\)") as caught:
        start_run(*SHORT, name="run")
    assert "train.fast=off" in str(caught.value)


@pytest.mark.usefixtures("unmeasured")
def test_a_signal_ends_a_trial(
    start_run: Start, stop_at: Callable[[int], Callable[[TrainingProgress], None]], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        start_run(*SHORT, name="stopped", progress=stop_at(0))
    assert not list((tmp_path / "stopped").glob("checkpoint-*"))


@pytest.mark.usefixtures("unmeasured")
def test_in_a_trial_nothing_is_dropped(start_run: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the two paths would draw other masks."""
    seen: list[tuple[bool, int]] = []
    right = GuardedTrainer._one_pass

    def one_pass(self: GuardedTrainer, batch: Mapping[str, Any]) -> torch.Tensor:
        for module in self.model.modules():
            assert module.training is not isinstance(module, torch.nn.Dropout)
        assert self.fast is not None
        seen.append((self.fast.used, sum(isinstance(module, FastMLP) for module in self.model.modules())))
        return right(self, batch)

    monkeypatch.setattr(GuardedTrainer, "_one_pass", one_pass)
    start_run(*SHORT, name="run")
    assert seen == [(False, 0), (True, 2)] * 3


@pytest.mark.usefixtures("unmeasured")
def test_where_nothing_can_be_fused_nothing_is_tried(
    start_run: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.fast.install.FAMILIES", {"llama": "Llama"})
    monkeypatch.setattr(guarded_trainer, "try_both", lambda *args: pytest.fail("tried"))
    with caplog.at_level(logging.INFO):
        start_run("train.max_steps=1")
    assert "train.fast: nothing is fused" in caplog.messages


# --- the trial itself ---


def one_pass_of(fast: FastSwitch, model: PeftModel) -> Callable[[Mapping[str, Any]], torch.Tensor]:
    def one_pass(batch: Mapping[str, Any]) -> torch.Tensor:
        call = model if fast.head is None else ScoredModel(model, fast.head)
        base = model.get_base_model()
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            output = call(**batch, fused_lm_head=True, use_cache=False)
        loss: torch.Tensor = -output.log_probs.sum() / (batch["labels"] != -100).sum()
        loss.backward()
        return loss.detach()

    return one_pass


def tried(model: PeftModel, batch: dict[str, torch.Tensor]) -> Trial:
    fast = FastSwitch(model)
    return try_both(fast, model, batch, one_pass_of(fast, model))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [padded_batch, packed_batch])
@pytest.mark.usefixtures("unmeasured")
def test_both_paths_agree(device: str, dtype: torch.dtype, batch: Callable[[], dict[str, torch.Tensor]]) -> None:
    """On a GPU in 16 bits, conversations are attended to all at once."""
    model = with_lora(base_model(dtype=dtype, initializer_range=0.05).to(device), lora_dropout=0.3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trial = tried(model, {name: value.to(device) for name, value in batch().items()})
    assert trial.refusal is None, str(trial)
    assert "apart" in trial.found
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("batch", [padded_batch, packed_batch])
@pytest.mark.usefixtures("unmeasured")
def test_tokens_are_random_and_what_counts_stays(batch: Callable[[], dict[str, torch.Tensor]]) -> None:
    given, seen = batch(), []
    model = with_lora(base_model())
    fast = FastSwitch(model)
    right = one_pass_of(fast, model)

    def one_pass(batch: Mapping[str, Any]) -> torch.Tensor:
        seen.append(dict(batch))
        return right(batch)

    try_both(fast, model, given, one_pass)
    for found in seen:
        assert torch.equal(found["input_ids"], seen[0]["input_ids"])
        assert (found["input_ids"] != given["input_ids"]).float().mean() > 0.9
        counts = given["labels"] != -100
        assert torch.equal(found["labels"], found["input_ids"].masked_fill(~counts, -100))
        same = given.keys() - {"input_ids", "labels"}
        assert all(torch.equal(found[name], given[name]) for name in same)
    assert torch.equal(given["input_ids"], batch()["input_ids"])


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("name", ["q_proj", "v_proj", "up_proj", "down_proj"])
@pytest.mark.usefixtures("unmeasured")
def test_one_wrong_gradient_in_one_layer_is_seen(layer: int, name: str) -> None:
    """In 16 bits too, where A's gradient of one layer is doubled, as by a kernel that adds up what it should set."""
    model = with_lora(base_model(dtype=torch.bfloat16, initializer_range=0.05, num_hidden_layers=4))
    fast = FastSwitch(model)
    right = one_pass_of(fast, model)
    (weight,) = [w for n, w in model.named_parameters() if f"layers.{layer}." in n and f"{name}.lora_A" in n]

    def wrong(batch: Mapping[str, Any]) -> torch.Tensor:
        loss = right(batch)
        if fast.used and weight.grad is not None:
            weight.grad *= 2
        return loss

    trial = try_both(fast, model, padded_batch(), wrong)
    assert trial.refusal is not None
    assert trial.refusal.startswith("its gradient")
    assert f"{name}.lora_A" in trial.refusal


@pytest.mark.parametrize(
    ("trained", "factor", "refused"),
    [
        ("norm.modules_to_save", 1.2, False),  # a sum over all tokens, which TRL's head makes in 16 bits
        ("norm.modules_to_save", 2.0, True),
        ("norm.modules_to_save", 0.0, True),
        ("v_proj.lora_B", 1.2, True),
    ],
)
@pytest.mark.usefixtures("unmeasured")
def test_whole_modules_may_be_farther_apart_in_16_bits(trained: str, factor: float, refused: bool) -> None:
    model = with_lora(base_model(dtype=torch.bfloat16, initializer_range=0.05), modules_to_save=["norm"])
    fast = FastSwitch(model)
    right = one_pass_of(fast, model)

    def changed(batch: Mapping[str, Any]) -> torch.Tensor:
        loss = right(batch)
        for name, weight in model.named_parameters():
            if fast.used and trained in name and weight.grad is not None:
                weight.grad *= factor
        return loss

    refusal = try_both(fast, model, packed_batch(), changed).refusal
    assert (refusal is not None) == refused, refusal
    if refusal is not None:
        assert trained in refusal or "layernorm.modules_to_save" in refusal


@pytest.mark.parametrize("least", [12, 10**9])
@pytest.mark.usefixtures("unmeasured")
def test_where_memory_ends_less_is_tried(least: int) -> None:
    model = with_lora(base_model())
    fast = FastSwitch(model)
    right = one_pass_of(fast, model)

    def small(batch: Mapping[str, Any]) -> torch.Tensor:
        if batch["input_ids"].numel() > 40 - least:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return right(batch)

    trial = try_both(fast, model, {name: value.repeat(1, 2) for name, value in packed_batch().items()}, small)
    if least > 40:
        assert trial.refusal == "there is no memory to try it"
        assert trial.tokens[1] < 32
    else:
        assert trial.refusal is None
        assert trial.tokens == (1, 20)
    assert not fast.used


@pytest.mark.usefixtures("unmeasured")
def test_what_is_left_of_a_batch_has_labels() -> None:
    """Of one conversation its end, which is the answer; two paths that give zeros would be alike."""
    model = with_lora(base_model())
    fast = FastSwitch(model)
    right = one_pass_of(fast, model)

    def small(batch: Mapping[str, Any]) -> torch.Tensor:
        if batch["input_ids"].shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        loss = right(batch)
        if fast.used:
            for weight in model.parameters():
                weight.grad = None if weight.grad is None else 2 * weight.grad
        return loss

    batch = packed_batch()
    batch["labels"][:, :22] = -100
    trial = try_both(fast, model, batch, small)
    assert trial.tokens == (1, 20)
    assert trial.refusal is not None
    assert "gradients of" in trial.refusal
    batch["labels"][:] = -100
    assert try_both(fast, model, batch, right).refusal == "no token of the batch is supervised"


@pytest.mark.usefixtures("unmeasured")
def test_what_takes_more_memory_is_not_used() -> None:
    model = with_lora(base_model())
    fast = FastSwitch(model)
    right = one_pass_of(fast, model)

    def hungry(batch: Mapping[str, Any]) -> torch.Tensor:
        if fast.used:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return right(batch)

    trial = try_both(fast, model, packed_batch(), hungry)
    assert trial.refusal == "it takes more memory here than the libraries' own path"
    assert trial.tokens == (1, 40)


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 64, "lora_alpha": 512, "use_rslora": True}])
@pytest.mark.usefixtures("unmeasured")
def test_rounding_in_many_layers_is_not_taken_for_a_fault(settings: dict[str, Any]) -> None:
    """Where some weights' gradients are a tenth of the others', and where pairs weigh much."""
    base = base_model(dtype=torch.bfloat16, initializer_range=0.02, num_hidden_layers=28)
    model = with_lora(base, **settings)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    trial = tried(model, packed_batch())
    assert trial.refusal is None, str(trial)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("unmeasured")
def test_a_pair_that_is_left_out_of_the_inputs_gradient_is_seen(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Where pairs begin at zero it would make no difference yet; later the run would go astray."""
    right = mlp._SwigluLora.backward

    def without(ctx: Any, grad_inner: torch.Tensor, grad_branch: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *_, grad_a, grad_b = right(ctx, grad_inner.clone(), grad_branch)
        grad_gate, grad_up, *_ = right(ctx, grad_inner, torch.zeros_like(grad_branch))
        return grad_gate, grad_up, None, grad_a, grad_b

    monkeypatch.setattr(mlp._SwigluLora, "backward", staticmethod(without))
    model = with_lora(base_model(dtype=dtype, initializer_range=0.05, num_hidden_layers=4))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(weight)
    trial = tried(model, packed_batch())
    assert trial.refusal is not None
    assert "gradients of" in trial.refusal


def test_with_tf32_products_are_those_of_16_bits() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert fast_trial._limits(torch.float32) is fast_trial.IN_16_BITS
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert fast_trial._limits(torch.float32) is fast_trial.IN_FP32
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert fast_trial._limits(torch.bfloat16) is fast_trial.IN_16_BITS


def test_attention_dropout_cannot_be_compared() -> None:
    trial = tried(with_lora(base_model(attention_dropout=0.1)), padded_batch())
    assert trial.refusal == "attention_dropout draws other masks on it"
