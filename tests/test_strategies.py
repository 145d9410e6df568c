"""What each training strategy does: a step, a curve or a stop of a short run, against its own formula."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, PreTrainedTokenizerFast, TrainerControl, TrainerState, set_seed
from trl import SFTConfig

from qlora_kit.base_files import resolve_base
from qlora_kit.config import LoraSection, QuantizationSection, TrainSection, load_config
from qlora_kit.errors import ConfigError, Interrupted
from qlora_kit.four_bit import linear4bit_modules
from qlora_kit.models import attach_lora, load_base_model
from qlora_kit.training import TrainResult, train
from qlora_kit.training.early_stopping import Patience
from qlora_kit.training.guarded_trainer import GuardedTrainer
from qlora_kit.training.optimizers import parameter_groups
from qlora_kit.training.task_metric import TaskMetric, spread

WEIGHTS = "adapter_model.safetensors"
NO_VALIDATION = ("data.validation=[]", "train.save_strategy=no")
RATE = 0.01
ONE_STEP = (
    *("train.max_steps=1", "train.lr_scheduler_type=constant", f"train.learning_rate={RATE}", "train.max_grad_norm=0"),
)


@dataclass(frozen=True)
class FirstStep:
    """The first batch of a run, and the model that it meets, made without the kit's trainer."""

    batch: dict[str, torch.Tensor]
    model: PeftModel

    def answers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, V) and targets (N,) of the supervised tokens."""
        logits = self.model(input_ids=self.batch["input_ids"], attention_mask=self.batch["attention_mask"]).logits
        targets = self.batch["labels"][:, 1:]
        return logits[:, :-1][targets != -100], targets[targets != -100]

    def gradients(self, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        """By the names of the saved adapter."""
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        return {name.replace(".default", ""): gradient for name, gradient in zip(named, found, strict=True)}

    def start(self) -> dict[str, torch.Tensor]:
        """The weights before the step."""
        named = self.model.named_parameters()
        return {name.replace(".default", ""): p.detach().clone() for name, p in named if p.requires_grad}


@pytest.fixture(scope="module")
def first_step(
    run_yaml: Path, random_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], FirstStep]:
    batches: list[dict[str, torch.Tensor]] = []
    original = GuardedTrainer.training_step

    def record(self: GuardedTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        batches.append({key: value.clone() for key, value in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuardedTrainer, "training_step", record)
        folder = tmp_path_factory.mktemp("first") / "run"
        train(load_config(run_yaml, [f"output_dir={folder}", *ONE_STEP, *NO_VALIDATION]))

    def made(r: int = 4) -> FirstStep:
        set_seed(42)
        base = load_base_model(resolve_base(str(random_base)), QuantizationSection())
        return FirstStep(batches[0], attach_lora(base, LoraSection(r=r, lora_alpha=2 * r)))

    return made


@pytest.fixture
def scripted_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], None]:
    """Lets a test say the validation loss after each step."""
    original = GuardedTrainer.evaluation_loop

    def script(loss_at: Callable[[int], float]) -> None:
        def loop(self: GuardedTrainer, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            output.metrics["eval_loss"] = loss_at(self.state.global_step)
            return output

        monkeypatch.setattr(GuardedTrainer, "evaluation_loop", loop)

    return script


# --- what is trained on ---


def test_each_loss_is_its_formula_and_the_validation_loss_stays_plain(
    start_run: Callable[..., TrainResult], first_step: Callable[..., FirstStep]
) -> None:
    step = first_step()
    logits, targets = step.answers()
    log_p = F.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    wanted = {
        "train.loss_type=nll": -log_p.mean(),
        "train.label_smoothing_factor=0.2": F.cross_entropy(logits, targets, label_smoothing=0.2),
        "train.loss_type=dft": -(log_p.exp().detach() * log_p).mean(),
    }
    validation = set()
    for index, (setting, loss) in enumerate(wanted.items()):
        result = start_run(setting, *ONE_STEP, "train.learning_rate=1e-30", name=f"run{index}")
        norm = torch.stack([gradient.norm() for gradient in step.gradients(loss).values()]).norm()
        first = result.history[0]
        assert first["loss"] == pytest.approx(loss.item(), rel=1e-3), setting
        assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), setting
        validation.add(result.eval_loss)
    assert len(validation) == 1
    assert len({round(loss.item(), 3) for loss in wanted.values()}) == 3


def test_neftune_disturbs_the_embeddings_in_training_only(
    start_run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise: dict[str, list[torch.Tensor]] = {"training_step": [], "prediction_step": []}

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(GuardedTrainer, name)

        def step(self: GuardedTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            model.train(name == "training_step")
            embedding = self.model.get_input_embeddings()
            noise[name].append((embedding(inputs["input_ids"]) - embedding.weight[inputs["input_ids"]]).detach())
            return original(self, model, inputs, *args, **kwargs)

        return step

    for name in noise:
        monkeypatch.setattr(GuardedTrainer, name, watched(name))
    start_run("train.neftune_noise_alpha=5", "train.max_steps=2")
    for added in noise["training_step"]:
        bound = 5 / math.sqrt(added.shape[1] * added.shape[2])  # (B, T, H), https://arxiv.org/abs/2310.05914
        assert 0.9 * bound < added.abs().max() <= bound * 1.001
    assert noise["prediction_step"]
    assert all(added.abs().max() == 0 for added in noise["prediction_step"])


# --- the adapter's form ---


def test_rslora_scales_by_the_root_of_the_rank(random_base: Path) -> None:
    base = load_base_model(resolve_base(str(random_base)), QuantizationSection())
    model = attach_lora(base, LoraSection(r=16, lora_alpha=8, use_rslora=True)).eval()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x, (a, b) = torch.randn(3, 64), (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    torch.nn.init.normal_(b)
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
        torch.testing.assert_close(added, x @ (b @ a).T * 8 / 16**0.5, rtol=1e-4, atol=1e-3)


def test_dora_trains_magnitude_and_direction(
    start_run: Callable[..., TrainResult], random_base: Path, tmp_path: Path
) -> None:
    start_run("lora.use_dora=true", "train.max_steps=3", *NO_VALIDATION)
    base = load_base_model(resolve_base(str(random_base)), QuantizationSection())
    weights = {
        name: dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in linear4bit_modules(base).items()
    }
    model = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    tensors = load_file(tmp_path / "run" / WEIGHTS)
    for name, weight in weights.items():
        path = f"base_model.model.{name}"
        direction = weight + 2 * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
        magnitude = tensors[f"{path}.lora_magnitude_vector"]
        assert (magnitude - weight.norm(dim=1)).abs().max() > 1e-3, name  # it was trained
        x = torch.randn(2, weight.shape[1])
        with torch.no_grad():
            found = model.get_submodule(path)(x)
        bias = model.get_submodule(path).base_layer.bias
        wanted = x @ (direction * (magnitude / direction.norm(dim=1))[:, None]).T + (0 if bias is None else bias)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


# --- optimizers ---


def adam(gradient: torch.Tensor) -> torch.Tensor:
    """Adam's first step without its rate: both moments are those of this gradient alone."""
    return gradient / (gradient.abs() + 1e-8)


