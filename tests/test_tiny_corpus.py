"""The pretraining text of `tiny` holds no held-out row and is always the same; its tokenizer is Qwen2.5's in small."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import trl_template

from scripts.build_datasets import DATASETS, split_rows
from scripts.tiny_corpus import mixture
from scripts.tiny_corpus.holdout import Part, Row
from scripts.tiny_corpus.pretraining import CYCLES

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "qlora_kit" / "bases" / "tiny"
LABEL_WORDS = ("positive", "negative", "neutral")
HELD_OUT: tuple[Part, ...] = ("validation", "test")
LONGEST_RUN_WORDS = 8
NORMAL_CHUNKS = range(3)


# A validation row (of no test) that is the beginning of a longer review of the practice cycle; the data card says so.
KNOWN_OVERLAP = {(1, 26): ["i have not written about a dance before the dance itself was pleasant"]}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: what stands between them, line ends included, does not count."""
    return re.findall(r"\w+", text.lower())


class WordRuns:
    """Finds texts as runs of whole words, exactly, by one set intersection for each length of run.

    A text of up to ``LONGEST_RUN_WORDS`` words is one run. Of a longer one the last words are looked up, and the whole
    is compared where they occur.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._wanted: dict[int, dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
        for text in texts:
            words = words_of(text)
            run = tuple(words[-LONGEST_RUN_WORDS:])
            self._wanted[len(run)][run].append(" ".join(words))

    def found_in(self, text: str) -> list[str]:
        """The texts that stand in ``text``, normalised."""
        words = words_of(text)
        joined = f" {' '.join(words)} "
        found = []
        for length, wanted in self._wanted.items():
            runs = set(zip(*(words[start:] for start in range(length)), strict=False))
            candidates = [whole for run in runs & wanted.keys() for whole in wanted[run]]
            found += [whole for whole in candidates if f" {whole} " in joined]
        return sorted(found)


class _Rename(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self._names.get(node.id, node.id), node.ctx)


def bodies_of(source: str) -> set[str]:
    """The functions of a module without name, docstring, comments and the names of parameter and loop variable."""
    bodies = set()
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        names = {argument.arg: "parameter" for argument in function.args.args}
        loops = [node.target for node in ast.walk(function) if isinstance(node, ast.comprehension)]
        names |= {target.id: "item" for target in loops if isinstance(target, ast.Name)}
        kept = [statement for statement in function.body if not isinstance(statement, ast.Expr)]
        bodies.add("\n".join(ast.unparse(_Rename(names).visit(statement)) for statement in kept))
    return bodies


def passages_of(document: str) -> list[str]:
    """The passages of a document, without the separators that are chat tokens."""
    pieces = re.split(r"<\|im_start\|>\w+\n|<\|im_end\|>\n|<\|endoftext\|>", document)
    return [piece for piece in pieces if piece]


def row_texts(task: str, row: Row) -> list[str]:
    """A row's input and its answer; a label is no text of its own."""
    fields = row.fields
    if task == "question_answering":
        return [f"{fields['context']} {fields['question']}", fields["answer"]]
    if task == "sentiment":
        return [fields["text"]]
    if task == "code_generation":  # code is also compared by its operations alone, see bodies_of
        return [fields["instruction"], fields["code"]]
    return list(fields.values())


@pytest.fixture(scope="module")
def held_out() -> list[tuple[str, Row]]:
    return [(task, row) for task in DATASETS for part in HELD_OUT for row in split_rows(task, part)]


@pytest.fixture(scope="module")
def runs(held_out: list[tuple[str, Row]]) -> WordRuns:
    return WordRuns(text for task, row in held_out for text in row_texts(task, row))


@pytest.fixture(scope="module")
def bodies(held_out: list[tuple[str, Row]]) -> set[str]:
    return {body for task, row in held_out if task == "code_generation" for body in bodies_of(row.fields["code"])}


def faults_of_chunk(documents: list[str], runs: WordRuns, bodies: set[str]) -> list[str]:
    """What one chunk of the pretraining text shares with the held-out rows, and the label words in it."""
    text = "".join(documents)
    modules = [passage for document in documents for passage in passages_of(document) if "def " in passage]
    told = {body for module in modules for body in bodies_of(module)}
    assert told, "the functions of the chunk were not read"
    return [
        *runs.found_in(text),
        *sorted(told & bodies),
        *(word for word in LABEL_WORDS if word in text.lower()),
    ]


