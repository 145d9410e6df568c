"""docs/data-formats.md does not rot: each block is read as it stands, and what it says comes out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_kit.config import load_config
from qlora_kit.conversation import Example
from qlora_kit.data.encoding import IGNORED_LABEL, Encoded, encode_rows, self_check
from qlora_kit.data.preparing import PreparedData, examine, prepare
from qlora_kit.errors import DataError
from qlora_kit.formats import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOC = (Path(__file__).resolve().parents[1] / "docs/data-formats.md").read_text(encoding="utf-8")
FORMAT_SECTIONS = re.findall(r"^### (`.*)$", DOC, flags=re.MULTILINE)


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded base's tokenizer."""
    from qlora_kit.base_files import resolve_description
    from qlora_kit.models import load_tokenizer

    return load_tokenizer(resolve_description("tiny"))


def blocks(heading: str) -> list[tuple[str, str]]:
    """Language and content of each block below a heading."""
    (section,) = re.findall(rf"^#+ {re.escape(heading)}\n(.*?)(?=^##|\Z)", DOC, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"```(\w+)\n(.*?)```", section, flags=re.DOTALL)


def read(heading: str) -> PreparedData:
    """The rows of a format's block, by its own YAML, or by a task without templates' columns in the way."""
    given = dict(blocks(heading))
    (suffix,) = given.keys() & {"jsonl", "csv", "txt"}
    Path(f"stories.{suffix}").write_text(given[suffix], encoding="utf-8")
    task = "sentiment" if suffix == "csv" else "translation"
    own = f"name: doc\ntask: {task}\ndata: {{train: stories.{suffix}}}\n"
    Path("doc.yaml").write_text(given.get("yaml", own), encoding="utf-8")
    return prepare(load_config("doc.yaml"))


@pytest.mark.parametrize("heading", FORMAT_SECTIONS)
def test_each_format_has_three_rows_that_are_read_and_learned(
    heading: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    data = read(heading)
    assert len(data.train) == 3
    assert list(data.ledger.entries) == []
    assert data.ledger.problems == ()
    assert data.ledger.notes == []
    self_check(data.train, tiny_tokenizer, loss_on="all_assistant")
    for row in encode_rows(data.train, tiny_tokenizer, loss_on="all_assistant"):
        assert isinstance(row, Encoded)
        assert row.supervised_tokens > 0


def test_every_format_is_described() -> None:
    assert {heading.split("`")[1] for heading in FORMAT_SECTIONS} == set(FORMATS)


def marked(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The conversation with what the loss sees in brackets."""
    (row,) = encode_rows([example], tokenizer, loss_on="all_assistant")
    assert isinstance(row, Encoded)
    start = next(place for place, label in enumerate(row.labels) if label != IGNORED_LABEL)
    assert IGNORED_LABEL not in row.labels[start:]
    return f"{tokenizer.decode(row.input_ids[:start])}[{tokenizer.decode(row.input_ids[start:])}]\n"


def test_the_walk_from_a_csv_is_as_told(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    heading = "From a CSV to an adapter"
    (_, train), (_, test), (_, settings), (_, commands), (_, fault) = blocks(heading)
    Path("tickets.csv").write_text(train, encoding="utf-8")
    Path("tickets-test.csv").write_text(test, encoding="utf-8")
    Path("tickets.yaml").write_text(settings, encoding="utf-8")
    config = load_config("tickets.yaml")
    data = prepare(config)
    counts = re.findall(r"^ ([a-z ]+?) +(\d+) +(\d+)$", commands, flags=re.M)  # of train and of test
    told = {name: int(train) + int(test) for name, train, test in counts}
    report = data.report
    assert (report.rows, report.kept, report.duplicates) == (told["rows"], told["kept"], told["duplicates"])
    encoded = encode_rows([*data.train, *data.test], tiny_tokenizer, loss_on=config.data.loss_on)
    assert sum(row.supervised_tokens for row in encoded if isinstance(row, Encoded)) == told["supervised tokens"]
    assert sum(len(row.input_ids) for row in encoded if isinstance(row, Encoded)) == told["total tokens"]
    steps = int(re.findall(r"(\d+) steps", commands)[0])
    assert steps == config.train.num_train_epochs * len(data.train) / config.train.per_device_train_batch_size
    assert marked(data.train[0], tiny_tokenizer) == dict(blocks("What is learned"))["mask"]

    Path("broken.csv").write_text("message,team\nHello.,billing\nLate, and broken.,returns\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare(load_config("tickets.yaml", ["data.train=broken.csv"]))
    assert str(caught.value) == fault.partition("\n")[2].rstrip()


def test_a_plain_text_file_needs_a_task_of_its_own() -> None:
    Path("stories.txt").write_text("Once.\n", encoding="utf-8")
    Path("doc.yaml").write_text("name: doc\ntask: text_generation\ndata: {train: stories.txt}\n", encoding="utf-8")
    (problem,) = examine(load_config("doc.yaml")).stopping
    assert "plain text does not fit the task text_generation, which has a system prompt" in problem.reason