def adafactor(gradient: torch.Tensor) -> torch.Tensor:
    """Adafactor's first step (https://arxiv.org/abs/1804.04235): second moments by row and column, update clipped."""
    square = gradient**2 + 1e-30
    rows, columns = square.mean(1), square.mean(0)
    update = gradient / torch.sqrt(rows[:, None] * columns[None] / rows.mean())
    return update / max(1.0, update.pow(2).mean().sqrt().item())


@pytest.mark.parametrize(
    ("optimizer", "update", "rank", "state"),
    [
        ("adamw_torch", adam, 4, torch.float32),
        ("sgd", lambda gradient: gradient, 4, None),
        ("adafactor", adafactor, 4, torch.float32),
        ("paged_adamw_32bit", adam, 4, torch.float32),
        ("adamw_8bit", adam, 64, torch.uint8),
        ("paged_adamw_8bit", adam, 64, torch.uint8),
    ],
)
def test_an_optimizer_takes_its_own_first_step(
    start_run: Callable[..., TrainResult],
    first_step: Callable[..., FirstStep],
    tmp_path: Path,
    optimizer: str,
    update: Callable[[torch.Tensor], torch.Tensor],
    rank: int,
    state: torch.dtype | None,
) -> None:
    step = first_step(rank)
    logits, targets = step.answers()
    gradients = step.gradients(F.cross_entropy(logits, targets))
    settings = (f"train.optim={optimizer}", f"lora.r={rank}", f"lora.lora_alpha={2 * rank}", "data.validation=[]")
    start_run(*settings, *ONE_STEP)
    after = load_file(tmp_path / "run" / WEIGHTS)
    for name, before in step.start().items():
        # a factor B of zeros gives A no gradient yet
        change = torch.zeros_like(before) if "lora_A" in name else -RATE * update(gradients[name])
        far = gradients[name].abs() > 1e-5  # nearer to zero, rounding decides Adam's step
        torch.testing.assert_close((after[name] - before)[far], change[far], rtol=2e-3, atol=1e-7)
        assert "lora_A" in name or far.float().mean() > 0.9
    states = torch.load(tmp_path / "run" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
    moments = {
        value.dtype
        for of_one in states.values()
        for name, value in (of_one | of_one.get("__bnb_optimizer_quant_state__", {})).items()
        if name in ("exp_avg", "exp_avg_sq_row", "state1")
    }
    assert state in moments if state is not None else not moments  # small tensors keep 32 bits


def test_loraplus_gives_the_rates_of_pefts_helper(random_base: Path) -> None:
    base = load_base_model(resolve_base(str(random_base)), QuantizationSection())
    model = attach_lora(base, LoraSection(r=4, use_dora=True))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    wanted = {p: group["lr"] for group in theirs.param_groups for p in group["params"]}
    section = TrainSection(learning_rate=1e-3, loraplus_lr_ratio=16.0)
    groups = parameter_groups(model.named_parameters(), layers=2, train=section, weight_decays=lambda name: 0.0)
    assert {p: group["lr"] for group in groups for p in group["params"]} == wanted
    assert sorted(set(wanted.values())) == [1e-3, 1.6e-2]
    assert groups[0]["lr"] == 1e-3


def test_loraplus_and_layerwise_decay_set_the_step_of_each_factor_and_layer(
    start_run: Callable[..., TrainResult], first_step: Callable[..., FirstStep], tmp_path: Path
) -> None:
    step = first_step()
    logits, targets = step.answers()
    gradients = step.gradients(F.cross_entropy(logits, targets))
    result = start_run(
        *("train.optim=sgd", "train.loraplus_lr_ratio=8", "train.layerwise_lr_decay=0.5"), *ONE_STEP, *NO_VALIDATION
    )
    after = load_file(tmp_path / "run" / WEIGHTS)
    for name, before in step.start().items():
        rate = 0 if "lora_A" in name else RATE * 8 * (0.5 if ".layers.0." in name else 1)
        torch.testing.assert_close(after[name] - before, -rate * gradients[name], rtol=1e-3, atol=1e-7)
    assert result.history[0]["learning_rate"] == RATE


def test_layerwise_decay_counts_from_the_top_and_keeps_the_decay_of_weights() -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.q.lora_A.weight" for i in range(3)), "lm_head.weight"]
    named = [(name, torch.nn.Parameter(torch.zeros(2, 2))) for name in names]
    section = TrainSection(learning_rate=1.0, layerwise_lr_decay=0.5)
    groups = parameter_groups(named, layers=3, train=section, weight_decays=lambda name: 0.1 * ("lm_head" in name))
    found = {name: group for name, p in named for group in groups if any(p is q for q in group["params"])}
    assert [found[name]["lr"] for name in names] == [0.125, 0.25, 0.5, 1.0, 1.0]
    assert found["lm_head.weight"]["weight_decay"] == 0.1
    assert found[names[3]]["weight_decay"] == 0
    assert groups[0]["lr"] == 1.0


def test_layers_unfreeze_from_the_top(start_run: Callable[..., TrainResult], tmp_path: Path) -> None:
    """Until its turn comes, an adapter keeps its first weights to the bit, weight decay or not."""
    result = start_run(
        *("train.unfreeze_layers_every=2", "train.max_steps=4", "train.weight_decay=0.5", "data.validation=[]"),
        *("train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=9"),
    )
    saved = [load_file(tmp_path / "run" / f"checkpoint-{step}" / WEIGHTS) for step in (1, 2, 3, 4)]
    for name in saved[0]:
        moves = [not torch.equal(one[name], other[name]) for one, other in pairwise(saved)]
        assert moves == ([True] * 3 if ".layers.1." in name else [False, True, True]), name
    assert all(saved[1][name].abs().max() == 0 for name in saved[1] if ".layers.0." in name and "lora_B" in name)
    assert result.trainable_parameters == sum(tensor.numel() for tensor in saved[0].values())


# --- schedulers ---


def cosine(share: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * share))


