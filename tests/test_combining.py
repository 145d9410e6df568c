"""Combining adapters: exactly the weighted sum or PEFT's own result, refused where neither holds, scored and stored."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2ForCausalLM

from qlora_kit.adapters import AdapterContract, AdapterStore
from qlora_kit.cli import main
from qlora_kit.combining import Combination, Method, Part, Wishes, combine_adapters, layers, parse_part
from qlora_kit.config import load_config
from qlora_kit.data.encoding import encode_conversation
from qlora_kit.data.preparing import prepare
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, ConfigError, GuardError
from qlora_kit.likelihood import answer_nlls
from qlora_kit.training import TrainResult

Q_PROJ, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture
def make(trained_run: tuple[Path, TrainResult], random_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a store's adapter with random factors and a contract: ``make(name, seed, contract={...}, **settings)``."""
    contract = AdapterContract.load(trained_run[0])

    def make_adapter(name: str, seed: int = 0, contract_changes: dict[str, Any] | None = None, **settings: Any) -> Path:
        model = Qwen2ForCausalLM.from_pretrained(random_base)
        chosen = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False, **settings}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
        folder = tmp_path / "adapters" / name
        adapted.save_pretrained(folder, save_embedding_layers=False)
        settings_file = folder / "adapter_config.json"
        content = json.loads(settings_file.read_text())
        settings_file.write_text(json.dumps({**content, "init_lora_weights": True}))
        replace(contract, name=name, **(contract_changes or {})).save(folder)
        return folder

    return make_adapter


def combine(
    tmp_path: Path, *parts: tuple[str, float], method: Method = "cat", score: bool = False, **wishes: Any
) -> Combination:
    store = AdapterStore(tmp_path / "adapters")
    chosen = Wishes(method, **wishes)
    return combine_adapters([Part(*part) for part in parts], store, chosen, name="mix", score=score)


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Scaling · B·A of each layer in fp64, by PEFT's documented rules and nothing of the kit's."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    found = {}
    for name, a in tensors.items():
        if "lora_A" not in name:
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next(
            (value for key, value in (config["alpha_pattern"] or {}).items() if module.endswith(key)),
            config["lora_alpha"],
        )
        scaling = alpha / (math.sqrt(len(a)) if config["use_rslora"] else len(a))
        found[module] = scaling * tensors[name.replace("lora_A", "lora_B")].double() @ a.double()
    return found


def weighted_sum(tmp_path: Path, *parts: tuple[str, float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for name, weight in parts:
        for module, delta in deltas(tmp_path / "adapters" / name).items():
            total[module] = total.get(module, torch.zeros_like(delta)) + weight * delta
    return total


def by_peft(base: Path, tmp_path: Path, *parts: tuple[str, float], **settings: Any) -> dict[str, torch.Tensor]:
    """What PEFT makes of whole models: scaling · B·A of each layer."""
    model = Qwen2ForCausalLM.from_pretrained(base)
    peft_model: Any = None
    for name, _ in parts:
        folder = tmp_path / "adapters" / name
        if peft_model is None:
            peft_model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            peft_model.load_adapter(folder, adapter_name=name)
    peft_model.add_weighted_adapter([name for name, _ in parts], [weight for _, weight in parts], "all", **settings)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("all").double()
        for name, module in peft_model.named_modules()
        if hasattr(module, "get_delta_weight") and "all" in module.lora_A
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert float((found[name] - delta).norm()) <= tolerance * float(delta.norm()), name


PARTS = (("a", 0.7), ("b", -0.4))
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank": {"r": 7, "lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}},
    "targets": {"target_modules": ["down_proj", "v_proj"]},
}


@pytest.mark.parametrize("other", OTHERS)
def test_cat_is_the_weighted_sum_whatever_the_settings(make: Callable[..., Path], tmp_path: Path, other: str) -> None:
    make("a", 1, use_rslora=True)
    make("b", 2, **OTHERS[other])
    found = combine(tmp_path, *PARTS)
    assert_equal(deltas(found.card.path), weighted_sum(tmp_path, *PARTS))
    assert found.largest_difference < 1e-6


