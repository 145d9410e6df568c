"""Where an adapter begins: EVA against principal components, LoftQ against its residual, and going on from another."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from qlora_kit.adapters import AdapterContract, check_adapter_folder
from qlora_kit.base_files import resolve_base
from qlora_kit.config import LoraSection, QuantizationSection, load_config
from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, ConfigError, Interrupted
from qlora_kit.four_bit import linear4bit_modules
from qlora_kit.models import attach_lora, load_base_model
from qlora_kit.training import TrainResult
from qlora_kit.training.initialising import EvaBatches, best_factors, initialise_with_eva, initialise_with_loftq

WEIGHTS = "adapter_model.safetensors"
NO_VALIDATION = ("data.validation=[]", "train.save_strategy=no")


def codes_of(base: torch.nn.Module) -> str:
    """A hash of all 4-bit weights with their block scales."""
    digest = hashlib.sha256()
    for _, module in sorted(linear4bit_modules(base).items()):
        digest.update(module.weight.data.contiguous().view(torch.uint8).numpy().tobytes())
        digest.update(module.weight.quant_state.absmax.contiguous().numpy().tobytes())
    return digest.hexdigest()


def random_rows(count: int, length: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 300, (length,), generator=generator).tolist()} for _ in range(count)]


@pytest.fixture
def base(random_base: Path) -> PreTrainedModel:
    return load_base_model(resolve_base(str(random_base)), QuantizationSection())


# --- EVA ---


def test_eva_spans_the_principal_directions_of_each_layers_inputs(base: PreTrainedModel) -> None:
    rows = random_rows(12, 32)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linear4bit_modules(base)}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name, module in linear4bit_modules(base).items()
    ]
    with torch.no_grad():
        base(torch.tensor([row["input_ids"] for row in rows]))
    for handle in handles:
        handle.remove()
    before = codes_of(base)
    model = attach_lora(base, LoraSection(r=4, lora_alpha=8, init_lora_weights="eva"))
    initialise_with_eva(model, rows, pad_token_id=0, seed=1)  # type: ignore[arg-type]
    ranks = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = name.removeprefix("base_model.model.")
        inputs = torch.cat(seen[name]).double().numpy()
        centred = inputs - inputs.mean(0)
        best = (np.linalg.svd(centred, compute_uv=False) ** 2)[
            : module.r["default"]
        ].sum()  # the most r directions hold
        found = module.lora_A["default"].weight.detach().double().numpy()  # (r, in)
        np.testing.assert_allclose(found @ found.T, np.eye(len(found)), atol=1e-4)
        by_chance = (centred**2).sum() * len(found) / inputs.shape[1]
        assert ((centred @ found.T) ** 2).sum() > max(0.8 * best, 1.3 * by_chance), name
        ranks[name] = len(found)
        assert module.lora_B["default"].weight.abs().max() == 0
        assert module.scaling["default"] == pytest.approx(2.0)
    assert len(set(ranks.values())) > 1
    assert sum(ranks.values()) == 4 * len(seen)
    assert codes_of(base) == before


def test_eva_batches_have_enough_tokens_and_an_end() -> None:
    rows = random_rows(7, 10)
    rows[3]["input_ids"] = rows[3]["input_ids"][:4]
    batches = EvaBatches(rows, tokens=25, pad_token_id=0, seed=0)  # type: ignore[arg-type]
    passes = iter(batches)
    first = [next(passes) for _ in range(len(batches))]
    assert all(int(batch["attention_mask"].sum()) >= 24 for batch in first)
    real = [ids[mask.bool()].tolist() for batch in first for ids, mask in zip(*batch.values(), strict=True)]
    assert all({"input_ids": row} in rows for row in real)
    assert len(real) == len({tuple(row) for row in real})
    with pytest.raises(ConfigError, match="vary in fewer directions"):
        list(passes)


def test_eva_refuses_what_it_cannot_work_with(base: PreTrainedModel) -> None:
    model = attach_lora(base, LoraSection(r=4, init_lora_weights="eva"))
    with pytest.raises(ConfigError, match="16 tokens at least"):
        initialise_with_eva(model, random_rows(1, 8), pad_token_id=0, seed=0)  # type: ignore[arg-type]
    model = attach_lora(model.unload(), LoraSection(r=32, init_lora_weights="eva"))
    with pytest.raises(ConfigError, match="layers of 128 inputs at least, four times the rank, and one has 64"):
        initialise_with_eva(model, random_rows(9, 64), pad_token_id=0, seed=0)  # type: ignore[arg-type]


def test_an_eva_run_resumes_exactly_and_its_adapter_loads(
    start_run: Callable[..., TrainResult], random_base: Path, tmp_path: Path, stop_at: Callable[[int], Any]
) -> None:
    eva = ("lora.init_lora_weights=eva", "lora.r=2", "train.max_steps=4", "data.validation=[]")
    start_run(*eva, name="whole")
    with pytest.raises(Interrupted):
        start_run(*eva, name="broken", progress=stop_at(2))
    start_run(*eva, name="broken", resume=True)
    whole = tmp_path / "whole"
    assert (whole / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()
    files = check_adapter_folder(whole)
    assert {files.config.rank_of(module) for module in files.pairs} == {pair.r for pair in files.pairs.values()}
    engine = Engine(str(random_base))
    name = engine.load(str(whole))
    ids = torch.arange(40, 70).reshape(2, 15)
    fresh = load_base_model(engine.ref, engine.quantization, device=torch.device("cpu"))
    with torch.no_grad(), engine.using(name) as model:
        found, expected = model(ids).logits, PeftModel.from_pretrained(fresh, whole).eval()(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


# --- LoftQ ---


@pytest.mark.parametrize(("shape", "r"), [((20, 50), 3), ((50, 20), 7), ((8, 8), 8)])
def test_best_factors_are_eckart_and_youngs(shape: tuple[int, int], r: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b = best_factors(matrix, r)
    left, values, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    best = (left[:, :r] * values[:r]) @ right[:r]
    np.testing.assert_allclose((b.double() @ a.double()).numpy(), best, atol=1e-5)
    np.testing.assert_allclose(a.norm(dim=1).numpy(), np.sqrt(values[:r]), rtol=1e-4)
    np.testing.assert_allclose(b.norm(dim=0).numpy(), np.sqrt(values[:r]), rtol=1e-4)


@pytest.mark.parametrize("shards", ["one file", "several"])
def test_loftq_makes_up_for_the_error_of_the_quantization(
    random_model: PreTrainedModel, random_base: Path, tmp_path: Path, shards: str
) -> None:
    folder = random_base
    if shards == "several":
        folder = tmp_path / "sharded"
        shutil.copytree(random_base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        random_model.save_pretrained(folder, max_shard_size="150KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    base = load_base_model(resolve_base(str(folder)), QuantizationSection())
    before = codes_of(base)
    model = attach_lora(base, LoraSection(r=4, lora_alpha=16, use_rslora=True, init_lora_weights="loftq"))
    initialise_with_loftq(model, folder)
    assert codes_of(base) == before
    weights = dict(random_model.named_parameters())
    for name, module in linear4bit_modules(base).items():
        layer = model.get_submodule(f"base_model.model.{name}")
        used = dequantize_4bit(module.weight.data, module.weight.quant_state)
        residual = (weights[f"{name}.weight"] - used).detach()
        delta = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach() * 16 / 4**0.5
        values = np.linalg.svd(residual.double().numpy(), compute_uv=False)
        assert (residual - delta).norm().item() == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-4), name
        assert (residual - delta).norm() < 0.95 * residual.norm()


def test_a_loftq_run_begins_nearer_to_the_16_bit_base(
    start_run: Callable[..., TrainResult], random_model: PreTrainedModel, random_base: Path, tmp_path: Path
) -> None:
    start_run(
        *("lora.init_lora_weights=loftq", "lora.r=16", "train.max_steps=1", "train.learning_rate=1e-12"), *NO_VALIDATION
    )
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["init_lora_weights"] is True
    check_adapter_folder(tmp_path / "run")
    base = load_base_model(resolve_base(str(random_base)), QuantizationSection())
    ids = torch.arange(40, 72).reshape(1, 32)
    with torch.no_grad():
        wanted, plain = random_model(ids).logits, base(ids).logits
        with_adapter = PeftModel.from_pretrained(base, tmp_path / "run").eval()(ids).logits
    assert (with_adapter - wanted).abs().mean() < 0.8 * (plain - wanted).abs().mean()


def test_loftq_refuses_a_base_without_16_bit_weights(
    start_run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "qlora_kit.training.starting_adapter.read_model_config", lambda ref: {"quantization_config": {}}
    )
    with pytest.raises(ConfigError, match="loftq needs the 16-bit weights"):
        start_run("lora.init_lora_weights=loftq")


# --- going on from an adapter ---


@pytest.fixture
def source(trained_run: tuple[Path, TrainResult], tmp_path: Path) -> Path:
    """A copy of a trained adapter, outside of any run folder."""
    folder = tmp_path / "earlier"
    shutil.copytree(trained_run[0], folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


def test_training_goes_on_from_the_adapters_own_weights(
    start_run: Callable[..., TrainResult], source: Path, tmp_path: Path
) -> None:
    tiny_step = ("train.learning_rate=1e-30", "train.max_steps=1", *NO_VALIDATION)
    new = start_run(*tiny_step, name="new")
    result = start_run(f"model.adapter={source}", *tiny_step, name="next")
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "next" / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert result.train_loss < 0.7 * new.train_loss
    contract = AdapterContract.load(tmp_path / "next")
    assert contract.continued_from is not None
    assert contract.continued_from.name == "reviews"
    assert contract.continued_from.sha256 == hashlib.sha256((source / WEIGHTS).read_bytes()).hexdigest()
    assert AdapterContract.load(tmp_path / "new").continued_from is None
    saved = load_config(tmp_path / "next" / "config.yaml")
    assert (saved.lora.r, saved.lora.lora_alpha, saved.model.adapter) == (4, 8, str(source))


def test_a_continued_run_resumes_exactly(
    start_run: Callable[..., TrainResult], source: Path, tmp_path: Path, stop_at: Callable[[int], Any]
) -> None:
    on = (f"model.adapter={source}", "lora.lora_dropout=0.1", "train.max_steps=4", "data.validation=[]")
    start_run(*on, name="whole")
    with pytest.raises(Interrupted):
        start_run(*on, name="broken", progress=stop_at(2))
    start_run(*on, name="broken", resume=True)
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() != (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes((tmp_path / "whole" / WEIGHTS).read_bytes())
    with pytest.raises(ConfigError, match=r"--resume: model\.adapter names other weights"):
        start_run(*on, name="broken", resume=True)


@pytest.fixture
def no_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.training.run.load_base_model", None)


@pytest.mark.usefixtures("no_base")
def test_settings_that_differ_are_refused_by_name(
    start_run: Callable[..., TrainResult], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        start_run(
            f"model.adapter={source}",
            *("lora.r=8", "lora.use_dora=true", "lora.target_modules=[q_proj]", "lora.init_lora_weights=eva"),
        )
    keys = [str(fault).split(":")[0] for fault in caught.value.faults]
    assert sorted(keys) == ["lora.init_lora_weights", "lora.r", "lora.target_modules", "lora.use_dora"]
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_base")
def test_settings_that_agree_may_be_given(start_run: Callable[..., TrainResult], source: Path) -> None:
    """Then the run comes as far as loading the base, which the fixture took away."""
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        start_run(f"model.adapter={source}", "lora.r=4", "lora.lora_alpha=8", "lora.target_modules=all-linear")


@pytest.mark.usefixtures("no_base")
def test_an_adapter_of_another_base_or_of_the_run_itself_is_refused(
    start_run: Callable[..., TrainResult], source: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"base weights: the fingerprint(.|\n)*"):
        start_run(f"model.adapter={source}", "model.base=tiny")
    with pytest.raises(AdapterError, match=r"quantization: trained with load_in_4bit: true"):
        start_run(f"model.adapter={source}", "quantization.load_in_4bit=false")
    with pytest.raises(ConfigError, match=r"lies in output_dir(.|\n)*--resume"):
        start_run(f"model.adapter={source}", name="earlier", overwrite=True)
    assert (source / WEIGHTS).is_file()
    with pytest.raises(AdapterError, match="nowhere"):
        start_run("model.adapter=nowhere")


def test_an_adapter_without_a_contract_is_told_of(
    start_run: Callable[..., TrainResult], source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "qlora_kit.json").unlink()
    with caplog.at_level(logging.WARNING):
        start_run(f"model.adapter={source}", "train.max_steps=1", *NO_VALIDATION)
    assert "has no contract" in caplog.text
    earlier = AdapterContract.load(tmp_path / "run").continued_from
    assert earlier is not None
    assert earlier.name == "earlier"
