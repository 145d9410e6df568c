"""No bad adapter changes an engine: not its base, its names, its modules, nor what its other adapters answer."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft.tuners.lora
import pytest
import torch
from faults.bad_adapters import (
    ALL_KINDS,
    PREFIX,
    Q0,
    VOCABULARY,
    WEIGHTS,
    WIDTH,
    change_config,
    change_tensors,
    make_adapter,
    small_model,
)
from faults.runs import BAD_PATHS
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from qlora_kit.engine import Engine
from qlora_kit.errors import AdapterError, QloraKitError
from qlora_kit.models import load_base_model

IDS = torch.arange(5, 35).reshape(2, 15)


def state_hash(engine: Engine) -> str:
    """SHA-256 over every parameter, buffer and quantization state, and over the names and classes of all modules."""
    digest = hashlib.sha256()
    tensors = {**engine.model.state_dict(), **dict(engine.model.named_buffers())}
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    for name, module in engine.model.named_modules():
        digest.update(f"{name} {type(module).__qualname__}\n".encode())
    return digest.hexdigest()


def logits(engine: Engine, adapter: str | None) -> torch.Tensor:
    with torch.no_grad(), engine.using(adapter) as model:
        return model(input_ids=IDS).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """But for the rounding of a scale, which the bank has in its factors."""
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 * float(expected.abs().max()))


def slots(engine: Engine) -> tuple[str, ...]:
    """The names that PEFT knows."""
    return tuple(engine.model.peft_config) if "peft_config" in vars(engine.model) else ()


def fill(folder: Path, seed: int) -> Path:
    """Random values instead of the zeros that a new adapter's B holds."""
    generator = torch.Generator().manual_seed(seed)
    change_tensors(
        folder, lambda t: t.update({k: 0.3 * torch.randn(v.shape, generator=generator) for k, v in t.items()})
    )
    return folder


@pytest.fixture(scope="module")
def base(chatml_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of ``small_model``."""
    folder = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(folder)
    chatml_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter, not the engine's; tests spoil copies of it."""
    return fill(make_adapter(tmp_path_factory.mktemp("sound") / "guest")[0], seed=1)


@pytest.fixture(scope="module")
def sound_dora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter that goes through PEFT, as those of more than LoRA pairs do."""
    return fill(make_adapter(tmp_path_factory.mktemp("dora") / "guest", use_dora=True)[0], seed=1)


@pytest.fixture(scope="module")
def loaded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine with two good adapters in it, one of them through PEFT."""
    engine = Engine(str(base))
    engine.load(str(fill(make_adapter(tmp_path_factory.mktemp("peft") / "other", use_dora=True)[0], seed=3)))
    engine.load(str(fill(make_adapter(tmp_path_factory.mktemp("good") / "good")[0], seed=2)))
    return engine


@pytest.fixture(params=["first", "beside another"])
def engine(request: pytest.FixtureRequest, base: Path, loaded: Engine) -> Engine:
    """An engine without any adapter, and one with another adapter."""
    return loaded if request.param == "beside another" else Engine(str(base))


@pytest.fixture
def unchanged() -> Iterator[Callable[[Engine], None]]:
    """Tell it an engine: at the end of the test, that engine must be what it was then."""
    before: list[tuple[Engine, Any]] = []

    def facts(engine: Engine) -> Any:
        answers = {name: logits(engine, name) for name in (None, *engine.adapters)}
        return engine.adapters, slots(engine), state_hash(engine), answers

    yield lambda engine: before.append((engine, facts(engine)))
    assert before
    for engine, (adapters, names, digest, answers) in before:
        now = facts(engine)
        assert now[:3] == (adapters, names, digest)
        assert all(torch.equal(now[3][name], answers[name]) for name in answers)


def test_there_are_enough_kinds() -> None:
    assert len(ALL_KINDS) >= 100


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_bad_adapter_is_refused_and_changes_nothing(
    loaded: Engine, sound: Path, tmp_path: Path, unchanged: Callable[[Engine], None], kind: str
) -> None:
    unchanged(loaded)
    folder = shutil.copytree(sound, tmp_path / "guest")
    ALL_KINDS[kind](folder)
    with pytest.raises(AdapterError) as caught:
        loaded.load(str(folder))
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)
    assert not (tmp_path / "canary").exists()


