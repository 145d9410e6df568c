"""Keys and values keep to their bytes: rows wait their turn for them, none is overtaken, and answers stay the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from random_adapters import alone, with_adapter, write_adapter
from transformers import PreTrainedModel

from qlora_kit.config import QuantizationSection
from qlora_kit.engine import Engine, Handle, Request
from qlora_kit.engine.kv_budget import automatic_kv_bytes
from qlora_kit.errors import ConfigError
from qlora_kit.generation import Sampling
from qlora_kit.host_memory import free_memory_bytes

TOKEN_BYTES = 2 * 2 * 2 * 16 * 4  # keys and values, 2 layers, 2 heads of 16 numbers in fp32
BLOCK = 64 * TOKEN_BYTES  # of a row that ends with less than 64 tokens


@pytest.fixture(scope="module")
def store(random_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_adapter(root / "a", random_model, seed=1)
    write_adapter(root / "dora", random_model, seed=2, use_dora=True)
    return root


def make_engine(base: Path, store: Path, kv_bytes: int) -> Engine:
    return Engine(str(base), store=store, quantization=QuantizationSection(load_in_4bit=False), kv_bytes=kv_bytes)


def held_bytes(engine: Engine) -> int:
    """What the tensors really take, those of known prompts included."""
    lanes = [layer for lane in engine._scheduler._lanes.values() for layer in lane.kv._layers]
    blocks = [block for layer in lanes for block in (layer.keys, layer.values) if block is not None]
    stored = [tensor for row in engine._scheduler.prefixes._rows.values() for pair in row.layers for tensor in pair]
    return sum(tensor.untyped_storage().nbytes() for tensor in (*blocks, *stored))


def prompt(tokens: int, seed: int) -> tuple[int, ...]:
    numbers = random.Random(seed)
    return tuple(numbers.randrange(10, 350) for _ in range(tokens))


def ask(engine: Engine, ids: tuple[int, ...], new: int, adapter: str | None = None) -> Handle:
    return engine.submit(Request(prompt_ids=ids, adapter=adapter, sampling=Sampling(new)))


def run(engine: Engine, handles: list[Handle]) -> tuple[list[int], int]:
    """In which order they end, and how many ran at once at most; the budget is looked at after every step."""
    order: list[int] = []
    most = 0
    while len(order) < len(handles):
        engine.advance()
        stats = engine.stats()
        assert held_bytes(engine) <= stats.kv_bytes + stats.prefix_bytes <= stats.kv_budget_bytes
        most = max(most, stats.running)
        order += [place for place, handle in enumerate(handles) if handle.is_done and place not in order]
    return order, most


@pytest.mark.parametrize("blocks", [1, 3, 5])
def test_rows_of_all_lanes_keep_to_the_budget_and_answer_the_same(
    random_base: Path, random_model: PreTrainedModel, store: Path, blocks: int
) -> None:
    """Rows of the base, the bank and PEFT, prompts that are known and none too long; 5 blocks hold two long ones."""
    engine = make_engine(random_base, store, blocks * BLOCK)
    models = {name: with_adapter(random_model, None if name is None else store / name) for name in (None, "a", "dora")}
    lengths = [20, 50, 7, 33, 1, 45] if blocks < 5 else [20, 100, 7, 33, 90, 45]
    prompts = [prompt(tokens, seed) for seed, tokens in enumerate(lengths)]
    names = [None, "a", "dora", "dora", "a", None]
    for _ in range(2):
        handles = [ask(engine, ids, 10, name) for ids, name in zip(prompts, names, strict=True)]
        _, most = run(engine, handles)
        assert most <= blocks
        for handle, ids, name in zip(handles, prompts, names, strict=True):
            found = [token for delta in handle for token in delta.token_ids]
            assert found == alone(models[name], ids, 10)[: len(found)]
            assert len(found) == 10 or handle.result().finish_reason == "stop"
    assert engine.stats().kv_bytes == 0


def test_a_long_request_waits_and_is_not_overtaken(random_base: Path, store: Path) -> None:
    """Two short ones run; the long one needs the memory alone, and the short ones behind it wait for it."""
    engine = make_engine(random_base, store, 4 * BLOCK)
    sizes = [(10, 12), (11, 20), (150, 8), (12, 3), (13, 3)]
    handles = [ask(engine, prompt(tokens, tokens), new) for tokens, new in sizes]
    order, most = run(engine, handles)
    assert order[:3] == [0, 1, 2]
    assert most == 2


def test_room_that_a_long_row_leaves_is_used_while_others_go_on(random_base: Path, store: Path) -> None:
    """The block is 2 rows of 3 x 64 tokens; when the long row has gone, 6 rows of 64 fit in the same bytes."""
    engine = make_engine(random_base, store, 6 * BLOCK)
    sizes = [(130, 2), (12, 40), *[(number, 20) for number in range(13, 18)]]
    handles = [ask(engine, prompt(tokens, tokens), new) for tokens, new in sizes]
    _, most = run(engine, handles)
    assert most == 6


def test_what_a_block_has_to_spare_makes_way_for_another_lane(random_base: Path, store: Path) -> None:
    """Three rows that join one by one hold a block of four; the fourth row is PEFT's."""
    engine = make_engine(random_base, store, 4 * BLOCK)
    handles = []
    for tokens in (12, 13, 14):
        handles.append(ask(engine, prompt(tokens, tokens), 20))
        engine.advance()
    assert engine.stats().kv_bytes == 4 * BLOCK
    handles.append(ask(engine, prompt(15, 15), 5, "dora"))
    _, most = run(engine, handles)
    assert most == 4


def test_a_lane_whose_rows_are_cancelled_gives_its_memory_back(random_base: Path, store: Path) -> None:
    engine = make_engine(random_base, store, 2 * BLOCK)
    handles = [ask(engine, prompt(20, seed), 30, name) for seed, name in enumerate(("dora", None))]
    engine.advance()
    assert engine.stats().kv_bytes == 2 * BLOCK
    for handle in handles:
        handle.cancel()
    engine.advance()
    assert engine.stats().kv_bytes == 0
    assert list(engine._scheduler._lanes) == [None]


def test_what_can_never_fit_is_refused_by_name(random_base: Path, store: Path) -> None:
    engine = make_engine(random_base, store, 3 * BLOCK)
    told = r"prompt of 150 tokens and an answer of up to 60 take 128 KiB(.|\n)*at most 96 KiB(.|\n)*max_new_tokens"
    with pytest.raises(ConfigError, match=told):
        ask(engine, prompt(150, 0), 60).result()
    assert ask(engine, prompt(150, 0), 30).result().completion_tokens > 0
    assert engine.stats().waiting == 0
    with pytest.raises(ConfigError, match=rf"kv_bytes is 1000(.|\n)*at least {BLOCK}"):
        make_engine(random_base, store, 1000)


def test_without_a_setting_it_is_half_of_what_the_host_has_free(random_base: Path) -> None:
    free = free_memory_bytes()
    assert free is not None
    assert 0.25 * free < automatic_kv_bytes(torch.device("cpu")) < 0.75 * free