# Name -> (arguments, factor after warm-up, by the share of the 4 steps after the 2 of warm-up that are done).
CURVES: dict[str, tuple[str, Callable[[float], float]]] = {
    "linear": ("", lambda share: 1 - share),
    "cosine": ("", cosine),
    "cosine_with_restarts": ("num_cycles: 2", lambda share: cosine(2 * share % 1)),
    "polynomial": ("power: 2, lr_end: 0.001", lambda share: 0.9 * (1 - share) ** 2 + 0.1),
    "constant": ("", lambda share: 1),
    "constant_with_warmup": ("", lambda share: 1),
    "inverse_sqrt": ("", lambda share: math.sqrt(2 / (2 + 4 * share))),
    "cosine_with_min_lr": ("min_lr: 0.002", lambda share: 0.8 * cosine(share) + 0.2),
    "cosine_warmup_with_min_lr": ("min_lr_rate: 0.2", lambda share: 0.8 * cosine(share + 0.25) + 0.2),  # one step ahead
    "warmup_stable_decay": ("num_decay_steps: 2", lambda share: cosine(max(0.0, 2 * share - 1))),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_scheduler_follows_its_curve(start_run: Callable[..., TrainResult], name: str) -> None:
    arguments, factor = CURVES[name]
    steps = ("train.max_steps=6", "train.warmup_steps=2", "train.per_device_train_batch_size=1", "train.max_length=128")
    given = (f"train.lr_scheduler_kwargs={{{arguments}}}",) if arguments else ()
    result = start_run(f"train.lr_scheduler_type={name}", f"train.learning_rate={RATE}", *steps, *given, *NO_VALIDATION)
    found = [line["learning_rate"] / RATE for line in result.history if "learning_rate" in line]
    warm = {"constant": [1, 1], "cosine_warmup_with_min_lr": [0.5, 1]}.get(name, [0, 0.5])
    assert found == pytest.approx([*warm, *(factor(step / 4) for step in range(4))], abs=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "losses", "factors"),
    [
        ("reduce_lr_on_plateau", "factor: 0.5, patience: 0", [1, 2, 1, 0.5], [1, 1, 0.5, 0.25]),
        ("greedy", "factor: 0.5, patience: 0, min_lr: 0.0001, max_lr: 0.04", [3, 2, 3, 3], [1, 2, 4, 2]),
    ],
)
def test_a_scheduler_follows_the_validation_loss(
    start_run: Callable[..., TrainResult],
    scripted_losses: Callable[..., None],
    name: str,
    arguments: str,
    losses: list[float],
    factors: list[float],
) -> None:
    scripted_losses(lambda step: losses[step - 1])
    result = start_run(
        *(f"train.lr_scheduler_type={name}", f"train.lr_scheduler_kwargs={{{arguments}}}", "train.max_steps=4"),
        *("train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=false"),
        f"train.learning_rate={RATE}",
    )
    found = [line["learning_rate"] / RATE for line in result.history if "learning_rate" in line]
    assert found == pytest.approx(factors)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (
            ["train.optim=adamw_torch_npu_fused"],
            r"train.optim: adamw_torch_npu_fused does not run here(.|\n)*torch_npu",
        ),
        (["train.optim_args='momentum'", "train.optim=sgd"], r"train.optim: sgd does not run here"),
        (["train.lr_scheduler_type=cosine_with_min_lr"], r"min_lr(.|\n)*min_lr_rate: 0.1"),
        (["train.lr_scheduler_type=warmup_stable_decay"], r"num_decay_steps(.|\n)*num_decay_steps: 100"),
        (["train.lr_scheduler_type=cosine", "train.lr_scheduler_kwargs={power: 2}"], r"power(.|\n)*of num_cycles"),
        (["train.lr_scheduler_type=greedy", "train.learning_rate=1e-4"], r"greedy never goes below its min_lr 0.001"),
    ],
)
def test_what_cannot_run_is_refused_before_the_base_is_loaded(
    start_run: Callable[..., TrainResult],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    settings: list[str],
    what: str,
) -> None:
    monkeypatch.setattr("qlora_kit.training.run.load_base_model", None)
    with pytest.raises(ConfigError, match=what):
        start_run(*settings)
    assert not (tmp_path / "run").exists()