@pytest.mark.parametrize("rank", [None, 1, 3, 8])
def test_svd_is_pefts_own_and_the_nearest_of_its_rank(
    make: Callable[..., Path], random_base: Path, tmp_path: Path, rank: int | None
) -> None:
    make("a", 1)
    make("b", 2)
    found = combine(tmp_path, *PARTS, method="svd", rank=rank)
    expected = by_peft(random_base, tmp_path, *PARTS, combination_type="svd", svd_rank=rank)
    assert_equal(deltas(found.card.path), expected, 1e-4)
    total = weighted_sum(tmp_path, *PARTS)
    lost = []
    for delta in total.values():
        values = torch.linalg.svdvals(delta)
        lost.append(float(values[rank or 4 :].norm() / values.norm()))
    assert found.difference == pytest.approx(sum(lost) / len(lost), abs=1e-5)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_the_others_are_pefts_own(make: Callable[..., Path], random_base: Path, tmp_path: Path, method: Method) -> None:
    make("a", 1)
    make("b", 2, lora_alpha=3)
    parts = (("a", 0.7), ("b", 0.4))
    density = 0.6 if method == "ties" else None
    found = combine(tmp_path, *parts, method=method, density=density)
    assert_equal(
        deltas(found.card.path), by_peft(random_base, tmp_path, *parts, combination_type=method, density=density)
    )
    total = weighted_sum(tmp_path, *parts)
    off = [float((deltas(found.card.path)[name] - delta).norm() / delta.norm()) for name, delta in total.items()]
    assert found.difference == pytest.approx(sum(off) / len(off), rel=1e-4)
    assert found.difference > 0.3  # neither is the weighted sum, and the figure says so


def test_peft_on_whole_models_scales_rslora_once_more(
    make: Callable[..., Path], random_base: Path, tmp_path: Path
) -> None:
    """The reason for one layer at a time; a PEFT that passes this needs it no longer."""
    make("a", 1, use_rslora=True)
    make("b", 2, use_rslora=True)
    found = by_peft(random_base, tmp_path, *PARTS, combination_type="cat")
    for name, delta in weighted_sum(tmp_path, *PARTS).items():
        assert float(found[name].norm() / delta.norm()) == pytest.approx(math.sqrt(8), rel=1e-4)


