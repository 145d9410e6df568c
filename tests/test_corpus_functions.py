"""Generated functions: parts share no chain, assertions refuse other code, passages hold nothing of the test part."""

from __future__ import annotations

import ast
import random
import re
from typing import Any

import pytest

from scripts.tiny_corpus import functions, operations
from scripts.tiny_corpus.holdout import PARTS, Part, Row, part_of

PASSAGES = 2500


@pytest.fixture(scope="module")
def rows_by_part() -> dict[Part, list[Row]]:
    counts: dict[Part, int] = {"train": 700, "validation": 400, "test": 400}
    return {part: functions.rows(part, count, seed=7) for part, count in counts.items()}


@pytest.fixture(scope="module")
def passages() -> list[str]:
    rng = random.Random(11)
    return [functions.passage(rng) for _ in range(PASSAGES)]


def passes(code: str, tests: list[str]) -> bool:
    scope: dict[str, Any] = {}
    exec(code, scope)
    try:
        exec("\n".join(tests), scope)
    except (AssertionError, AttributeError, TypeError, ValueError, IndexError):
        return False
    return True


def function_name(row: Row) -> str:
    return re.match(r"Write (\w+)\(", row.fields["instruction"]).group(1)  # type: ignore[union-attr]


def parameter(row: Row) -> str:
    return re.search(r"\((\w+)\)", row.fields["code"]).group(1)  # type: ignore[union-attr]