def test_paging_on_a_cpu_is_told(
    start_run: Callable[..., TrainResult], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    start_run("train.optim=paged_adamw_8bit", "train.max_steps=1", *NO_VALIDATION)
    assert "no paged memory on the CPU" in caplog.text


# --- early stopping, and what best means ---


def test_patience_counts_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(0)
    for higher in (False, True):
        for _ in range(50):
            values = torch.randint(0, 6, (12,), generator=generator).tolist()
            arguments = SFTConfig("x", greater_is_better=higher, metric_for_best_model="eval_it", use_cpu=True)
            theirs, state, control = EarlyStoppingCallback(3), TrainerState(), TrainerControl()
            ours = Patience(key="eval_it", higher_is_better=higher, evaluations=3, threshold=0.0)
            history: list[dict[str, Any]] = [{"step": 0, "loss": 1.0}]
            for step, value in enumerate(values):
                theirs.on_evaluate(arguments, state, control, {"eval_it": value})
                so_far = value if state.best_metric is None else state.best_metric
                state.best_metric = max(value, so_far) if higher else min(value, so_far)
                history.append({"step": step, "eval_it": value})
                assert ours.exhausted(history) == control.should_training_stop
                if control.should_training_stop:
                    break


def test_the_threshold_says_what_counts_as_better() -> None:
    history = [{"step": step, "eval_loss": loss} for step, loss in enumerate([1.0, 0.95, 0.92, 0.88])]
    patience = [Patience("eval_loss", False, 2, threshold) for threshold in (0.0, 0.1, 0.2)]
    assert [one.exhausted(history) for one in patience] == [False, False, True]  # 0.88 is 0.12 better than the best
    assert patience[1].exhausted(history[:3])


def test_a_run_stops_early_keeps_the_best_and_stays_stopped(
    start_run: Callable[..., TrainResult], scripted_losses: Callable[..., None], tmp_path: Path
) -> None:
    scripted_losses(lambda step: 100 - step if step <= 4 else 100 + step)
    settings = (
        *("train.early_stopping_patience=2", "train.eval_strategy=steps", "train.eval_steps=2"),
        *("train.save_strategy=steps", "train.save_steps=2"),
    )
    result = start_run(*settings)
    assert (result.steps, result.kept_step, result.stopped_early) == (8, 4, True)
    assert result.eval_loss == 96
    run = tmp_path / "run"
    kept = (run / WEIGHTS).read_bytes()
    best = load_file(run / "checkpoint-4" / WEIGHTS)
    assert all(torch.equal(best[name], tensor) for name, tensor in load_file(run / WEIGHTS).items())
    for name in (WEIGHTS, "qlora_kit.json"):  # as if the process had died before it published
        (run / name).unlink()
    again = start_run(*settings, resume=True)
    assert (again.steps, again.kept_step, again.stopped_early, again.eval_loss) == (8, 4, True, 96)
    assert result.fused and again.fused
    assert (run / WEIGHTS).read_bytes() == kept


def test_a_run_that_gets_better_is_not_stopped(
    start_run: Callable[..., TrainResult], scripted_losses: Callable[..., None]
) -> None:
    scripted_losses(lambda step: 100 - step)
    result = start_run("train.early_stopping_patience=1")
    assert (result.steps, result.kept_step, result.stopped_early) == (12, 12, False)


def test_the_metric_in_training_is_that_of_greedy_answers(
    start_run: Callable[..., TrainResult],
    random_base: Path,
    run_yaml: Path,
    tmp_path: Path,
    chatml_tokenizer: PreTrainedTokenizerFast,
) -> None:
    result = start_run("train.metric_for_best_model=accuracy", "train.learning_rate=3e-2", "train.metric_rows=5")
    found = {line["step"]: line["eval_accuracy"] for line in result.history if "eval_accuracy" in line}
    assert found.keys() == {6, 12}
    config = load_config(run_yaml)
    rows = [json.loads(line) for line in (run_yaml.parent / "validation.jsonl").read_text().splitlines()]
    rows = [rows[index] for index in (0, 1, 3, 5, 7)]  # five at even distances of nine
    base = load_base_model(resolve_base(str(random_base)), config.quantization)
    model = PeftModel.from_pretrained(base, tmp_path / "run" / "checkpoint-12").eval()
    right = 0
    for row in rows:
        system = {"role": "system", "content": config.task_spec().system_prompt}
        turns = [system, {"role": "user", "content": row["text"]}]
        encoded = chatml_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        prompt = encoded["input_ids"]
        out = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False, eos_token_id=2, pad_token_id=0)
        right += chatml_tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip() == row["label"]
    assert found[12] == right / 5
    assert result.task_metric == found[result.kept_step] == max(found.values())


