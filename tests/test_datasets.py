"""The shipped data sets: what the script writes, in five formats, with test rows that training shows no part of."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import re
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from qlora_kit.code_execution import run_assertions
from qlora_kit.format_detection import detect_format
from qlora_kit.formats import to_example
from qlora_kit.tasks import TASKS, render_template
from scripts.build_datasets import DATASETS, split_rows
from scripts.tiny_corpus import reviews
from scripts.tiny_corpus.holdout import PARTS, Part, Row
from scripts.tiny_corpus.words import FIRST_NAMES, NUMBERS

FOLDER = Path(__file__).resolve().parent.parent / "datasets"
FORMAT_OF_TASK = {
    "text_generation": "messages",
    "question_answering": "alpaca",
    "translation": "sharegpt",
    "sentiment": "task",
    "code_generation": "prompt_completion",
}
LEAST_ROWS: dict[Part, int] = {"train": 2_000, "validation": 200, "test": 200}
OTHERS: dict[Part, tuple[Part, ...]] = {
    "validation": ("train",),
    "test": ("train", "validation"),
}


def file_of(task: str, part: Part) -> Path:
    return FOLDER / task / f"{part}.{DATASETS[task].suffix}"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, by the plain reader of its kind."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        if path.suffix == ".json":
            return json.load(file)
        return [json.loads(line) for line in file]


@cache
def generated(task: str, part: Part) -> list[Row]:
    """The generator's rows of a shipped file."""
    return split_rows(task, part)


@cache
def shipped(task: str, part: Part) -> list[dict[str, Any]]:
    """The records of a shipped file."""
    return read_records(file_of(task, part))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("task", DATASETS)
def test_shipped_files_are_what_the_script_writes(task: str, part: Part, tmp_path: Path) -> None:
    path = file_of(task, part)
    written = tmp_path / path.name
    DATASETS[task].write(generated(task, part), written)
    if path.suffix == ".parquet":
        assert pq.read_table(path).equals(pq.read_table(written))
    else:
        assert path.read_bytes() == written.read_bytes()


def test_every_task_has_its_data_and_its_card() -> None:
    assert set(DATASETS) == set(TASKS)
    for task in TASKS:
        expected = {"README.md", *(file_of(task, part).name for part in PARTS)}
        assert {path.name for path in (FOLDER / task).iterdir()} == expected


def test_each_file_has_enough_rows_and_the_number_that_its_card_names() -> None:
    for task in DATASETS:
        card = (FOLDER / task / "README.md").read_text(encoding="utf-8")
        for part in PARTS:
            rows = len(shipped(task, part))
            assert rows >= LEAST_ROWS[part]
            assert re.search(rf"\| `{file_of(task, part).name}` \| {rows:,} \|", card), (task, part)


def test_cards_show_rows_that_are_in_the_data() -> None:
    """The first code block of a card is a row of a test file, as it stands there or as its JSON."""
    for task in DATASETS:
        card = (FOLDER / task / "README.md").read_text(encoding="utf-8")
        found = re.search(r"```(?:json|csv)\n(.*?)\n```", card, re.S)
        assert found, task
        if DATASETS[task].suffix == "parquet":
            assert json.loads(found[1]) in read_records(file_of(task, "test"))
        else:
            assert found[1] in file_of(task, "test").read_text(encoding="utf-8")


def test_the_five_tasks_come_in_five_formats() -> None:
    assert len(set(FORMAT_OF_TASK.values())) == 5
    for task, part in product(DATASETS, PARTS):
        assert detect_format(shipped(task, part), TASKS[task]) == FORMAT_OF_TASK[task], part


@pytest.mark.parametrize("task", DATASETS)
def test_every_format_gives_the_prompt_and_the_answer_of_the_task(task: str) -> None:
    """Whatever columns a row came in, its conversation is the task's templates over the generator's fields."""
    spec = TASKS[task]
    for record, row in zip(shipped(task, "test"), generated(task, "test"), strict=True):
        example = to_example(record, format=FORMAT_OF_TASK[task], task=spec, source="test")
        assert [message.role for message in example.messages] == ["system", "user", "assistant"]
        assert [message.content for message in example.messages] == [
            spec.system_prompt,
            render_template(spec.prompt, row.fields),
            render_template(spec.completion, row.fields),
        ]
        assert example.extra == ({"tests": row.fields["tests"]} if task == "code_generation" else {})


@pytest.mark.parametrize("task", DATASETS)
def test_parts_share_no_combination(task: str) -> None:
    combinations = {part: {row.combination for row in generated(task, part)} for part in PARTS}
    assert all(len(combinations[part]) >= 50 for part in PARTS)
    assert not combinations["train"] & combinations["validation"]
    assert not combinations["train"] & combinations["test"]
    assert not combinations["validation"] & combinations["test"]


def input_and_answer(task: str, row: Row) -> tuple[str, str]:
    """The user turn and the answer; of code, the answer without its first line, which holds the function's name."""
    prompt, answer = (render_template(text, row.fields) for text in (TASKS[task].prompt, TASKS[task].completion))
    return prompt, answer.split("\n", 1)[1] if task == "code_generation" else answer