def test_bad_names_and_paths_are_refused(
    loaded: Engine, tmp_path: Path, unchanged: Callable[[Engine], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    unchanged(loaded)
    monkeypatch.chdir(tmp_path)
    for path in BAD_PATHS:
        with pytest.raises(AdapterError) as caught:
            loaded.load(path)
        assert str(caught.value).replace("\n", "").isprintable()


def test_peft_is_not_given_the_pattern_of_an_adapter(loaded: Engine, sound: Path, tmp_path: Path) -> None:
    """This one matches, but ``re`` would take 2^60 steps on each module that it does not match."""
    names = [shutil.copytree(sound, tmp_path / name) for name in ("plain", "hostile")]
    change_config(names[1], target_modules="(.|.)?" * 60 + "[qv]_proj", rank_pattern={"(.|.)?" * 60 + "x": 4})
    plain, hostile = (loaded.load(str(folder)) for folder in names)
    assert torch.equal(logits(loaded, plain), logits(loaded, hostile))


def test_the_engine_still_takes_a_good_one(loaded: Engine, base: Path, sound: Path, tmp_path: Path) -> None:
    name = loaded.load(str(shutil.copytree(sound, tmp_path / "afterwards")))
    fresh = load_base_model(loaded.ref, loaded.quantization, device=torch.device("cpu"))
    expected = PeftModel.from_pretrained(fresh, sound).eval()
    with torch.no_grad():
        close(logits(loaded, name), expected(input_ids=IDS).logits)


# --- failures inside PEFT ---


def fails_in_the_middle(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """PEFT wraps one layer, then stops."""
    create = peft.tuners.lora.LoraModel._create_and_replace
    calls: list[None] = []

    def once(self: Any, *args: Any, **options: Any) -> None:
        if calls:
            raise error
        calls.append(None)
        create(self, *args, **options)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "_create_and_replace", once)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["wrapping", "loading"])
def test_a_failure_inside_peft_leaves_no_trace(
    engine: Engine,
    sound_dora: Path,
    unchanged: Callable[[Engine], None],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    where: str,
) -> None:
    unchanged(engine)

    def fail(*args: object, **options: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if where == "wrapping":
            fails_in_the_middle(patch, error)
        else:
            patch.setattr("qlora_kit.adapter_loading.require_finite", fail)
        told = AdapterError if isinstance(error, ValueError) else type(error)
        with pytest.raises(told):
            engine.load(str(sound_dora))
    assert "guest" not in engine.adapters


def test_the_name_of_a_failed_load_is_free(
    engine: Engine, sound_dora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(sound_dora, tmp_path / f"again-{len(engine.adapters)}")
    with monkeypatch.context() as patch:
        fails_in_the_middle(patch, ValueError("x"))
        with pytest.raises(AdapterError, match="PEFT does not take this adapter: x"):
            engine.load(str(folder))
    name = engine.load(str(folder))
    assert not torch.equal(logits(engine, name), logits(engine, None))


def test_tensors_that_peft_does_not_expect_are_refused_even_if_all_else_let_them_through(
    engine: Engine,
    sound_dora: Path,
    tmp_path: Path,
    unchanged: Callable[[Engine], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last line: PEFT itself would load them over the base without a word."""
    unchanged(engine)
    folder = shutil.copytree(sound_dora, tmp_path / "guest")
    change_tensors(folder, lambda t: t.update({f"{PREFIX}.model.norm.weight": torch.zeros(WIDTH)}))
    monkeypatch.setattr("qlora_kit.adapters.gate._sort_tensors", _let_through(folder))
    monkeypatch.setattr("qlora_kit.adapter_loading.extra_faults", lambda *args: [])
    with pytest.raises(AdapterError, match=r"model\.norm\.weight' is not one of this adapter"):
        engine.load(str(folder))


def _let_through(folder: Path) -> Callable[..., Any]:
    from qlora_kit.adapters import gate

    sort = gate._sort_tensors

    def lenient(path: Path, tensors: Any, settings: Any) -> Any:
        return [], *sort(path, tensors, settings)[1:]

    return lenient


def test_what_peft_cannot_hold_together_is_refused(
    base: Path, tmp_path: Path, unchanged: Callable[[Engine], None]
) -> None:
    """Trained tokens beside a saved copy of the same embedding."""
    engine = Engine(str(base))
    engine.load(str(make_adapter(tmp_path / "saved", modules_to_save=["embed_tokens", "lm_head"])[0]))
    unchanged(engine)
    with pytest.raises(AdapterError, match="in another way than an adapter that is loaded"):
        engine.load(str(make_adapter(tmp_path / "tokens", trainable_token_indices=[1, 5])[0]))


# --- what PEFT would load is what was checked ---


def poisoned(sound: Path, folder: Path) -> Path:
    """A copy that PEFT would load over the base's embedding."""
    shutil.copytree(sound, folder)
    embedding = {f"{PREFIX}.model.embed_tokens.weight": torch.zeros(VOCABULARY, WIDTH)}
    save_file({**load_file(folder / WEIGHTS), **embedding}, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("kind", "step"),
    [("sound", "qlora_kit.engine.loaded.read_factors"), ("sound_dora", "qlora_kit.engine.peft_path.attach_adapter")],
)
def test_files_swapped_after_the_check_are_not_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, kind: str, step: str
) -> None:
    engine = Engine(str(base))
    sound: Path = request.getfixturevalue(kind)
    engine.load(str(sound))
    expected, alone = logits(engine, "guest"), logits(engine, None)
    folder = shutil.copytree(sound, tmp_path / "swapped")
    bad = poisoned(sound, tmp_path / "bad")
    module, _, function = step.rpartition(".")
    take = getattr(importlib.import_module(module), function)

    def swap_first(*args: Any, **options: Any) -> Any:
        shutil.rmtree(folder)
        bad.rename(folder)
        return take(*args, **options)

    monkeypatch.setattr(step, swap_first)
    engine.load(str(folder))
    assert torch.equal(logits(engine, "swapped"), expected)
    assert torch.equal(logits(engine, None), alone)


@pytest.mark.parametrize("how", ["file", "folder", "in place", "deleted"])
def test_files_that_change_between_the_check_and_the_reading_are_refused(
    loaded: Engine,
    sound: Path,
    tmp_path: Path,
    unchanged: Callable[[Engine], None],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    unchanged(loaded)
    folder = shutil.copytree(sound, tmp_path / "moving")
    bad = poisoned(sound, tmp_path / "bad")
    accept = loaded._loaded._require_fit
    calls: list[None] = []

    def swap(*args: Any) -> None:
        accept(*args)
        calls.append(None)
        if len(calls) > 1:
            return
        if how == "file":
            os.replace(bad / WEIGHTS, folder / WEIGHTS)
        elif how == "in place":
            size = (folder / WEIGHTS).stat().st_size
            with (folder / WEIGHTS).open("r+b") as file:
                file.seek(size - 400)
                file.write(b"\xff" * 400)
        else:
            shutil.rmtree(folder)
            if how == "folder":
                bad.rename(folder)

    monkeypatch.setattr(loaded._loaded, "_require_fit", swap)
    pattern = {"in place": "changed while it was read|NaN", "deleted": "no adapter of this name"}
    with pytest.raises(QloraKitError, match=pattern.get(how, "is not declared")):
        loaded.load(str(folder))


def test_a_replacement_during_the_reading_is_read_instead(
    loaded: Engine, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(sound, tmp_path / "replaced")
    other = fill(shutil.copytree(sound, tmp_path / "other"), seed=5)
    expected = load_file(other / WEIGHTS)[f"{Q0}.lora_A.weight"]
    accept = loaded._loaded._require_fit

    def swap(*args: Any) -> None:
        accept(*args)
        if other.exists():
            folder.rename(tmp_path / "aside")
            other.rename(folder)

    monkeypatch.setattr(loaded._loaded, "_require_fit", swap)
    name = loaded.load(str(folder))
    factors = loaded._loaded.get(name).factors
    assert factors is not None
    assert torch.equal(factors.pairs["model.layers.0.self_attn.q_proj"][0], expected)


# --- what is allowed loads as PEFT loads it ---


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 8}, "alpha_pattern": {"v_proj": 32}},
        {"rank_pattern": {r".*\.1\.self_attn\.[qv]_proj": 3}},
        {"target_modules": r".*\.self_attn\.(q|k)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [1, 5]},
        {"trainable_token_indices": {"embed_tokens": [7, 2]}},
        {"task_type": None},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_sound_adapters_of_all_kinds_answer_as_in_peft(
    base: Path, loaded: Engine, tmp_path: Path, settings: dict[str, Any]
) -> None:
    before = logits(loaded, None)
    folder = make_adapter(tmp_path / f"kind{len(loaded.adapters)}", **settings)[0]
    generator = torch.Generator().manual_seed(3)
    change_tensors(
        folder,
        lambda t: t.update({k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in t.items()}),
    )
    name = loaded.load(str(folder))
    fresh = load_base_model(loaded.ref, loaded.quantization, device=torch.device("cpu"))
    expected = PeftModel.from_pretrained(fresh, folder).eval()
    with torch.no_grad():
        close(logits(loaded, name), expected(input_ids=IDS).logits)
    assert not torch.equal(logits(loaded, name), before)
    assert torch.equal(logits(loaded, None), before)