@pytest.mark.parametrize(("metric", "kept"), [("accuracy", 12), ("perplexity", 6)])
def test_the_best_adapter_is_chosen_by_the_metric_in_its_direction(
    start_run: Callable[..., TrainResult],
    scripted_losses: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    metric: str,
    kept: int,
) -> None:
    scripted_losses(float)
    values = iter([0.2, 0.9, 0.5])
    monkeypatch.setattr(TaskMetric, "measure", lambda self, model, *, interrupt: next(values))
    result = start_run(f"train.metric_for_best_model={metric}", "train.num_train_epochs=3")
    assert result.kept_step == kept
    assert result.task_metric == {12: 0.9, 6: 0.2}[kept]
    best = load_file(tmp_path / "run" / f"checkpoint-{kept}" / WEIGHTS)
    assert all(torch.equal(best[name], tensor) for name, tensor in load_file(tmp_path / "run" / WEIGHTS).items())


def test_measuring_the_metric_changes_nothing_in_training(
    start_run: Callable[..., TrainResult], tmp_path: Path
) -> None:
    last = ("lora.lora_dropout=0.2", "train.load_best_model_at_end=false", "train.neftune_noise_alpha=5")
    start_run(*last, name="without")
    start_run(*last, "train.metric_for_best_model=macro_f1", name="with")
    assert (tmp_path / "with" / WEIGHTS).read_bytes() == (tmp_path / "without" / WEIGHTS).read_bytes()


