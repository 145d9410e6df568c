"""Requests share batches, and each gets what PEFT and transformers give it alone, whoever joins and leaves."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from random_adapters import alone, with_adapter, write_adapter
from transformers import PreTrainedModel

from qlora_kit.config import QuantizationSection
from qlora_kit.conversation import Message
from qlora_kit.engine import Answer, Delta, Engine, Handle, Request
from qlora_kit.errors import AdapterError, ConfigError, GuardError, Interrupted
from qlora_kit.generation import Sampling
from qlora_kit.generation.kv_rows import KvRows, StoredRow

NEW = 12
KINDS = {
    "a": {},
    "b": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "c": {"use_rslora": True, "rank_pattern": {"q_proj": 8}},
    "dora": {"use_dora": True},
    "saved": {"modules_to_save": ["lm_head"]},
    "biases": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "all": {"bias": "all", "use_dora": True, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}
UNQUANTIZED = QuantizationSection(load_in_4bit=False)


@pytest.fixture(scope="module")
def store(random_model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    for seed, (name, settings) in enumerate(KINDS.items()):
        write_adapter(root / name, random_model, seed=seed, **settings)
    return root


def make_engine(base: Path, store: Path, **options: Any) -> Engine:
    return Engine(str(base), store=store, quantization=UNQUANTIZED, **options)


@pytest.fixture(scope="module")
def engine(random_base: Path, store: Path) -> Engine:
    return make_engine(random_base, store, max_batch=8, slots=3)


@pytest.fixture
def started(engine: Engine) -> Iterator[Engine]:
    with engine:
        yield engine


def make_prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    numbers = random.Random(seed)
    return [tuple(numbers.randrange(10, 350) for _ in range(numbers.randrange(1, 40))) for _ in range(count)]


PROMPTS = make_prompts(16)
NAMES: list[str | None] = [[None, *KINDS][index % 8] for index in range(16)]


@pytest.fixture(scope="module")
def expected(random_model: PreTrainedModel, store: Path, engine: Engine) -> list[list[int]]:
    """Each prompt by itself, by PEFT and transformers; up to the stop token."""
    models = {name: with_adapter(random_model, None if name is None else store / name) for name in (None, *KINDS)}
    found = []
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        ids = alone(models[name], prompt, NEW)
        stops = [place for place, token in enumerate(ids) if token in engine.stop_token_ids]
        found.append(ids[: stops[0]] if stops else ids)
    assert len({tuple(ids) for ids in found}) > 10
    return found


def request(index: int, **sampling: object) -> Request:
    settings = {"max_new_tokens": NEW, **sampling}
    return Request(prompt_ids=PROMPTS[index], adapter=NAMES[index], sampling=Sampling(**settings))


def ids_of(handle: Handle) -> list[int]:
    return [token for delta in handle for token in delta.token_ids]


# --- batches ---


def test_greedy_rows_of_a_mixed_batch_are_those_of_peft_alone(engine: Engine, expected: list[list[int]]) -> None:
    """16 requests over 7 adapters and the base, 8 rows, 3 slots: rows join and leave all the time."""
    for round_ in range(2):  # the second time, prompts are known already
        handles = [engine.submit(request(index)) for index in range(len(PROMPTS))]
        assert engine.stats().waiting == len(PROMPTS)
        assert [ids_of(handle) for handle in handles] == expected, round_
        answers = [handle.result() for handle in handles]
        assert [answer.completion_tokens for answer in answers] == [len(ids) for ids in expected]
        assert [answer.text for answer in answers] == [engine.tokenizer.decode(ids) for ids in expected]
        assert [answer.prompt_tokens for answer in answers] == [len(prompt) for prompt in PROMPTS]
        assert {answer.finish_reason for answer in answers} <= {"stop", "length"}
    assert (engine.stats().running, engine.stats().waiting) == (0, 0)
    assert engine.stats().slots_used <= 3


def test_requests_that_join_later_and_others_that_leave_change_nothing(
    engine: Engine, expected: list[list[int]]
) -> None:
    order = random.Random(3)
    for _ in range(3):
        indices = order.sample(range(len(PROMPTS)), len(PROMPTS))
        handles: dict[int, Handle] = {}
        for index in indices:
            handles[index] = engine.submit(request(index))
            for _ in range(order.randrange(4)):
                engine.advance()
        for index in order.sample(indices, len(indices)):
            assert ids_of(handles[index]) == expected[index]


def test_trained_biases_are_pefts_own_and_the_bases_stay(
    random_base: Path, random_model: PreTrainedModel, store: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    """In one batch with rows of the base and of pairs alone, then in passes of one's own."""
    engine = make_engine(random_base, store)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in engine.model.state_dict().items()}
    indices = [index for index, name in enumerate(NAMES) if name in (None, "a", "biases", "all")]
    handles = [engine.submit(request(index)) for index in indices]
    assert [ids_of(handle) for handle in handles] == [expected[index] for index in indices]
    ids = torch.arange(40, 100).reshape(6, 10)
    for name in ("biases", "a", "all", None, "biases"):
        peft = with_adapter(random_model, None if name is None else store / name)
        with torch.no_grad(), engine.using(name) as model:
            found, wanted = model(input_ids=ids).logits, peft(input_ids=ids).logits
        torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6 * float(wanted.abs().max()))
    without = tmp_path / "biases"  # what the biases do is more than rounding
    write_adapter(without, random_model, seed=list(KINDS).index("biases"), target_modules=["q_proj", "up_proj"])
    plain, trained = (with_adapter(random_model, folder)(ids).logits for folder in (without, store / "biases"))
    assert float((plain - trained).detach().abs().max()) > 0.1
    for name in ("biases", "all"):
        engine.unload(name)
    after = engine.model.state_dict()
    assert list(after) == list(before)
    assert all(tensor.data_ptr() == before[name][0] for name, tensor in after.items())
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in after.items())


