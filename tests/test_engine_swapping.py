"""Adapters come, change and go while requests run: each request ends on the version that it began with."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from random_adapters import alone, with_adapter, write_adapter
from transformers import PreTrainedModel

from qlora_kit.adapters.mixing import parse_adapter
from qlora_kit.config import QuantizationSection
from qlora_kit.conversation import Message
from qlora_kit.engine import Engine, Handle, Request
from qlora_kit.engine.prefix_cache import PrefixCache
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.generation import Sampling
from qlora_kit.generation.kv_rows import StoredRow

PROMPT = tuple(range(40, 60))
NEW = 24


@pytest.fixture
def store(random_model: PreTrainedModel, tmp_path: Path) -> Path:
    root = tmp_path / "store"
    for seed, name in enumerate("abcd"):
        write_adapter(root / name, random_model, seed=seed)
    write_adapter(root / "dora", random_model, seed=8, use_dora=True)
    return root


@pytest.fixture
def engine(random_base: Path, store: Path) -> Engine:
    return Engine(str(random_base), store=store, quantization=QuantizationSection(load_in_4bit=False), slots=2)


def ask(engine: Engine, adapter: str | None) -> Handle:
    return engine.submit(Request(prompt_ids=PROMPT, adapter=adapter, sampling=Sampling(NEW)))


def ids_of(handle: Handle) -> list[int]:
    return [token for delta in handle for token in delta.token_ids]


def by_peft(model: PreTrainedModel, folder: Path | None, engine: Engine) -> list[int]:
    ids = alone(with_adapter(model, folder), PROMPT, NEW)
    stops = [place for place, token in enumerate(ids) if token in engine.stop_token_ids]
    return ids[: stops[0]] if stops else ids


def replace(store: Path, name: str, new: Path) -> None:
    shutil.rmtree(store / name)
    shutil.copytree(new, store / name)


@pytest.mark.parametrize("name", ["a", "dora"])
def test_running_requests_finish_on_the_version_they_began_with(
    engine: Engine, store: Path, random_model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    settings = {"use_dora": True} if name == "dora" else {}
    new = write_adapter(tmp_path / "new", random_model, seed=77, **settings)
    old_ids, new_ids = (by_peft(random_model, folder, engine) for folder in (store / name, new))
    assert old_ids != new_ids
    running, waiting = ask(engine, name), ask(engine, name)
    first = next(running).token_ids
    replace(store, name, new)
    engine.reload(name)
    after = ask(engine, name)
    for _ in range(3):
        engine.advance()
    engine.unload(name)
    assert [*first, *ids_of(running)] == old_ids
    assert ids_of(waiting) == old_ids
    assert ids_of(after) == new_ids
    assert engine.adapters == ()
    assert engine.stats().slots_used == 0
    assert "peft_config" not in vars(engine.model)
    assert ids_of(ask(engine, None)) == by_peft(random_model, None, engine)


def test_what_is_known_of_prompts_belongs_to_one_version(
    engine: Engine, store: Path, random_model: PreTrainedModel, tmp_path: Path
) -> None:
    new = write_adapter(tmp_path / "new", random_model, seed=77)
    assert ids_of(ask(engine, "a")) == by_peft(random_model, store / "a", engine)
    replace(store, "a", new)
    engine.reload("a")
    reused = engine.stats().prompt_tokens_reused
    assert ids_of(ask(engine, "a")) == by_peft(random_model, new, engine)
    assert engine.stats().prompt_tokens_reused == reused


def test_a_bad_replacement_leaves_the_loaded_version(
    engine: Engine, store: Path, random_model: PreTrainedModel
) -> None:
    expected = by_peft(random_model, store / "a", engine)
    engine.load("a")
    (store / "a" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        engine.reload("a")
    assert ids_of(ask(engine, "a")) == expected
    for use in (engine.reload, engine.unload):
        with pytest.raises(AdapterError, match="'ghost' is not loaded"):
            use("ghost")


def test_more_adapters_than_slots_and_more_than_host_memory_takes(
    engine: Engine, store: Path, random_model: PreTrainedModel
) -> None:
    expected = {name: by_peft(random_model, store / name, engine) for name in "abcd"}
    engine.load("d")
    size = engine._loaded.get("d").factors.bytes
    engine._loaded._host_bytes = 2 * size
    for name in "abcabdc":
        assert ids_of(ask(engine, name)) == expected[name], name
    assert engine.stats().slots_used == 2
    assert set(engine.adapters) == {"d", "b", "c"}  # d was loaded by hand; a was used least recently
    assert engine.available() == ("a", "b", "c", "d", "dora")


def test_adapters_that_go_through_peft_count_too(
    random_base: Path, random_model: PreTrainedModel, tmp_path: Path
) -> None:
    for seed, name in enumerate("xyz"):
        write_adapter(tmp_path / name, random_model, seed=seed, use_dora=True)
    engine = Engine(str(random_base), store=tmp_path, quantization=QuantizationSection(load_in_4bit=False))
    engine._loaded._host_bytes = 2 * (tmp_path / "x" / "adapter_model.safetensors").stat().st_size
    for name in "xyz":
        assert ask(engine, name).result()
    assert engine.adapters == ("y", "z")


def test_an_adapter_that_is_unloaded_while_a_request_names_it_leaves_nothing_behind(
    engine: Engine,
) -> None:
    """Between a look at the loaded ones and the note that it was used."""
    loaded = engine._loaded
    looks = []

    class Name(str):
        __slots__ = ()
        __eq__ = str.__eq__

        def __hash__(self) -> int:
            looks.append(self)
            if len(looks) == 3:
                loaded.unload("a")
            return str.__hash__(self)

    for name in ("a", "b"):
        if name in engine.adapters:
            engine.unload(name)
    assert ask(engine, "a").result()
    assert loaded.wanted(Name("a")).name == "a"
    assert len(looks) >= 3
    assert "a" not in engine.adapters
    assert ask(engine, "b").result()


def test_loading_beside_a_model_that_is_in_use_never_waits_for_itself(engine: Engine) -> None:
    """One thread uses the model and loads inside, another loads one that PEFT attaches: neither blocks the other."""
    started = threading.Event()

    def attach() -> None:
        started.set()
        engine.load("dora")

    def use() -> None:
        with engine.using(None):
            other.start()
            started.wait()
            time.sleep(0.5)  # long enough for the other to stand at its next lock
            engine.load("a")

    other = threading.Thread(target=attach, daemon=True)
    one = threading.Thread(target=use, daemon=True)
    one.start()
    for thread in (one, other):
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert set(engine.adapters) == {"a", "dora"}


def test_the_base_answers_after_the_active_one_of_several_peft_adapters_is_unloaded(
    engine: Engine, store: Path, random_model: PreTrainedModel
) -> None:
    """PEFT keeps the name of the adapter that was active last, and looks up its settings when it switches."""
    write_adapter(store / "other", random_model, seed=9, use_dora=True)
    ask(engine, "other").result()
    ask(engine, "dora").result()
    engine.unload("dora")
    for name in (None, "other"):
        assert ids_of(ask(engine, name)) == by_peft(random_model, None if name is None else store / name, engine)


def test_adapters_change_under_traffic(engine: Engine, store: Path, random_model: PreTrainedModel) -> None:
    expected = {name: by_peft(random_model, store / name, engine) for name in "abc"}
    found: list[tuple[str, list[int]]] = []

    def client(names: str) -> None:
        for name in names:
            found.append((name, ids_of(ask(engine, name))))

    with engine:
        threads = [threading.Thread(target=client, args=(names,)) for names in ("abcab", "bcabc", "cabca")]
        for thread in threads:
            thread.start()
        for name in "abcdabcd":
            if name in engine.adapters:
                engine.reload(name)
            else:
                engine.load(name)
            if name == "d" and "dora" not in engine.adapters:
                engine.load("dora")
        for thread in threads:
            thread.join(120)
    assert len(found) == 15
    assert all(ids == expected[name] for name, ids in found)


def test_scales_and_sums_are_those_of_merged_weights(
    engine: Engine, store: Path, random_model: PreTrainedModel
) -> None:
    """The sum merged into a copy's weights by PEFT."""
    merged = with_adapter(random_model, None)
    weights = dict(merged.named_parameters())
    for name, weight in (("a", 0.7), ("b", 0.3)):
        for module, layer in with_adapter(random_model, store / name).named_modules():
            if hasattr(layer, "get_delta_weight"):
                target = weights[f"{module.removeprefix('base_model.model.')}.weight"]
                target.data += weight * layer.get_delta_weight("default")
    found = ids_of(ask(engine, "a:0.7+b:0.3"))
    assert found == alone(merged, PROMPT, NEW)[: len(found)]
    assert ids_of(ask(engine, "a:1")) == ids_of(ask(engine, "a"))
    assert ids_of(ask(engine, "a:0")) == ids_of(ask(engine, None))
    assert ids_of(ask(engine, "a:0.5+a:0.5")) == ids_of(ask(engine, "a"))
    assert engine.ask("Hello", adapter="a:0.5", sampling=Sampling(3)).adapter == "a:0.5"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, ()),
        ("sentiment", (("sentiment", 1.0),)),
        ("sentiment:0.5", (("sentiment", 0.5),)),
        ("a:0.7+b:-0.3", (("a", 0.7), ("b", -0.3))),
        (" a + b:2 ", (("a", 1.0), ("b", 2.0))),
        ("v1:2+x", (("v1:2+x", 1.0),)),
    ],
)
def test_what_a_request_names(text: str | None, found: tuple[tuple[str, float], ...]) -> None:
    assert parse_adapter(text, ["v1:2+x"]) == found