def test_rows_for_the_metric_are_spread_over_the_file() -> None:
    rows: Any = list(range(10))
    assert spread(rows, 5) == (0, 2, 4, 6, 8)
    assert spread(rows, 3) == (0, 3, 6)
    assert spread(rows, 99) == tuple(rows)


# --- resuming with all of them ---


def test_a_run_with_every_strategy_resumes_to_the_same_bytes(
    start_run: Callable[..., TrainResult], tmp_path: Path, stop_at: Callable[[int], Any]
) -> None:
    """The signal comes while one layer is frozen, in the middle of an epoch."""
    settings = (
        *("train.optim=adamw_8bit", "lora.r=64", "train.loraplus_lr_ratio=4", "train.layerwise_lr_decay=0.7"),
        *("train.unfreeze_layers_every=5", "train.neftune_noise_alpha=5", "train.label_smoothing_factor=0.1"),
        *("train.metric_for_best_model=token_f1", "train.early_stopping_patience=1", "train.learning_rate=1e-3"),
        *("train.weight_decay=0.01", "lora.lora_dropout=0.1", "lora.use_dora=true"),
    )
    whole = start_run(*settings, name="whole")
    with pytest.raises(Interrupted):
        start_run(*settings, name="broken", progress=stop_at(3))
    resumed = start_run(*settings, name="broken", resume=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()
    assert (resumed.steps, resumed.kept_step, resumed.task_metric) == (whole.steps, whole.kept_step, whole.task_metric)