def test_the_search_finds_what_is_there() -> None:
    short, long = "a Silver box", " ".join(f"word{number}" for number in range(20))
    search = WordRuns([short, long, "box, yes", "silver"])
    assert search.found_in(f"He has a silver\nbox. {long.upper()}!") == ["a silver box", "silver", long]
    assert search.found_in(f"a silver boxes; {long.removeprefix('word0 ')}") == ["silver"]
    assert bodies_of('def f(v):\n    """Doc."""\n    return [x * 2 for x in v]\n# end') == bodies_of(
        "def g(items):\n    return [i * 2 for i in items]"
    )
    assert bodies_of("def f(v):\n    return v + 1") != bodies_of("def f(v):\n    return v + 2")


def test_train_rows_do_occur_in_the_pretraining_text() -> None:
    """The search would report a leak: the train part's phrases and functions, which may occur, do."""
    documents = mixture.documents(0)
    answers = WordRuns(row.fields["answer"] for row in split_rows("question_answering", "train"))
    assert len(answers.found_in("".join(documents))) > 1_000
    assert any("def " in passage for document in documents for passage in passages_of(document))


@pytest.mark.parametrize("cycle", range(len(CYCLES)))
@pytest.mark.parametrize("chunk", NORMAL_CHUNKS)
def test_no_held_out_row_is_in_the_pretraining_text(chunk: int, cycle: int, runs: WordRuns, bodies: set[str]) -> None:
    assert faults_of_chunk(CYCLES[cycle].documents(chunk), runs, bodies) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_held_out_row_is_in_any_chunk(runs: WordRuns, bodies: set[str]) -> None:
    """All the text that the shipped weights saw; the run noted how many chunks each cycle took."""
    test_rows = {" ".join(words_of(row.fields["text"])) for row in split_rows("sentiment", "test")}
    assert test_rows.isdisjoint(text for texts in KNOWN_OVERLAP.values() for text in texts)
    counts = json.loads((TINY / "pretraining.json").read_text(encoding="utf-8"))["chunks"]
    assert len(counts) == len(CYCLES)
    faults = {
        (number, chunk): faults_of_chunk(cycle.documents(chunk), runs, bodies)
        for number, (cycle, count) in enumerate(zip(CYCLES, counts, strict=True))
        for chunk in range(count)
    }
    assert {place: found for place, found in faults.items() if found} == KNOWN_OVERLAP


def test_a_chunk_is_the_same_in_every_process() -> None:
    here = "".join(mixture.documents(1))
    program = "import sys; from scripts.tiny_corpus.mixture import documents; sys.stdout.write(''.join(documents(1)))"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        check=True,
    )
    assert hashlib.sha256(other.stdout).hexdigest() == hashlib.sha256(here.encode()).hexdigest()
    assert mixture.documents(2) != mixture.documents(1)


def test_a_chunk_holds_every_domain_and_both_kinds_of_document() -> None:
    documents = mixture.documents(0)
    assert len(documents) == mixture.DOCUMENTS_A_CHUNK
    assert all(document.endswith("<|endoftext|>") for document in documents)
    blocks = sum(document.startswith("<|im_start|>") for document in documents)
    assert 0.4 < blocks / len(documents) < 0.6
    for shares in (mixture.DOMAINS, mixture.PRACTICE):
        assert sum(share for share, _ in shares.values()) == pytest.approx(1)
    assert {match for d in documents for match in re.findall(r"<\|im_start\|>(\w+)\n", d)} == set(mixture.HEADINGS)


def test_the_tokenizer_splits_as_that_of_qwen2_5_does() -> None:
    from tokenizers import Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    saved = json.loads(tokenizer.to_str())
    split, byte_level = saved["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": PRETOKENIZE_REGEX}
    assert (split["type"], split["behavior"], split["invert"]) == ("Split", "Isolated", False)
    assert (byte_level["type"], byte_level["add_prefix_space"], byte_level["use_regex"]) == ("ByteLevel", False, False)
    assert saved["normalizer"] == {"type": "NFC"}
    assert [token["content"] for token in saved["added_tokens"]] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.get_vocab_size(with_added_tokens=True) <= 2048
    assert max(tokenizer.get_vocab(with_added_tokens=True).values()) < 2048


@pytest.mark.parametrize("text", ["Le vieil hôtel n'est pas là.", "def f(n):\n    return n // 2\n", "日本 🙂\t x²  y"])
def test_the_tokenizer_loses_nothing(text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_chat_template_is_that_of_qwen2_5() -> None:
    assert (TINY / "chat_template.jinja").read_text(encoding="utf-8") == trl_template("qwen2_5")
