"""From a config's files to checked rows and a ledger whose counts are the truth."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from qlora_kit.config import RunConfig, load_config
from qlora_kit.data.duplicates import DigestSet, conversation_digest
from qlora_kit.data.ledger import FAULTS_SHOWN, Ledger, Problem, data_error
from qlora_kit.data.preparing import examine, prepare
from qlora_kit.errors import DataError
from qlora_kit.formats import Message

CONTROL = ("<|im_end|>", "<|endoftext|>")


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_rows(name: str, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def pair(prompt: str, completion: str = "bon") -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def config(*overrides: str) -> RunConfig:
    Path("run.yaml").write_text("name: t\ntask: translation\ndata: {train: train.jsonl}\n", encoding="utf-8")
    return load_config(Path("run.yaml").resolve(), overrides)


def faults_of(*overrides: str) -> list[str]:
    with pytest.raises(DataError) as caught:
        prepare(config(*overrides), control_tokens=CONTROL)
    return [fault.what for fault in caught.value.faults]


def test_rows_become_conversations_with_the_tasks_system_prompt():
    own = {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]}
    write_rows("train.jsonl", [own, {"messages": own["messages"][1:]}])
    first, second = prepare(config()).train
    assert first.messages[0] == Message("system", "system")
    assert second.messages == (
        Message("system", "Translate English to French."),
        Message("user", "user"),
        Message("assistant", "assistant"),
    )
    assert [first.source, second.source] == ["train.jsonl:1", "train.jsonl:2"]


def test_every_fault_of_every_file_is_told_at_once():
    def turns(*roles: str) -> dict:
        return {"messages": [{"role": role, "content": role} for role in roles]}

    write_rows(
        "train.jsonl",
        [
            turns("user", "assistant"),
            "{broken",
            turns("user", "gpt"),
            turns("assistant", "user"),
            turns("user"),
            {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "x"}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]},
            {"messages": [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<|endoftext|>"}]},
            '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "y"}]}',
            turns("user", "system", "assistant"),
        ],
    )
    whats = faults_of("data.test=none.jsonl")
    assert [what.split(": ")[0] for what in whats] == [*(f"train.jsonl:{n}" for n in range(2, 12)), "none.jsonl"]
    words = ["not valid JSON", "gpt", "assistant", "user", "null", "empty", "<|im_end|>", "<|endoftext|>", "surrogate"]
    for what, word in zip(whats, words, strict=False):
        assert word in what


def test_on_error_drop_lists_the_rows_and_counts_them():
    write_rows("train.jsonl", [pair("a"), "{broken", pair("b", ""), pair("c<|im_end|>"), pair("d")])
    prepared = prepare(config("data.on_error=drop"), control_tokens=CONTROL)
    assert [example.source for example in prepared.train] == ["train.jsonl:1", "train.jsonl:5"]
    report = prepared.report
    assert (report.rows, report.kept, report.dropped) == (5, 2, 3)
    assert [(entry.line, entry.action) for entry in prepared.ledger.entries] == [(n, "dropped") for n in (2, 3, 4)]
    assert [problem.line for problem in report.problems] == [2, 3, 4]


def test_on_error_drop_does_not_hide_a_missing_file_or_a_file_of_faulty_rows():
    assert "does not exist" in faults_of("data.on_error=drop")[0]
    write_rows("train.jsonl", [pair("a", ""), pair("b", " ")])
    assert "no row of train is left of 2" in faults_of("data.on_error=drop")[0]


def test_exact_duplicates_are_removed_and_listed():
    write_rows("train.jsonl", [pair("a"), pair("b"), pair("a"), pair("a", "other"), pair("b")])
    prepared = prepare(config())
    assert [example.source[-1] for example in prepared.train] == ["1", "2", "4"]
    assert [(entry.line, entry.action) for entry in prepared.ledger.entries] == [(3, "duplicate"), (5, "duplicate")]
    report = prepared.report
    assert (report.rows, report.kept, report.duplicates) == (5, 3, 2)


def test_leakage_is_refused_unless_allowed_and_counted_anyway():
    write_rows("train.jsonl", [pair("a"), pair("b"), pair("c"), pair("b")])
    write_rows("validation.jsonl", [pair("b"), pair("x")])
    write_rows("test.jsonl", [pair("c"), pair("b")])
    files = ("data.validation=validation.jsonl", "data.test=test.jsonl", "data.on_error=drop")
    assert faults_of(*files) == [
        "train.jsonl:2: the same row is in validation and test",
        "train.jsonl:3: the same row is in test",
    ]
    prepared = prepare(config(*files, "data.allow_leakage=true"))
    assert len(prepared.train) == 3
    assert len(prepared.validation) == 2
    assert len(prepared.test) == 2
    report = prepared.report
    assert (report.rows, report.kept, report.duplicates, report.leaked) == (8, 7, 1, 2)
    assert examine(config(*files)).report.leaked == 2


def test_several_files_and_globs_beside_the_yaml(tmp_path, monkeypatch):
    Path("data").mkdir()
    write_rows("data/b.jsonl", [pair("b")])
    write_rows("data/a.jsonl", [pair("a")])
    write_rows("more.json", [[pair("c"), pair("d")]])
    settings = config("data.train=[data/*.jsonl, more.json]")
    monkeypatch.chdir("/")
    sources = [example.source for example in prepare(settings).train]
    assert [Path(source).name for source in sources] == ["a.jsonl:1", "b.jsonl:1", "more.json:1", "more.json:2"]


def test_mixed_formats_are_refused_in_one_file_and_over_files():
    alpaca = {"instruction": "a", "output": "b"}
    write_rows("train.jsonl", [pair("a"), alpaca])
    assert "mixed formats" in faults_of()[0]
    write_rows("train.jsonl", [pair("a")])
    write_rows("other.jsonl", [alpaca])
    what = faults_of("data.train=[train.jsonl, other.jsonl]", "data.on_error=drop")[0]
    assert "prompt_completion (train.jsonl), alpaca (other.jsonl)" in what


def test_unused_columns_and_byte_order_marks_are_told(caplog):
    Path("train.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({**pair("a"), "id": 3}).encode())
    with caplog.at_level(logging.WARNING):
        report = prepare(config()).report
    assert any("byte order mark" in note for note in report.notes)
    assert any("nothing uses the columns id" in note for note in report.notes)
    assert "byte order mark" in caplog.text


def test_report_has_the_keys_of_the_command():
    write_rows("train.jsonl", [pair("a"), pair("b", "")])
    report = examine(config()).report.to_json()
    assert json.loads(json.dumps(report)) == {
        "rows": 2,
        "kept": 1,
        "dropped": 1,
        "truncated": 0,
        "duplicates": 0,
        "leaked": 0,
        "supervised_tokens": 0,
        "total_tokens": 0,
        "problems": [{"file": "train.jsonl", "line": 2, "reason": report["problems"][0]["reason"]}],
        "notes": [],
    }


def test_ledger_file_agrees_with_the_report(tmp_path):
    write_rows("train.jsonl", [pair("a"), pair("a"), "{", pair("b")])
    prepared = prepare(config("data.on_error=drop"))
    prepared.ledger.write(tmp_path / "ledger.jsonl")
    entries = [json.loads(line) for line in Path("ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    actions = [entry["action"] for entry in entries]
    assert (actions.count("dropped"), actions.count("duplicate")) == (1, 1)
    assert {entry["file"] for entry in entries} == {"train.jsonl"}
    assert sorted(entry["line"] for entry in entries) == [2, 3]
    assert not Path("ledger.jsonl.partial").exists()


def test_many_problems_are_capped_in_the_message_but_not_in_the_report():
    problems = [Problem("f.jsonl", line, "bad", "good", "mend") for line in range(1, 51)]
    error = data_error(problems)
    assert isinstance(error, DataError)
    assert error.exit_code == 2
    assert len(error.faults) == FAULTS_SHOWN + 1
    assert error.faults[-1].what == "30 more problems of 50 in all, from f.jsonl:21 to f.jsonl:50"
    write_rows("train.jsonl", [pair(str(n), "") for n in range(50)] + [pair("a")])
    assert len(examine(config()).report.problems) == 50


def test_digest_set_agrees_with_a_plain_set_within_its_memory():
    digests = [conversation_digest([Message("user", str(n % 30_000))]) for n in range(50_000)]
    packed, plain = DigestSet(), set()
    for digest in digests:
        assert packed.add(digest) == (digest not in plain)
        plain.add(digest)
    used_bytes = sum(bucket.__sizeof__() for bucket in packed._buckets) - 4096 * bytearray().__sizeof__()
    assert used_bytes <= 32 * len(plain)


def test_digest_matches_only_whole_digests():
    """A run of bytes across two neighbouring digests is not a member."""
    packed = DigestSet()
    zeros = b"\0" * 16
    packed.add(b"\0\1" + zeros[:14])  # both go into the first bucket, with 16 zero bytes across their edge
    packed.add(b"\0\0" + b"\7" * 14)
    assert zeros not in packed
    assert packed.add(zeros)
    assert zeros in packed


def test_ledger_counts_splits_apart():
    ledger = Ledger()
    ledger.rows.update({"train": 3, "test": 2})
    ledger.record("test", "f.jsonl:1", "dropped", "why")
    assert ledger.report("train").kept == 3
    assert ledger.report("test").kept == 1
    assert ledger.report().kept == 4


STORY = (
    "The old fisherman mended his net on the quiet pier while the gulls circled above the grey water and the wind "
    "carried the smell of salt across the empty market square every single morning of that long winter"
)


def test_near_duplicates_are_found_on_request_in_a_split_and_across_splits():
    write_rows("train.jsonl", [pair(STORY), pair(STORY.replace("quiet", "calm")), pair("Another text altogether.")])
    write_rows("validation.jsonl", [pair(STORY.replace("winter", "summer"))])
    assert len(prepare(config()).train) == 3
    files = ("data.validation=validation.jsonl", "data.near_duplicates=0.6")
    prepared = examine(config(*files))
    assert [example.source for example in prepared.train] == ["train.jsonl:1", "train.jsonl:3"]
    leak, double = prepared.ledger.entries
    assert (leak.action, leak.line) == ("leaked", 1)
    assert "validation.jsonl:1" in leak.reason
    assert (double.action, double.line) == ("duplicate", 2)
    assert "near duplicate of train.jsonl:1" in double.reason
    assert [problem.line for problem in prepared.stopping] == [1]
    assert examine(config(*files, "data.allow_leakage=true")).stopping == ()


def test_the_format_is_detected_where_the_first_thousand_rows_are_faulty():
    write_rows("train.jsonl", ["{broken"] * 1200 + [pair("a"), pair("b")])
    prepared = prepare(config("data.on_error=drop"))
    assert [example.source for example in prepared.train] == ["train.jsonl:1201", "train.jsonl:1202"]
    assert prepared.report.dropped == 1200


def test_formats_mixed_behind_the_first_thousand_rows_are_refused():
    write_rows("train.jsonl", [pair(str(n)) for n in range(1500)] + [{"instruction": "a", "output": "b"}])
    stopping = examine(config("data.on_error=drop")).stopping
    assert any("mixed formats" in problem.reason for problem in stopping)
