"""Tokenised data on disk: what is written, kept between runs, counted, weighted, and never kept when it is faulty."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_kit.config import RunConfig, load_config
from qlora_kit.data.encoding import encode_conversation
from qlora_kit.data.ledger import Ledger, Problem
from qlora_kit.data.preparing import examine
from qlora_kit.data.token_cache import TokenCache, token_key
from qlora_kit.data.tokenised_data import PartRows, TokenisedData, tokenised_data, weighted_rows
from qlora_kit.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = "weather nice today hello world answer question helpful assistant return values".split()


def pair(number: int, prompt: str = "") -> dict[str, str]:
    return {"prompt": prompt or f"{WORDS[number % 11]} {number}", "completion": f"{WORDS[number % 7]} {number}"}


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RunConfig]:
    """Makes a config on ``train.jsonl`` (20 rows) and ``validation.jsonl`` (5 rows)."""
    write_rows(tmp_path / "train.jsonl", [pair(number) for number in range(20)])
    write_rows(tmp_path / "validation.jsonl", [pair(number) for number in range(100, 105)])

    def make(*overrides: str) -> RunConfig:
        (tmp_path / "run.yaml").write_text(
            "name: t\ntask: translation\ndata: {train: train.jsonl, validation: validation.jsonl}\n", encoding="utf-8"
        )
        return load_config(tmp_path / "run.yaml", overrides)

    return make


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "cache")


def rows_of(data: TokenisedData) -> list[tuple[list[int], list[int]]]:
    assert data.train is not None
    return list(zip(data.train["input_ids"][:], data.train["labels"][:], strict=True))


def test_rows_are_those_of_the_encoder_in_their_order(
    make_config: Callable[..., RunConfig], cache: TokenCache, chatml_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = make_config()
    data = tokenised_data(config, chatml_tokenizer, cache=cache)
    expected = [encode_conversation(e.messages, chatml_tokenizer, loss_on="last") for e in examine(config).train]
    assert rows_of(data) == [(row.input_ids, row.labels) for row in expected]
    assert data.validation is not None
    assert len(data.validation) == 5
    assert data.test is None
    report = data.ledger.report("train")
    assert report.total_tokens == sum(len(row.input_ids) for row in expected)
    assert report.supervised_tokens == sum(row.supervised_tokens for row in expected)
    assert data.ledger.lengths["train"] == Counter(len(row.input_ids) for row in expected)
    assert data.ledger.stopped_rows == {"train": 20, "validation": 5}


def test_a_second_run_takes_what_was_kept_and_reports_the_same(
    make_config: Callable[..., RunConfig],
    cache: TokenCache,
    chatml_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_rows(tmp_path / "train.jsonl", [pair(1), pair(1), {"prompt": "x", "completion": ""}, pair(2)])
    config = make_config("data.on_error=drop")
    first = tokenised_data(config, chatml_tokenizer, cache=cache)
    monkeypatch.setattr("qlora_kit.data.tokenising.encode_rows", lambda *_, **__: pytest.fail("tokenised again"))
    second = tokenised_data(config, chatml_tokenizer, cache=cache)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert rows_of(second) == rows_of(first)
    assert second.report == first.report
    assert second.report.problems
    assert list(second.ledger.entries) == list(first.ledger.entries)
    assert second.ledger.files == first.ledger.files


CHANGES = {
    "max_length": "train.max_length=400",
    "mask": "data.loss_on=last",
    "system prompt": "data.system_prompt=Other.",
    "template of the prompt": "data.prompt='{prompt}!'",
    "format": "data.format=prompt_completion",
    "rule for long rows": "data.overlength=drop",
    "rule for faults": "data.on_error=drop",
    "leakage": "data.allow_leakage=true",
    "weight": "data.weight=2",
}


@pytest.mark.parametrize("change", CHANGES)
def test_one_change_misses(
    make_config: Callable[..., RunConfig], chatml_tokenizer: PreTrainedTokenizerFast, change: str
) -> None:
    data = {"train": [["a", "1"]]}
    assert token_key(make_config(), chatml_tokenizer, data) == token_key(make_config(), chatml_tokenizer, data)
    assert token_key(make_config(CHANGES[change]), chatml_tokenizer, data) != token_key(
        make_config(), chatml_tokenizer, data
    )


def test_changed_data_tokenizer_or_template_miss_and_other_settings_hit(
    make_config: Callable[..., RunConfig],
    cache: TokenCache,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer("qwen", "qwen2_5", eos_token="<|im_end|>")
    tokenised_data(make_config(), tokenizer, cache=cache)
    hits = make_config("train.learning_rate=1e-3", "lora.r=4", "name=other", "eval.batch_size=3")
    assert tokenised_data(hits, tokenizer, cache=cache).from_cache
    tokenizer.chat_template = tokenizer.chat_template.replace("You are Qwen", "You are Kit")
    assert not tokenised_data(make_config(), tokenizer, cache=cache).from_cache
    tokenizer.add_tokens(["weather"])
    assert not tokenised_data(make_config(), tokenizer, cache=cache).from_cache
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(json.dumps(pair(77)) + "\n")
    changed = tokenised_data(make_config(), tokenizer, cache=cache)
    assert not changed.from_cache
    assert len(rows_of(changed)) == 21


def test_another_end_of_text_misses(
    make_config: Callable[..., RunConfig], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """Plain texts end with it, and the vocabulary is the same."""
    keys = {
        token_key(make_config(), make_tokenizer("qwen", "qwen2_5", eos_token=token), {})
        for token in ("<|im_end|>", "<|endoftext|>")
    }
    assert len(keys) == 2


def test_what_killed_processes_left_is_removed_in_time(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)
    for name in ("a", "b"):
        left = tmp_path / f".{name * 64}.0123456789ab.partial"
        left.mkdir()
        (left / "train.arrow").write_bytes(b"x")
    for path in (
        tmp_path / f".{'a' * 64}.0123456789ab.partial",
        tmp_path / f".{'a' * 64}.0123456789ab.partial/train.arrow",
    ):
        os.utime(path, (1000, 1000))
    with cache.adding("c" * 64) as folder:
        (folder / "train.arrow").write_bytes(b"x")
    assert {path.name for path in tmp_path.iterdir()} == {f".{'b' * 64}.0123456789ab.partial", "c" * 64}


def test_a_file_that_goes_away_while_it_is_read_is_told(
    make_config: Callable[..., RunConfig],
    cache: TokenCache,
    chatml_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from qlora_kit.data import tokenising

    encode = tokenising.encode_rows

    def encode_and_remove(*args: Any, **options: Any) -> Any:
        (tmp_path / "train.jsonl").unlink(missing_ok=True)
        return encode(*args, **options)

    monkeypatch.setattr(tokenising, "BATCH_ROWS", 5)
    monkeypatch.setattr(tokenising, "encode_rows", encode_and_remove)
    monkeypatch.setattr(tokenising, "self_check", lambda *args, **options: None)
    data = tokenised_data(make_config("data.validation=[]"), chatml_tokenizer, cache=cache)
    assert "cannot be read any more" in data.stopping[0].reason


def test_rows_of_a_refused_file_are_not_kept(
    make_config: Callable[..., RunConfig], cache: TokenCache, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", [{"x": "a"}, {"x": "b"}])
    report = tokenised_data(make_config("data.validation=[]"), chatml_tokenizer, cache=cache).ledger.report("train")
    assert (report.rows, report.kept, report.dropped) == (2, 0, 2)


def test_faulty_data_are_reported_and_not_kept(
    make_config: Callable[..., RunConfig], cache: TokenCache, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_rows(tmp_path / "train.jsonl", [pair(1), {"prompt": "x", "completion": ""}, pair(2, "long " * 300)])
    config = make_config("train.max_length=200")
    for _ in range(2):
        data = tokenised_data(config, chatml_tokenizer, cache=cache)
        assert [problem.line for problem in data.stopping] == [2, 3]  # of the row itself, and of its length
        assert not data.from_cache
        with pytest.raises(DataError, match="tokens long"):
            data.require_usable()
    assert not list(cache.root.iterdir())


def test_a_damaged_entry_is_told_and_made_again(
    make_config: Callable[..., RunConfig],
    cache: TokenCache,
    chatml_tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = rows_of(tokenised_data(make_config(), chatml_tokenizer, cache=cache))
    (entry,) = cache.root.iterdir()
    for name, content in (
        ("state.json", b"{"),
        ("state.json", b"{}"),
        ("train.arrow", b""),
        ("train.arrow", b"x" * 99),
    ):
        (entry / name).write_bytes(content)
        again = tokenised_data(make_config(), chatml_tokenizer, cache=cache)
        assert not again.from_cache
        assert rows_of(again) == expected
    assert sum("made again" in record.getMessage() for record in caplog.records) == 4


def test_a_cache_that_cannot_be_written_is_told(
    make_config: Callable[..., RunConfig], chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    data = tokenised_data(make_config(), chatml_tokenizer, cache=TokenCache(tmp_path / "file" / "cache"))
    assert len(rows_of(data)) == 20
    assert any("cannot be written" in note for note in data.report.notes)


def test_the_cache_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path, max_bytes=250)
    keys = [letter * 64 for letter in "abcd"]
    for age, key in enumerate(keys):
        with cache.adding(key) as folder:
            (folder / "train.arrow").write_bytes(b"x" * 100)
        os.utime(tmp_path / key, (1000 + age, 1000 + age))
        if key == keys[1]:
            (tmp_path / "someone-elses").mkdir()
            assert cache.find(keys[0]) is not None  # used now, so that the second is the oldest
    assert {path.name for path in tmp_path.iterdir()} == {"someone-elses", keys[0], keys[3]}
    assert cache.find(keys[1]) is None


def test_parts_of_other_tasks_are_mixed_in_by_weight(
    make_config: Callable[..., RunConfig], cache: TokenCache, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    reviews = [{"text": f"The film {number} is nice.", "label": "positive"} for number in range(8)]
    write_rows(tmp_path / "reviews.jsonl", reviews)
    stories = [{"opening": f"Hello {number}", "story": "the end"} for number in range(6)]
    write_rows(tmp_path / "stories.jsonl", stories)
    config = make_config(
        "data.mix=[{task: sentiment, train: reviews.jsonl, weight: 2.5}, "
        "{task: text_generation, train: stories.jsonl, weight: 0.5}]"
    )
    data = tokenised_data(config, chatml_tokenizer, cache=cache)
    assert data.parts == (
        PartRows("translation", 20, 1.0, 20),
        PartRows("sentiment", 8, 2.5, 20),
        PartRows("text_generation", 6, 0.5, 3),
    )
    texts = [chatml_tokenizer.decode(ids) for ids, _ in rows_of(data)]
    prompts = ("Translate English to French.", "positive, negative or neutral?", "Continue the story.")
    assert [sum(prompt in text for text in texts) for prompt in prompts] == [20, 20, 3]
    seen = Counter(text for text in texts if prompts[1] in text)
    assert sorted(seen.values()) == [2] * 4 + [3] * 4
    assert tokenised_data(config, chatml_tokenizer, cache=cache).train["input_ids"][:] == data.train["input_ids"][:]
    assert any("sentiment: 20 rows" in note for note in data.report.notes)
    assert data.ledger.report("train").rows == 34


def test_a_mixed_part_may_be_a_task_of_its_own(
    make_config: Callable[..., RunConfig], cache: TokenCache, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_rows(tmp_path / "facts.jsonl", [{"what": "sky", "colour": "blue"}])
    part = "{task: colours, train: facts.jsonl, prompt: 'Colour of {what}?', completion: '{colour}', system_prompt: ''}"
    data = tokenised_data(make_config(f"data.mix=[{part}]"), chatml_tokenizer, cache=cache)
    last = chatml_tokenizer.decode(rows_of(data)[-1][0])
    assert last.endswith("<|im_start|>user\nColour of sky?<|im_end|>\n<|im_start|>assistant\nblue<|im_end|>")


def test_the_same_row_in_two_parts_or_in_validation_is_found(
    make_config: Callable[..., RunConfig], cache: TokenCache, chatml_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_rows(tmp_path / "more.jsonl", [pair(3), pair(101), pair(500)])
    part = "data.mix=[{task: translation, train: more.jsonl}]"
    data = tokenised_data(make_config(part, "data.allow_leakage=true"), chatml_tokenizer, cache=cache)
    assert [(entry.line, entry.action) for entry in data.ledger.entries] == [(1, "duplicate"), (2, "leaked")]
    assert "the same row is in validation" in str(tokenised_data(make_config(part), chatml_tokenizer).stopping[0].fault)


@pytest.mark.parametrize("weight", [1.0, 0.01, 0.5, 3.0, 2.25])
def test_every_weight_gives_as_many_rows_as_it_says(weight: float) -> None:
    parts = [PartRows("a", 10, 1.0, 10), PartRows("b", 40, weight, max(round(40 * weight), 1))]
    rows = weighted_rows(parts, seed=0)
    counts = Counter(rows)
    assert len(rows) == 10 + parts[1].seen
    assert set(rows) <= set(range(50))
    assert max(counts[row] for row in range(10, 50)) - min(counts[row] for row in range(10, 50)) <= 1
    assert rows == weighted_rows(parts, seed=0)


def test_memory_does_not_grow_with_the_file(
    make_config: Callable[..., RunConfig],
    cache: TokenCache,
    chatml_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python's own memory; beside one batch, each row leaves 18 bytes of digest."""
    monkeypatch.setattr("qlora_kit.data.tokenising.BATCH_ROWS", 100)
    monkeypatch.setattr("qlora_kit.data.preparing.DETECTED_ROWS", 100)
    peaks = []
    for rows in (1_000, 5_000):
        write_rows(tmp_path / "train.jsonl", [pair(number) for number in range(rows)])
        config = make_config()
        tracemalloc.start()
        data = tokenised_data(config, chatml_tokenizer, cache=cache)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert data.train is not None
        assert len(data.train) == rows
        shutil.rmtree(cache.root)
    assert peaks[1] - peaks[0] < 4_000 * 100


def test_a_ledger_comes_back_from_its_state(tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.rows.update({"train": 3})
    ledger.lengths["train"].update([5, 5, 9])
    ledger.record("train", "a.jsonl:2", "dropped", "wörd")
    ledger.refuse("train", Problem("a.jsonl", 2, "bad", "good", "mend"))
    ledger.write(tmp_path / "ledger.jsonl")
    again = Ledger.restore(json.loads(json.dumps(ledger.state())), tmp_path / "ledger.jsonl")
    assert again.report() == ledger.report()
    assert list(again.entries) == list(ledger.entries)
    assert again.total_tokens("train") == 19
    again.record("train", "a.jsonl:3", "dropped", "more")
    assert len(list(again.entries)) == 2


def test_problems_beyond_the_bound_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.data.ledger.PROBLEMS_KEPT", 2)
    ledger = Ledger()
    for line in range(5):
        ledger.refuse("train", Problem("a.jsonl", line, "bad", "good", "mend"))
    report = ledger.report()
    assert len(report.problems) == 2
    assert report.notes == ("3 more problems were counted and not kept",)