@pytest.mark.parametrize("text", ["", "+", "a+", ":0.5", "a:", "a:x", "a:nan", "a:inf", "a:11", "+".join("abcdefghi")])
def test_malformed_names_are_refused(text: str) -> None:
    with pytest.raises(AdapterError, match=r"expected: (.|\n)*do: write sentiment"):
        parse_adapter(text)


def test_bounds_of_the_engine_are_checked(random_base: Path) -> None:
    for options in ({"slots": 0}, {"max_batch": 0}, {"max_batch": 5000}):
        with pytest.raises(ConfigError, match="expected: 1 to 4096"):
            Engine(str(random_base), **options)


def test_the_prefix_cache_keeps_to_its_bytes_and_finds_the_longest() -> None:
    def row(tokens: int) -> StoredRow:
        return StoredRow(((torch.zeros(1, tokens, 4), torch.zeros(1, tokens, 4)),))

    cache = PrefixCache(max_bytes=3 * row(40).bytes)
    tokens = [tuple(range(start, start + 40)) for start in (0, 100, 200, 300)]
    for ids in tokens[:3]:
        cache.put("a", ids, row(40))
    assert cache.longest("b", (*tokens[0], 7)) is None
    found = cache.longest("a", (*tokens[0][:30], 7, 8))
    assert found is not None
    assert found[1] == 30
    whole = cache.longest("a", tokens[1])
    assert whole is not None
    assert whole[1] == 39  # the last token's logits are wanted
    assert cache.longest("a", tokens[2][:12]) is None  # too short to be worth it
    cache.put("a", tokens[3], row(40))
    assert cache.bytes == 3 * row(40).bytes
    assert cache.longest("a", (*tokens[2], 1)) is None  # the least recently used
    cache.put("a", (*tokens[0], *range(500, 510)), row(50))  # takes the place of its beginning
    assert cache.bytes == row(50).bytes + row(40).bytes  # and another went for it
    cache.put("a", (*tokens[0], *range(500, 600)), row(140))  # more than there is room for
    assert cache.bytes == row(50).bytes + row(40).bytes  # so its beginning stays


def test_five_lines_from_import_to_two_adapters_in_one_batch(
    random_base: Path, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [Message("user", "Hello")]
    engine = Engine(str(random_base), store=store)
    answers = engine.generate([turns, turns], adapter=["a", "b"], sampling=Sampling(4))
    assert [answer.adapter for answer in answers] == ["a", "b"]
    assert answers[0].text != answers[1].text