def stands_in(phrase: str, text: str) -> bool:
    """Whether ``phrase`` is in ``text`` as whole words."""
    return phrase in text and re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text) is not None


@pytest.mark.parametrize("part", OTHERS)
@pytest.mark.parametrize("task", DATASETS)
def test_held_out_inputs_and_answers_are_in_no_other_part(task: str, part: Part) -> None:
    """As part of a longer text too, in any case; a label word is no answer that could be held out."""
    for other in OTHERS[part]:
        texts = {text for row in generated(task, other) for text in input_and_answer(task, row)}
        everything = "\n\n\n".join(texts).lower()
        for row in generated(task, part):
            prompt, answer = input_and_answer(task, row)
            assert prompt.lower() not in everything
            if TASKS[task].labels:
                assert answer in TASKS[task].labels
            elif task == "code_generation":
                assert answer not in texts
            else:
                assert " " in answer
                assert not stands_in(answer.lower(), everything), answer


def test_no_row_comes_twice() -> None:
    for task, part in product(DATASETS, PARTS):
        records = shipped(task, part)
        assert len({json.dumps(record, sort_keys=True) for record in records}) == len(records), (task, part)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def naive_bayes(train: list[dict[str, Any]], texts: list[str]) -> list[str]:
    """Labels by multinomial naive Bayes over single words with add-one smoothing."""
    counts = {row["label"]: Counter[str]() for row in train}
    for row in train:
        counts[row["label"]].update(words_of(row["text"]))
    vocabulary = len(set().union(*counts.values()))
    rows = Counter(row["label"] for row in train)

    def score(label: str, text: str) -> float:
        total = counts[label].total() + vocabulary
        return math.log(rows[label]) + sum(math.log((counts[label][word] + 1) / total) for word in words_of(text))

    return [max(counts, key=lambda label: score(label, text)) for text in texts]


def test_single_words_do_not_tell_the_sentiment() -> None:
    train, test = shipped("sentiment", "train"), shipped("sentiment", "test")
    guesses = naive_bayes(train, [row["text"] for row in test])
    accuracy = sum(guess == row["label"] for guess, row in zip(guesses, test, strict=True)) / len(test)
    assert accuracy <= 0.60
    # The classifier itself works: it tells apart what single words do tell.
    easy = [{"text": "all good here", "label": "a"}, {"text": "all bad here", "label": "b"}]
    assert naive_bayes(easy, ["a good day", "a bad day"]) == ["a", "b"]


def test_sentiment_labels_are_balanced() -> None:
    for part in PARTS:
        counts = Counter(row["label"] for row in shipped("sentiment", part))
        assert set(counts) == set(TASKS["sentiment"].labels)
        assert max(counts.values()) - min(counts.values()) <= 1


def template_of(text: str) -> str:
    """A review without opener and closer, its adjectives, nouns, names, days and numbers replaced by one sign."""
    items = {word for group in reviews.ITEM_GROUPS for words in (*group[:2], [group[2]]) for word in words}
    filled = {*items, *reviews.GOOD, *reviews.BAD, *reviews.RELATIVES, *reviews.DAYS, *FIRST_NAMES, *NUMBERS}
    pattern = re.compile(rf"\b({'|'.join(word.lower() for word in filled)})\b")
    around = {
        pattern.sub("_", re.sub(r"\{\w+\}", "_", sentence.lower())) for sentence in (*reviews.OPENERS, *reviews.CLOSERS)
    }
    sentences = re.split(r"(?<=[.?]) ", pattern.sub("_", text.lower()))
    return " ".join(sentence for sentence in sentences if sentence not in around)


def test_sentiment_parts_share_no_template() -> None:
    """Read from the texts, not from the generator's own skeletons."""
    templates = {part: {template_of(row["text"]) for row in shipped("sentiment", part)} for part in PARTS}
    assert not templates["test"] & templates["train"]
    assert not templates["test"] & templates["validation"]
    assert not templates["validation"] & templates["train"]
    assert len(templates["test"]) >= 150
    assert template_of("You asked me about the cup. I found it awful.") == "i found it _."


def test_reference_code_passes_its_own_assertions() -> None:
    rows = shipped("code_generation", "test")[::15]
    assert len(rows) >= 20
    for row in rows:
        assert len(row["tests"]) >= 3
        result = run_assertions(row["completion"], row["tests"], timeout_seconds=30.0)
        assert result.passed, (row, result)
        emptied = re.sub(r"^( +)return .*$", r"\1return None", row["completion"], flags=re.M)
        assert not run_assertions(emptied, row["tests"], timeout_seconds=30.0).passed


def test_the_folder_of_data_is_no_package() -> None:
    """A module file in it would hide the library of the same name."""
    assert list(FOLDER.rglob("*.py")) == []
    spec = importlib.util.find_spec("datasets")
    assert spec is not None and spec.origin is not None
    assert FOLDER not in Path(spec.origin).parents