def test_dare_ties_is_drawn_by_its_seed(make: Callable[..., Path], tmp_path: Path) -> None:
    make("a", 1)
    make("b", 2)
    store = AdapterStore(tmp_path / "adapters")
    found = {}
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        wishes = Wishes("dare_ties", density=0.5, seed=seed)
        made = combine_adapters([Part("a"), Part("b")], store, wishes, name=name, score=False)
        found[name] = deltas(made.card.path)
        assert made.contract.combined_from is not None
        assert (made.contract.combined_from.density, made.contract.combined_from.seed) == (0.5, seed)
    assert_equal(found["again"], found["one"], 0.0)
    assert not torch.equal(found["two"][Q_PROJ], found["one"][Q_PROJ])


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, OTHERS["patterns"]], ids=str)
def test_one_adapter_at_weight_one_is_itself(
    make: Callable[..., Path], random_base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = make("a", 1, **settings)
    found = combine(tmp_path, ("a", 1.0))
    assert_equal(deltas(found.card.path), deltas(folder), 1e-6)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        ours, own = (
            PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(random_base), path).eval()(ids).logits
            for path in (found.card.path, folder)
        )
    torch.testing.assert_close(ours, own, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_a_result_of_peft_that_is_wrong_stops_it(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Method
) -> None:
    make("a", 1)
    make("b", 2)
    through_peft = layers._through_peft

    def wrong(*arguments: Any) -> layers.Factors:
        found = through_peft(*arguments)
        return replace(found, b=found.b * (1.001 if method != "linear" or len(arguments[0]) == 1 else 1.0))

    monkeypatch.setattr(layers, "_through_peft", wrong)
    with pytest.raises(GuardError, match=r"model\.layers\.0\.mlp\.down_proj") as caught:
        combine(tmp_path, *PARTS, method=method)
    assert caught.value.exit_code == 3
    assert [card.name for card in AdapterStore(tmp_path / "adapters").list()] == ["a", "b"]


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_parts_that_nearly_cancel_each_other_out_are_combined(
    make: Callable[..., Path], tmp_path: Path, method: Method
) -> None:
    weights = make("a", 1) / "adapter_model.safetensors"
    near = make("b", 1) / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor * (1 + 1e-4) for name, tensor in tensors.items()}, near, metadata={"format": "pt"})
    found = combine(tmp_path, ("a", -1.0), ("b", 1.0), method=method)
    sizes = deltas(weights.parent)
    for name, delta in deltas(found.card.path).items():
        torch.testing.assert_close(delta, 2e-4 * sizes[name], rtol=0, atol=1e-5 * float(sizes[name].abs().max()))


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], dict[str, Any], str]] = {
    "dora": (AdapterError, {"use_dora": True}, {}, "use_dora"),
    "saved-module": (AdapterError, {"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
    "trained-rows": (AdapterError, {"trainable_token_indices": [3, 4]}, {}, "trainable_token_indices"),
    "bias": (AdapterError, {"bias": "all"}, {}, "bias: it brings biases of the base"),
    "linear-ranks": (AdapterError, {"r": 8}, {"method": "linear"}, r"ranks differ in 4 layers.*a has 4, b has 8"),
    "ties-ranks": (AdapterError, {"r": 8}, {"method": "ties"}, "ranks differ"),
    "dare-ranks": (AdapterError, {"rank_pattern": {"q_proj": 2}}, {"method": "dare_ties"}, "ranks differ in 2 layers"),
    "rank-too-large": (AdapterError, {}, {"method": "svd", "rank": 9}, "ranks of the parts add up to 8"),
    "rank-with-cat": (ConfigError, {}, {"rank": 4}, "--rank 4 with --method cat"),
    "rank-zero": (ConfigError, {}, {"method": "svd", "rank": 0}, "--rank 0"),
    "density-with-cat": (ConfigError, {}, {"density": 0.5}, "--density 0.5 with --method cat"),
    "density-two": (ConfigError, {}, {"method": "ties", "density": 2.0}, "--density 2.0"),
    "seed-with-cat": (ConfigError, {}, {"seed": 0}, "--seed 0 with --method cat"),
    "seed-with-ties": (ConfigError, {}, {"method": "ties", "seed": 1}, "--seed 1 with --method ties"),
    "seed-too-large": (ConfigError, {}, {"method": "dare_ties", "seed": 2**70}, f"--seed {2**70}"),
    "seed-below-zero": (ConfigError, {}, {"method": "dare_ties", "seed": -1}, "--seed -1"),
    "no-method": (ConfigError, {}, {"method": "mean"}, "--method is 'mean'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_by_name(make: Callable[..., Path], tmp_path: Path, case: str) -> None:
    error, settings, wishes, message = REFUSED[case]
    make("a", 1)
    make("b", 2, **settings)
    with pytest.raises(error, match=message):
        combine(tmp_path, ("a", 1.0), ("b", 1.0), **wishes)
    assert [card.name for card in AdapterStore(tmp_path / "adapters").list()] == ["a", "b"]


def test_adapters_that_do_not_belong_together_are_refused(
    make: Callable[..., Path], trained_run: tuple[Path, TrainResult], tmp_path: Path
) -> None:
    contract = AdapterContract.load(trained_run[0])
    make("a", 1)
    changes: dict[str, dict[str, Any]] = {
        "base weights": {"base": replace(contract.base, id="x", fingerprint="sampled-1:" + "0" * 64)},
        "stop tokens": {"stop_token_ids": (7,)},
        "chat template": {"chat_template_sha256": "0" * 64},
        "bnb_4bit_quant_type": {"quantization": {**contract.quantization, "bnb_4bit_quant_type": "fp4"}},
    }
    for message, change in changes.items():
        shutil.rmtree(tmp_path / "adapters" / "b", ignore_errors=True)
        make("b", 2, contract_changes=change)
        with pytest.raises(AdapterError, match=f"a and b do not belong together: .*{message}"):
            combine(tmp_path, ("a", 1.0), ("b", 1.0))
    (tmp_path / "adapters" / "b" / "qlora_kit.json").unlink()
    with pytest.raises(AdapterError, match="has no contract"):
        combine(tmp_path, ("a", 1.0), ("b", 1.0))
    with pytest.raises(AdapterError, match="named twice"):
        combine(tmp_path, ("a", 1.0), ("a", 1.0))
    shutil.copytree(tmp_path / "adapters" / "a", tmp_path / "twin")
    with pytest.raises(AdapterError, match="a and twin hold the same weights"):
        combine(tmp_path, ("a", 1.0), (str(tmp_path / "twin"), -1.0))
    with pytest.raises(ConfigError, match="of one adapter"):
        combine(tmp_path, ("a", 1.0), method="svd")
    with pytest.raises(AdapterError, match="is the name of one of the parts"):
        combine_adapters([Part("a")], AdapterStore(tmp_path / "adapters"), Wishes(), name="a", score=False)
    with pytest.raises(ConfigError, match="weight below 0 for a"):
        combine(tmp_path, ("a", -1.0), ("b", 1.0), method="ties")


@pytest.mark.parametrize("text", ["a:0", "a:x", "a:nan", "a:inf", ":1", "a:"])
def test_a_weight_is_a_number(text: str) -> None:
    assert parse_part("a:-0.5") == Part("a", -0.5)
    assert parse_part("a") == Part("a", 1.0)
    with pytest.raises(ConfigError, match="names no adapter with a weight"):
        parse_part(text)


@pytest.mark.parametrize("weight", [0.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused_wherever_it_comes_from(tmp_path: Path, weight: float) -> None:
    with pytest.raises(ConfigError, match=f"'b' has the weight {weight}"):
        combine(tmp_path, ("a", 1.0), ("b", weight))


def test_it_is_scored_on_both_tasks_and_stored_with_a_contract(
    make: Callable[..., Path], trained_run: tuple[Path, TrainResult], random_model: PreTrainedModel, tmp_path: Path
) -> None:
    run = trained_run[0]
    store = AdapterStore(tmp_path / "adapters")
    store.add(run, "reviews")
    other = make("other", 2, contract_changes={"task": "else", "system_prompt": "Answer."}, r=2)
    shutil.copyfile(run / "config.yaml", other / "config.yaml")

    found = combine_adapters([Part("reviews", 0.9), Part("other", 0.01)], store, Wishes(), name="mix")

    assert [(score.rows_of, score.adapter, score.rows) for score in found.scores] == [
        (rows, adapter, 9) for rows in ("reviews", "other") for adapter in ("mix", "reviews", "other")
    ]
    engine = Engine(found.contract.base.id, store=store.root)
    examples = prepare(load_config(run / "config.yaml")).validation
    rows = [encode_conversation(example.messages, engine.tokenizer, loss_on="last") for example in examples]
    tokens = sum(row.supervised_tokens for row in rows)
    for score in found.scores[:3]:
        with engine.using(engine.load(score.adapter)) as model:
            expected = sum(answer_nlls(model, rows, batch_size=4, pad_token_id=0)) / tokens
        assert score.loss == pytest.approx(expected, rel=1e-5)
    contract = AdapterContract.load(found.card.path)
    assert contract == found.contract
    assert (contract.origin, contract.task, contract.system_prompt) == ("combined", "sentiment+else", None)
    assert contract.combined_from is not None
    assert [(part.name, part.weight) for part in contract.combined_from.parts] == [("reviews", 0.9), ("other", 0.01)]
    assert contract.metrics["reviews/eval_loss"] == found.scores[0].loss
    assert any("different system prompts" in note for note in found.notes)


def test_the_command(
    make: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make("a", 1)
    make("b", 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "combine", "a:0.7", "b:0.3", "--name", "mix", "--json"])
    out, err = capsys.readouterr()
    assert ended.value.code in (0, None), err
    content = json.loads(out.splitlines()[-1])
    assert content["adapters"][0]["name"] == "mix"
    assert content["parts"] == [{"name": "a", "weight": 0.7}, {"name": "b", "weight": 0.3}]
    assert "note: not scored on sentiment (a): there is no config.yaml" in err
    for arguments, message in (
        (["a", "b", "--name", "mix"], "or give --replace"),
        (["a", "b", "--name", "c", "--method", "mean"], "--method is 'mean'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["adapters", "combine", *arguments, "--no-score"])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["adapters", "show", "mix"])
    assert "cat of a x 0.7, b x 0.3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["adapters", "adopt", "mix", "--base", "tiny", "--trained-in", "4bit", "--replace"])
    assert ended.value.code == 2
    assert "which its combination wrote" in capsys.readouterr().err
