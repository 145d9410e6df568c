"""YAML reading: plain values as YAML 1.2 has them, lines, refusals, and dumping."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from qlora_kit.config.yaml_source import dump_yaml, parse_value, parse_yaml, read_yaml
from qlora_kit.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 0.0001),
        ("2.5E3", 2500.0),
        ("-.5", -0.5),
        ("3", 3),
        ("0x10", 16),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("'1e-4'", "1e-4"),
        ("010", "010"),
        ("~", None),
        ("", None),
        ("[1, a]", [1, "a"]),
        ("{a: 1}", {"a": 1}),
    ],
)
def test_values(text: str, value: object) -> None:
    got = parse_value(text)
    assert got == value
    assert type(got) is type(value)


def test_lines_of_nested_keys() -> None:
    source = parse_yaml("# note\na:\n  b: 1\n  c:\n    d: 2\n", name="x")
    assert source.lines == {("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", "d"): 5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", "x:2: a is given again (first on line 1)"),
        ("a:\n  b: 1\n  b: 1\n", "x:3: a.b is given again"),
        ("a: [1\n", "x:2: not valid YAML"),
        ("a:\n\tb: 1\n", "x:2: not valid YAML"),
        ("a: &x {b: *x}\n", "x:1: not valid YAML: an alias"),
        ("a: !!python/object:os.system 1\n", "x:1: not valid YAML"),
        ("a: 1\n---\nb: 1\n", "x:2: not valid YAML"),
        ("1: a\n", "x:1: the key '1' is not text"),
        ("[a]: 1\n", "x:1: the key 'a list or mapping' is not text"),
        ("", "x: holds nothing"),
        ("- a\n", "x: holds no mapping"),
        ("word", "x: holds no mapping"),
        ("a: \x00", "x: not valid YAML"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, name="x")
    assert message in str(caught.value)
    assert caught.value.faults[0].expected
    assert caught.value.faults[0].fix


def test_data_in_the_place_of_a_config_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("text,label\na,positive\n")
    with pytest.raises(ConfigError, match="is a file of data") as caught:
        read_yaml(tmp_path / "mine.csv")
    assert "data.train=" in caught.value.faults[0].fix


def test_dump_reads_back_the_same_here_and_in_yaml_1_1() -> None:
    values = {"a": "1e-4", "b": 1e-5, "c": "no", "d": "é: #", "e": [1, None, True], "f": {"g": "1:30"}, "h": ""}
    text = dump_yaml(values)
    assert parse_yaml(text, name="x").values == values
    assert yaml.safe_load(text) == values
    assert math.isinf(parse_value(dump_yaml({"a": math.inf}).split(": ")[1]))