class _Rename(ast.NodeTransformer):
    """Gives parameters and loop variables fixed names and drops docstrings, so that only the operations are left."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id), node.ctx)


def operations_only(source: str) -> list[str]:
    bodies = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {function.args.args[0].arg: "p"}
        for node in ast.walk(function):
            if isinstance(node, ast.comprehension):
                names[node.target.id] = "q"  # type: ignore[attr-defined]
        kept = [node for node in function.body if not isinstance(node, ast.Expr)]
        bodies.append("\n".join(ast.unparse(_Rename(names).visit(node)) for node in kept))
    return bodies


def modules_in(passages: list[str]) -> list[str]:
    return [text for text in passages if "def " in text]


def test_rows_are_distinct_deterministic_and_of_their_part(rows_by_part: dict[Part, list[Row]]) -> None:
    for part, rows in rows_by_part.items():
        assert len({row.fields["instruction"] for row in rows}) == len(rows)
        assert all(part_of(row.combination) == part for row in rows)
    assert functions.rows("test", 50, seed=7) == rows_by_part["test"][:50]
    assert functions.rows("test", 50, seed=8) != rows_by_part["test"][:50]
    combinations = [{row.combination for row in rows_by_part[part]} for part in PARTS]
    assert len(set.union(*combinations)) == sum(len(chains) for chains in combinations)


def test_there_are_many_chains() -> None:
    rng = random.Random(2)
    assert len({functions.draw_chain(rng, "train").combination for _ in range(3000)}) >= 1500


def test_every_operation_of_the_test_part_is_in_train(rows_by_part: dict[Part, list[Row]]) -> None:
    def atoms(part: Part) -> set[str]:
        return {atom for row in rows_by_part[part] for atom in re.split(r"[|>]| and | or ", row.combination)}

    assert {"list", "number", "text"} <= atoms("test")
    assert atoms("test") <= atoms("train")


def test_reference_code_is_short_and_passes(rows_by_part: dict[Part, list[Row]]) -> None:
    for row in [*rows_by_part["test"], *rows_by_part["train"][:400]]:
        assert 3 <= len(row.fields["tests"]) <= 4
        assert row.fields["code"].startswith(f"def {function_name(row)}(")
        assert row.fields["code"].count("\n") <= 3 and len(row.fields["code"]) <= 160
        assert passes(row.fields["code"], row.fields["tests"])


def chain_of(family: str, joiner: str, filters: list[str], steps: list[str], constants: list[str]) -> functions.Chain:
    tables = {
        "values": (operations.NUMBER_FILTERS, (*operations.NUMBER_MAPS, *operations.REDUCTIONS)),
        "words": (operations.WORD_FILTERS, (*operations.WORD_MAPS, *operations.REDUCTIONS)),
        "number": (operations.NUMBER_FILTERS, operations.NUMBER_MAPS),
        "text": ((), (*operations.TEXT_STEPS, *operations.TEXT_ENDS)),
    }[family]
    by_key = [{operation.key: operation for operation in table} for table in tables]
    chosen = tuple(by_key[0][key] for key in filters), tuple(by_key[1][key] for key in steps)
    return functions.Chain(family, joiner, *chosen, tuple(constants))


@pytest.mark.parametrize(
    ("chain", "words", "inputs", "results"),
    [
        (
            chain_of("values", "and", ["even", "greater"], ["times", "sum"], ["", "3", "5", ""]),
            "the sum of each value times 5, where the value is even and is greater than 3",
            [[4, 3, 2, 5, -8, 10], []],
            [70, 0],
        ),
        (
            chain_of("values", "or", ["divisible", "below_zero"], ["absolute", "max"], ["7", "", "", ""]),
            "the largest of the absolute value of each value or 0, where the value is divisible by 7 or is below zero",
            [[14, 30, -20], [1, 2]],
            [20, 0],
        ),
        (
            chain_of("words", "", ["long"], ["upper", "join"], ["4", "", "-"]),
            'the text of each word in capitals joined with "-", where the word has exactly 4 letters',
            [["cake", "ox", "bird"]],
            ["CAKE-BIRD"],
        ),
        (
            chain_of("text", "", [], ["reverse", "first", "count"], ["", "4", "a"]),
            'the text reversed, then cut to its first 4 letters, then the count of "a"',
            ["aaabaca", "xy"],
            [2, 0],
        ),
        (
            chain_of("number", "", ["odd"], ["half", "plus"], ["", "", "12"]),
            "if n is odd then half of n rounded down, otherwise n plus 12",
            [9, -3, 8],
            [4, -2, 20],
        ),
    ],
)
def test_words_mean_what_the_code_does(
    chain: functions.Chain, words: str, inputs: list[Any], results: list[Any]
) -> None:
    names = functions.TASK_NAMES[chain.family]
    assert functions.describe(chain, names) == words
    scope: dict[str, Any] = {}
    exec(functions.write_function("made", chain, names), scope)
    assert [scope["made"](item) for item in inputs] == results


def test_other_code_fails_the_assertions(rows_by_part: dict[Part, list[Row]]) -> None:
    """Code of another chain with the same parameter, under the right name, is refused in at least 95 % of the cases."""
    rng = random.Random(5)
    rows, refused, tried = rows_by_part["test"], 0, 0
    for row in rows:
        family = row.combination.split("|")[0]
        others = [
            other for other in rows if other.combination.startswith(family) and other.combination != row.combination
        ]
        for other in rng.sample(others, 4):
            code = other.fields["code"].replace(function_name(other), function_name(row))
            refused += not passes(code, row.fields["tests"])
            tried += 1
    assert refused / tried >= 0.95


def test_nearly_right_code_mostly_fails(rows_by_part: dict[Part, list[Row]]) -> None:
    """One digit raised by one: a wrong constant must be seen."""
    refused = tried = 0
    for row in rows_by_part["test"]:
        head, body = row.fields["code"].split("\n", 1)
        digits = [match for match in re.finditer(r"\d+", body) if match.group() not in "0"]
        if digits:
            last = digits[-1]
            changed = body[: last.start()] + str(int(last.group()) + 1) + body[last.end() :]
            refused += not passes(f"{head}\n{changed}", row.fields["tests"])
            tried += 1
    assert tried > 200 and refused / tried >= 0.85


def test_passages_hold_no_held_out_function(rows_by_part: dict[Part, list[Row]], passages: list[str]) -> None:
    held_out = [*rows_by_part["test"], *rows_by_part["validation"]]
    bodies = {body for row in held_out for body in operations_only(row.fields["code"])}
    told = [body for text in modules_in(passages) for body in operations_only(text)]
    assert len(told) > PASSAGES
    assert not bodies & set(told)
    # The check sees something: the train part's own functions do come up again.
    assert {body for row in rows_by_part["train"] for body in operations_only(row.fields["code"])} & set(told)
    text = "\n".join(passages)
    assert not any(row.fields["code"] in text or row.fields["instruction"] in text for row in held_out)
    descriptions = {row.fields["instruction"].split(": ", 1)[1] for row in held_out}
    assert not any(description in text for description in descriptions)


def test_passages_are_valid_python_with_true_results(passages: list[str]) -> None:
    checked = 0
    for text in modules_in(passages)[:500]:
        scope: dict[str, Any] = {}
        exec(text, scope)
        for call, result in re.findall(r"^# (\w+\(.*\)) gives (.*)$", text, re.M):
            assert eval(call, scope) == ast.literal_eval(result)
            checked += 1
    assert checked > 50


def test_passages_keep_the_house_rules(passages: list[str]) -> None:
    text = "\n".join(passages)
    assert not re.search(r"positive|negative|neutral|<\|", text)
    assert "Write " not in text
    assert functions.passage(random.Random(4)) == functions.passage(random.Random(4))
    lengths = sorted(len(passage.split()) for passage in passages)
    assert 40 <= lengths[len(lengths) // 2] <= 150