def test_four_bit_bases_too(random_base: Path, store: Path) -> None:
    """The base's own 4-bit product takes another path for one row than for many; greedy answers stay."""
    engine = Engine(str(random_base), store=store, max_batch=6)
    together = [engine.submit(request(index)) for index in range(12)]
    found = [ids_of(handle) for handle in together]
    one = Engine(str(random_base), store=store, max_batch=1)
    assert found == [ids_of(one.submit(request(index))) for index in range(12)]


def test_a_long_prompt_is_read_in_parts_while_others_go_on(
    engine: Engine, random_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_kit.engine.lane.PREFILL_TOKENS", 16)
    prompt = make_prompts(1, seed=9)[0] * 20
    prompt = prompt[:200]
    long, short = (Request(prompt_ids=ids, sampling=Sampling(30)) for ids in (prompt, PROMPTS[1]))
    first = engine.submit(short)
    next(first)
    second = engine.submit(long)
    assert ids_of(second) == alone(random_model, prompt, 30)
    assert list(first)[-1].finish_reason is not None
    assert first.result().completion_tokens == 30


def test_the_thread_of_the_engine_gives_the_same(started: Engine, expected: list[list[int]]) -> None:
    found: dict[int, list[int]] = {}

    def client(index: int) -> None:
        found[index] = ids_of(started.submit(request(index)))

    threads = [threading.Thread(target=client, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[index] for index in range(len(PROMPTS))] == expected
    assert started.submit(request(0)).result(timeout=60).completion_tokens == len(expected[0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_decode_steps_give_the_same(
    random_base: Path, store: Path, expected: list[list[int]], backend: str
) -> None:
    """With aot_eager the pass is traced and functionalised as for a compiler, and its operations run as they are."""
    engine = make_engine(random_base, store, max_batch=4, slots=3, compile_backend=backend)
    counters = torch._dynamo.utils.counters
    counters.clear()
    indices = [index for index, name in enumerate(NAMES) if name in (None, "a", "b", "c")]  # 8 of them
    handles = [engine.submit(request(index)) for index in indices]
    assert [ids_of(handle) for handle in handles] == [expected[index] for index in indices]
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    with pytest.raises(ConfigError, match=r"compile_backend is 'fast'(.|\n)*inductor"):
        make_engine(random_base, store, compile_backend="fast")


# --- each row its own settings ---


def test_rows_sample_by_their_own_seeds_whoever_is_beside_them(engine: Engine) -> None:
    hot = {"temperature": 2.0, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2}
    one = [ids_of(engine.submit(request(index, seed=index, **hot))) for index in range(6)]
    handles = [engine.submit(request(index, seed=index, **hot)) for index in range(6)]
    handles += [engine.submit(request(index)) for index in range(6, 9)]
    assert [ids_of(handle) for handle in handles[:6]] == one
    again = [ids_of(engine.submit(request(index, seed=index + 1, **hot))) for index in range(6)]
    assert sum(left != right for left, right in zip(one, again, strict=True)) >= 5


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 2.5, "top_p": 0.7},
        {"temperature": 2.5, "min_p": 0.05},
        {"temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.5},
    ],
)
def test_a_sampled_row_is_transformers_own(
    engine: Engine, random_model: PreTrainedModel, settings: dict[str, float]
) -> None:
    """transformers draws from torch's own generator, which the same seed puts in the same state."""
    for seed in range(3):
        torch.manual_seed(seed)
        wanted = alone(random_model, PROMPTS[0], NEW, **{"do_sample": True, "top_k": 0, **settings})
        sampling = Sampling(NEW, seed=seed, **settings)
        found = ids_of(engine.submit(Request(prompt_ids=PROMPTS[0], sampling=sampling)))
        assert found == wanted[: len(found)]
        assert len(found) == NEW or wanted[len(found)] in engine.stop_token_ids


def test_a_repetition_penalty_is_transformers_own(engine: Engine, random_model: PreTrainedModel) -> None:
    wanted = [alone(random_model, prompt, NEW, repetition_penalty=3.0) for prompt in PROMPTS[:4]]
    sampling = Sampling(NEW, repetition_penalty=3.0)
    handles = [engine.submit(Request(prompt_ids=prompt, sampling=sampling)) for prompt in PROMPTS[:4]]
    for found, ids in zip([ids_of(handle) for handle in handles], wanted, strict=True):
        assert found == ids[: len(found)]


def test_log_probabilities_are_the_models(engine: Engine, random_model: PreTrainedModel) -> None:
    handle = engine.submit(Request(prompt_ids=PROMPTS[0], sampling=Sampling(4, logprobs=3)))
    deltas = list(handle)
    told = [logprob for delta in deltas for logprob in delta.logprobs]
    ids = [token for delta in deltas for token in delta.token_ids]
    assert [logprob.token_id for logprob in told] == ids
    assert handle.result().logprobs == tuple(told)
    with torch.no_grad():
        logits = random_model(torch.tensor([[*PROMPTS[0], *ids]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    wanted = logits.log_softmax(-1)
    for logprob, row in zip(told, wanted, strict=True):
        assert logprob.logprob == pytest.approx(float(row[logprob.token_id]), abs=1e-4)
        assert [token for token, _ in logprob.top] == row.topk(3).indices.tolist()
        assert logprob.top[0][1] == pytest.approx(float(row.max()), abs=1e-4)


def test_a_stop_string_ends_the_answer_and_is_never_seen(engine: Engine, expected: list[list[int]]) -> None:
    index = max(range(len(PROMPTS)), key=lambda place: len(expected[place]))
    whole = engine.tokenizer.decode(expected[index])
    middle = len(whole) // 2
    stop = whole[middle : middle + 3]
    handle = engine.submit(request(index, stop=("never in there", stop)))
    seen = ""
    for delta in handle:
        seen += delta.text
        assert whole[: whole.index(stop)].startswith(seen)
    answer = handle.result()
    assert (answer.text, answer.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert seen == answer.text


# --- cancelling, failing, closing ---


def test_a_cancelled_request_ends_within_two_tokens_and_others_go_on(engine: Engine, expected: list[list[int]]) -> None:
    long = Request(prompt_ids=PROMPTS[1], sampling=Sampling(300, repetition_penalty=1.1))
    cancelled, other = engine.submit(long), engine.submit(request(0))
    waiting = [engine.submit(long) for _ in range(8)]
    before = [next(cancelled) for _ in range(3)]
    cancelled.cancel()
    waiting[-1].cancel()
    rest = list(cancelled)
    assert sum(len(delta.token_ids) for delta in rest) <= 2
    assert rest[-1].finish_reason == "cancelled"
    answer = cancelled.result()
    assert answer.finish_reason == "cancelled"
    assert answer.text == "".join(delta.text for delta in [*before, *rest])
    assert waiting[-1].result() == Answer("", None, "cancelled", 0, len(PROMPTS[1]))
    assert ids_of(other) == expected[0]
    for handle in waiting:
        handle.cancel()
        handle.result()
    assert engine.stats().running == 0


def test_what_is_wrong_with_a_request_comes_out_of_its_handle(engine: Engine, store: Path) -> None:
    cases = [
        (Request(prompt_ids=(40,), adapter="ghost"), AdapterError, "no adapter of this name"),
        (Request(prompt_ids=(40,), adapter=str(store / "a")), AdapterError, "is not loaded"),
        (Request(prompt_ids=(40,), adapter="a:x"), AdapterError, "is no weight"),
        (Request(prompt_ids=(40,), adapter="dora:0.5"), AdapterError, "more than LoRA pairs"),
        (Request(prompt_ids=(40,), adapter="a+biases"), AdapterError, "more than LoRA pairs"),
        (Request(prompt_ids=(40,) * 512), ConfigError, "512 tokens long"),
        (Request(prompt_ids=(40, 100_000)), ConfigError, "token ids from 40 to 100000"),
    ]
    for bad, kind, pattern in cases:
        handle = engine.submit(bad)
        for use in (handle.result, lambda handle=handle: list(handle)):
            with pytest.raises(kind, match=pattern):
                use()
    for fields in ({}, {"prompt_ids": (1,), "conversation": (Message("user", "Hi"),)}):
        with pytest.raises(ConfigError, match="the request holds"):
            Request(**fields)


def test_an_answer_ends_where_the_bases_positions_do(engine: Engine) -> None:
    prompt = (40,) * 500
    answer = engine.submit(Request(prompt_ids=prompt, sampling=Sampling(100, repetition_penalty=2.0))).result()
    assert answer.finish_reason == "length"
    assert answer.completion_tokens == 12


def test_an_adapter_whose_numbers_overflow_fails_its_own_requests_alone(
    random_base: Path, random_model: PreTrainedModel, store: Path, expected: list[list[int]]
) -> None:
    engine = make_engine(random_base, store, max_batch=4)
    bad = store.parent / "huge"
    engine.load(str(write_adapter(bad, random_model, scale=1e30, target_modules=["down_proj"])))
    handles = [engine.submit(request(index)) for index in (0, 1)]
    broken = engine.submit(Request(prompt_ids=PROMPTS[2], adapter="huge"))
    handles += [engine.submit(request(index)) for index in (2, 6, 7, 8)]
    with pytest.raises(GuardError, match="not finite"):
        broken.result()
    assert [ids_of(handle) for handle in handles] == [expected[index] for index in (0, 1, 2, 6, 7, 8)]


def test_a_prompt_that_is_given_up_leaves_no_numbers_that_are_not_finite(
    random_base: Path, random_model: PreTrainedModel, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its place comes a row that is shorter than the one read beside it."""
    monkeypatch.setattr("qlora_kit.engine.lane.PREFILL_TOKENS", 64)
    folder = write_adapter(store.parent / "worse", random_model, scale=1e30, target_modules=["down_proj"])
    prompts = [tuple(range(20, 23)), tuple(range(20, 50))]
    engine = make_engine(random_base, store)
    engine.load(str(folder))
    given_up = engine.submit(Request(prompt_ids=tuple(range(10, 310)), adapter="worse", sampling=Sampling(2)))
    engine.advance()
    given_up.cancel()
    handles = [engine.submit(Request(prompt_ids=prompt, sampling=Sampling(4))) for prompt in prompts]
    assert [ids_of(handle) for handle in handles] == [alone(random_model, prompt, 4) for prompt in prompts]


def test_a_request_may_arrive_while_those_that_wait_are_looked_through(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another thread: submitting takes no lock."""
    arrived: list[Handle] = []

    def is_cancelled(handle: Handle) -> bool:
        if not arrived:
            arrived.append(engine.submit(request(1)))
        return handle._is_cancelled

    monkeypatch.setattr(Handle, "is_cancelled", property(is_cancelled))
    first = engine.submit(request(0))
    assert first.result().completion_tokens > 0
    assert arrived[0].result().completion_tokens > 0


def test_closing_fails_what_is_not_done_and_starting_again_works(engine: Engine, expected: list[list[int]]) -> None:
    engine.start()
    handle = engine.submit(Request(prompt_ids=PROMPTS[1], sampling=Sampling(400, temperature=3.0)))
    next(handle)
    engine.close()
    with pytest.raises(Interrupted, match="closed"):
        handle.result()
    assert engine.stats().running == 0
    assert ids_of(engine.submit(request(0))) == expected[0]
    with engine:
        assert ids_of(engine.submit(request(1))) == expected[1]


def test_notify_tells_of_each_piece(engine: Engine) -> None:
    told: list[int] = []
    handle = engine.submit(request(0), notify=lambda: told.append(1))
    assert handle.poll() is None
    while not handle.is_done:
        engine.advance()
    pieces: list[Delta] = []
    while (delta := handle.poll()) is not None:
        pieces.append(delta)
    assert len(told) == len(pieces) + 1
    assert pieces[-1].finish_reason is not None


# --- conversations ---


def test_one_call_answers_for_several_adapters(engine: Engine) -> None:
    turns = [Message("user", "Hello")]
    names = ["a", None, "b", "a"]
    together = engine.generate([turns] * 4, adapter=names, sampling=Sampling(5))
    assert [answer.adapter for answer in together] == names
    assert together == [engine.ask("Hello", adapter=name, sampling=Sampling(5)) for name in names]
    with pytest.raises(ConfigError, match="2 adapters are given for 1"):
        engine.generate([turns], adapter=["a", "b"])
    assert engine.generate([]) == []


def test_known_prompts_are_not_read_again(engine: Engine, random_model: PreTrainedModel) -> None:
    system = make_prompts(1, seed=5)[0] * 3
    before = engine.stats()
    for question in ((40, 41), (50, 51, 52)):
        ids = ids_of(engine.submit(Request(prompt_ids=(*system, *question), sampling=Sampling(6))))
        assert ids == alone(random_model, (*system, *question), 6)[: len(ids)]
    reused = engine.stats().prompt_tokens_reused - before.prompt_tokens_reused
    assert reused == len(system)


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.faults)])
def test_many_requests_leave_memory_where_it_was(random_base: Path, store: Path, count: int) -> None:
    engine = make_engine(random_base, store, max_batch=8, slots=2)
    engine._scheduler.prefixes._max_bytes = 200_000
    numbers = random.Random(0)

    def some(count: int) -> None:
        handles = []
        for _ in range(count):
            prompt = tuple(numbers.randrange(10, 350) for _ in range(numbers.randrange(1, 60)))
            name = numbers.choice([None, "a", "b", "c", "a:0.5", "a+b"])
            handles.append(engine.submit(Request(prompt_ids=prompt, adapter=name, sampling=Sampling(3))))
        for handle in handles:
            handle.result()

    def tensor_bytes() -> int:
        import gc

        gc.collect()
        tensors = {
            thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
            for thing in gc.get_objects()
            if type(thing) is torch.Tensor
        }
        return sum(tensors.values())

    some(100)
    before = tensor_bytes()
    some(count)
    assert tensor_bytes() <= before + 200_000  # what the prefix cache may vary by
    assert engine.stats().prefix_bytes <= 200_000
    assert engine.stats().requests_done == 100 + count


# --- on a GPU ---


@pytest.mark.gpu
def test_on_a_gpu_rows_of_a_mixed_batch_agree_with_themselves_alone(
    random_base: Path, store: Path, record_property: Callable[[str, object], None]
) -> None:
    """4 bits and bf16: sums in another order may flip a near tie, so that the agreement is reported, not exact."""
    device = torch.device("cuda")
    together = Engine(str(random_base), store=store, device=device, max_batch=8, slots=3)
    one = Engine(str(random_base), store=store, device=device, max_batch=1, slots=3)
    handles = [together.submit(request(index)) for index in range(len(PROMPTS))]
    found = [ids_of(handle) for handle in handles]
    alone_ids = [ids_of(one.submit(request(index))) for index in range(len(PROMPTS))]
    first = [left[:1] == right[:1] for left, right in zip(found, alone_ids, strict=True)]
    whole = [left == right for left, right in zip(found, alone_ids, strict=True)]
    record_property("rows that agree whole", sum(whole) / len(whole))
    assert sum(first) >= len(first) - 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_while_a_prompt_is_read_reaches_who_waits(
    random_base: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ends the engine's thread: nobody waits for an answer that never comes."""
    engine = make_engine(random_base, store).start()

    def fail(*_: object) -> None:
        raise RuntimeError("launch failure")

    monkeypatch.setattr("qlora_kit.generation.kv_rows.KvRows.forward", fail)
    handle = engine.submit(request(0))
    with pytest.raises(Interrupted, match="RuntimeError: launch failure"):
        handle.result()
    monkeypatch.undo()
    engine.close()
    assert engine.start().submit(request(0)).result().completion_tokens
    engine.close()


def test_a_prompt_that_finds_no_memory_to_be_remembered_in_harms_nobody(
    random_base: Path, store: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(rows: KvRows, row: int, length: int) -> StoredRow:
        raise torch.OutOfMemoryError("no memory")

    with make_engine(random_base, store) as engine:
        monkeypatch.setattr(KvRows, "store", run_out)
        monkeypatch.setattr("qlora_kit.engine.prefix_cache.MIN_TOKENS", 1)
        handles = [engine.submit(request(number)) for number in range(len(expected))]
        assert [ids_of(handle) for handle in handles] == expected
        assert engine.is_started
        assert engine.stats().prefix_bytes == 0


def test_memory_that_runs_out_while_the_block_grows_costs_the_new_row_alone(
    random_base: Path, store: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the layers have the larger block by then."""
    engine = make_engine(random_base, store)
    first = engine.submit(request(0))
    stream = iter(first)
    tokens = list(next(stream).token_ids)
    original, calls = torch.Tensor.new_zeros, [0]

    def run_out(tensor: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("no memory")
        return original(tensor, *size, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", run_out)
    second = engine.submit(Request(prompt_ids=PROMPTS[0] * 12, sampling=Sampling(2)))
    with pytest.raises(GuardError, match="memory ran out"):
        second.result()
    assert calls[0] == 3
    third = engine.submit(request(1))
    for delta in stream:
        tokens += delta.token_ids
    assert [tokens, ids_of(third)] == expected[:2]


def test_memory_that_runs_out_while_the_bank_grows_costs_the_new_adapter_alone(
    random_base: Path,
    random_model: PreTrainedModel,
    store: Path,
    expected: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a group of layers, the A's have their larger place by then, and the B's have not."""
    write_adapter(tmp_path / "wide", random_model, r=16)
    engine = make_engine(random_base, store)
    engine.load(str(tmp_path / "wide"))
    assert ids_of(engine.submit(request(1))) == expected[1]
    original, calls = torch.zeros, [0]

    def run_out(*size: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("no memory")
        return original(*size, **options)

    monkeypatch.setattr(torch, "zeros", run_out)
    with pytest.raises(GuardError, match="memory ran out"):
        engine.submit(Request(prompt_ids=PROMPTS[0], adapter="wide", sampling=Sampling(2))).result()
    monkeypatch.undo()
    assert calls[0] == 3
    assert [ids_of(engine.submit(request(index))) for index in (1, 2)] == expected[1:3]
    assert engine.submit(Request(prompt_ids=PROMPTS[0], adapter="wide", sampling=Sampling(2))).result()


def test_memory_that_runs_out_while_an_adapter_is_attached_comes_out_of_the_handle(
    random_base: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(random_base, store)

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("qlora_kit.engine.peft_path.attach_adapter", run_out)
    with pytest.raises(AdapterError, match="dora: memory ran out"):
        engine.submit(Request(prompt_ids=PROMPTS[0], adapter="dora", sampling=Sampling(2))).result()


def test_a_long_prompt_is_read_though_shorter_ones_keep_coming(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.engine.lane.PREFILL_TOKENS", 64)
    long = engine.submit(Request(prompt_ids=PROMPTS[0] * 60, sampling=Sampling(1)))  # read in parts
    middle = engine.submit(Request(prompt_ids=tuple(range(100, 160)), sampling=Sampling(1)))  # whole, but alone
    shorter: list[Handle] = []
    for number in range(60):
        shorter.append(engine.submit(Request(prompt_ids=(10, 11, 12 + number), sampling=Sampling(1))))
        engine.advance()
    assert long.is_done
    assert middle.is_done
    assert all(handle.result().completion_tokens <= 1 for handle in shorter)


def test_a_batch_of_no_rows_is_refused(engine: Engine) -> None:
    """It would wait for ever."""
    with pytest.raises(ConfigError, match="batch_size is 0"):
        engine.generate([[Message("user", "Hello")]], batch_size=0)


def test_every_request_that_ends_is_counted(engine: Engine) -> None:
    before = engine.stats().requests_done
    handles = [engine.submit(request(0)) for _ in range(3)]
    handles[1].cancel()  # it has not joined the batch
    for handle in handles:
        handle.result()
    engine.submit(request(0))
    engine.close()  # nor has this one
    assert engine.stats().requests_done == before + 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_request_that_arrives_while_the_engine_fails_does_not_wait(
    random_base: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(random_base, store).start()
    submit = engine._scheduler.submit

    def fail(*_: object) -> None:
        raise RuntimeError("launch failure")

    def late(row: Any) -> None:
        """The thread has failed all requests before this one is among them."""
        monkeypatch.setattr(engine._scheduler, "submit", submit)
        with pytest.raises(Interrupted):
            engine.submit(request(1)).result()
        submit(row)

    monkeypatch.setattr("qlora_kit.generation.kv_rows.KvRows.forward", fail)
    monkeypatch.setattr(engine._scheduler, "submit", late)
    handle = engine.submit(request(0))
    assert handle.is_done
    for refused in (handle, engine.submit(request(0))):
        with pytest.raises(Interrupted, match="launch failure") as caught:
            refused.result()
        assert "start it again" in caught.value.faults[0].fix
    engine.close()
