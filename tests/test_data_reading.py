"""Files in, rows and faults with their places out."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from qlora_kit.data.ledger import Problem
from qlora_kit.data.reading import MAX_ROW_BYTES, Note, Row, find_files, read_rows


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name: str, content: str | bytes) -> Path:
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(path: Path) -> list[tuple[str, dict]]:
    return [(item.source, item.values) for item in read_rows(path) if isinstance(item, Row)]


def problems_of(path: Path) -> list[Problem]:
    return [item for item in read_rows(path) if isinstance(item, Problem)]


def test_jsonl_lines_are_counted_over_blank_lines():
    path = write("a.jsonl", '{"a": 1}\n\n{"a": "é"}')
    assert rows_of(path) == [("a.jsonl:1", {"a": 1}), ("a.jsonl:3", {"a": "é"})]


def test_text_lines_are_rows_as_they_stand():
    path = write("a.txt", b'\xef\xbb\xbffirst\r\n\n  second, "quoted" \n \nthird')
    assert rows_of(path) == [
        ("a.txt:1", {"text": "first"}),
        ("a.txt:3", {"text": '  second, "quoted" '}),
        ("a.txt:5", {"text": "third"}),
    ]


def test_json_parquet_and_csv_give_the_same_rows():
    import pyarrow
    import pyarrow.parquet

    rows = [{"a": "one", "b": "x"}, {"a": "two, three", "b": 'q"\nnew line'}, {"a": "é", "b": ""}]
    write("a.json", json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    write("a.csv", 'a,b\none,x\n"two, three","q""\nnew line"\né,\n')
    for name in ("a.json", "a.parquet"):
        assert rows_of(Path(name)) == [(f"{name}:{n}", row) for n, row in enumerate(rows, 1)]
    assert rows_of(Path("a.csv")) == [("a.csv:2", rows[0]), ("a.csv:3", rows[1]), ("a.csv:5", rows[2])]


def test_globs_are_sorted_and_a_file_with_brackets_is_a_file():
    for name in ("b.jsonl", "a.jsonl", "c[1].jsonl"):
        write(name, '{"a": 1}\n')
    assert [source for source, _ in rows_of(Path("*.jsonl"))] == ["a.jsonl:1", "b.jsonl:1", "c[1].jsonl:1"]
    assert find_files(Path("c[1].jsonl")) == [Path("c[1].jsonl")]


def test_byte_order_mark_is_skipped_and_told():
    for name, text in (("a.jsonl", '{"a": 1}\n'), ("a.json", '[{"a": 1}]'), ("a.csv", "a\n1\n")):
        items = list(read_rows(write(name, b"\xef\xbb\xbf" + text.encode())))
        assert isinstance(items[0], Note)
        assert "byte order mark" in items[0].text
        assert [list(item.values) for item in items[1:]] == [["a"]]


@pytest.mark.parametrize(
    ("name", "content", "line", "reason", "stops"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 2}\n', 2, "not valid JSON: Expecting value at column 7", False),
        ("a.jsonl", '{"a": 1}\n[1]\n', 2, "the row is a list", False),
        ("a.jsonl", '{"a": 1}\nnull\n', 2, "the row is null", False),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', 2, "not UTF-8: byte 0xe9 at position 8", False),
        ("a.jsonl", '{"a": 1}\n{"a": "' + "x" * MAX_ROW_BYTES + '"}\n', 2, "longer than 1024 KiB", False),
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000 + "\n", 2, "not valid JSON: it is nested too deeply", False),
        ("a.jsonl", "", None, "the file is empty", True),
        ("a.jsonl", "\n \n", None, "holds no row", True),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), None, "the file is UTF-16", True),
        ("a.json", "[]", None, "holds no row", True),
        ("a.json", '{"a": 1}', None, "the file holds an object", True),
        ("a.json", '[{"a": 1},\n{"a" 2}]', 2, "not valid JSON", True),
        ("a.json", b'[{"a": 1},\n{"a": "\xe9"}]', 2, "not UTF-8", True),
        ("a.json", '[{"a": 1}, "text"]', 2, "the row is text", False),
        ("a.json", '[{"a": 1}, {"a": NaN}, {"a": 2}]', 2, "NaN is not a JSON number", False),
        ("a.json", '[{"a": 1}, {"a": NaN}', None, "NaN is not a JSON number", True),
        ("a.json", '[{"a": NaN}] {"b": 1}', None, "NaN is not a JSON number", True),
        ("a.json", '[{"a": NaN}[{"b": 1}]', None, "NaN is not a JSON number", True),
        ("a.json", '{"a": NaN}', None, "NaN is not a JSON number", True),
        ("a.csv", "\n\na,b\n1,2\n3\n", 5, "the row has 1 cell", False),
        ("a.csv", "a,b\n1,2\n3\n", 3, "the row has 1 cell", False),
        ("a.csv", "a,b\n1,2\n3,4,5\n", 3, "the row has 3 cells", False),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', 3, "lines 3 to 4 would be one cell", True),
        ("a.csv", 'a,b\n1,2\n3,"4"x\n', 3, "not valid CSV", False),
        ("a.csv", b"a,b\n1,2\n3,\xe9\n", 3, "not UTF-8", False),
        ("a.csv", "a,b\n1,2\n3," + "x" * (MAX_ROW_BYTES + 9) + "\n", 3, "longer than 1024 KiB", False),
        ("a.csv", "a,a\n1,2\n", 1, "two columns have the same name 'a'", True),
        ("a.csv", "a,b\n", None, "holds no row", True),
        ("a.csv", b"a,\xe9\n1,2\n", 1, "not UTF-8", True),
        ("a.parquet", "no parquet", None, "does not begin as Parquet does", True),
        ("a.doc", "text", None, "unknown file type '.doc'", True),
    ],
)
def test_each_fault_is_told_with_its_place(name, content, line, reason, stops):
    problems = problems_of(write(name, content))
    assert len(problems) == 1
    assert (problems[0].file, problems[0].line, problems[0].stops) == (name, line, stops)
    assert reason in problems[0].reason
    assert problems[0].expected
    assert problems[0].fix
    place = name if line is None else f"{name}:{line}"
    assert problems[0].fault.what.startswith(f"{place}: ")


def test_reading_goes_on_behind_faulty_rows():
    lines = ['{"a": 1}', "{", '{"a": "' + "x" * (2 * MAX_ROW_BYTES) + '"}', "[]", '{"a": 5}']
    path = write("a.jsonl", "\n".join(lines))
    assert [source for source, _ in rows_of(path)] == ["a.jsonl:1", "a.jsonl:5"]
    assert [problem.line for problem in problems_of(path)] == [2, 3, 4]
    path = write("a.csv", b"a,b\n1,2\n\xe9,2\n3\n5,6\n")
    assert [source for source, _ in rows_of(path)] == ["a.csv:2", "a.csv:5"]


def test_missing_files():
    assert "does not exist" in problems_of(Path("none.jsonl"))[0].reason
    assert "no file matches" in problems_of(Path("none*.jsonl"))[0].reason
    Path("folder.jsonl").mkdir()
    assert "is a folder" in problems_of(Path("folder.jsonl"))[0].reason


def test_csv_limit_of_the_process_is_left_as_it_was():
    import csv

    before = csv.field_size_limit()
    rows_of(write("a.csv", "a\n" + "x" * 200_000 + "\n"))
    assert csv.field_size_limit() == before


def test_an_endless_line_is_not_held_in_memory():
    with open("a.jsonl", "wb") as file:
        for _ in range(64):
            file.write(b"x" * MAX_ROW_BYTES)
    tracemalloc.start()
    assert len(problems_of(Path("a.jsonl"))) == 1
    assert tracemalloc.get_traced_memory()[1] < 8 * MAX_ROW_BYTES
    tracemalloc.stop()
