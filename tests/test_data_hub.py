"""Data sets of the Hub, read from a small Hub on this machine, from the cache it leaves, and from a made-up one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import COMMIT, PLAIN, TURNS, card, jsonl

from qlora_kit.data.hub import HubSource, ResolvedHubSource, read_hub_rows, resolve
from qlora_kit.data.ledger import Problem
from qlora_kit.data.reading import Note, Row
from qlora_kit.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
OTHER_COMMIT = "b" * 40


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The cache folder and the answers of a process that read everything from the small Hub.

    Its current folder holds a data set of the same name, which `datasets` alone would take, and a secret.
    """
    folder = tmp_path_factory.mktemp("hub")
    (folder / "org" / "plain").mkdir(parents=True)
    (folder / "org" / "plain" / "train.jsonl").write_bytes(jsonl([{"prompt": "local", "completion": "file"}]))
    (folder / "secret.jsonl").write_bytes(jsonl([{"prompt": "secret", "completion": "file"}]))
    names = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_ENDPOINT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"HF_HOME": str(folder / "home"), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, str(ROOT / "tests" / "fake_hub.py")]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder / "home", json.loads(process.stdout)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, for this process."""
    return use_cache(tmp_path / "home", monkeypatch)


def use_cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    return home / "hub"


def put_snapshot(cache: Path, name: str, files: dict[str, bytes], *, ref: str = "main") -> None:
    """A downloaded data set as `huggingface_hub` lays it out."""
    repository = cache / f"datasets--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(OTHER_COMMIT)
    for path, content in files.items():
        blob = repository / "blobs" / hashlib.sha1(content).hexdigest()
        link = repository / "snapshots" / OTHER_COMMIT / path
        for target in (blob, link):
            target.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)


def rows_of(items: list[Any]) -> list[dict[str, Any]]:
    return [item.values for item in items if isinstance(item, Row)]


def only_problem(source: HubSource) -> Problem:
    items = list(read_hub_rows(source))
    assert len(items) == 1
    assert isinstance(items[0], Problem)
    assert items[0].stops
    return items[0]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("plain", PLAIN),
        ("rows", PLAIN[:2]),
        ("slice", PLAIN[1:3]),
        ("joined", PLAIN[:1] + PLAIN),
        ("commit", PLAIN),
        ("stream", PLAIN),
        ("stream of 2", PLAIN[:2]),
        ("subset", [{"text": "un"}]),
        ("labels", [{"text": "a", "label": "positive"}, {"text": "b", "label": None}]),
        ("turns", [{"messages": TURNS}]),
        ("streamed turns", [{"messages": TURNS}]),
        ("unreachable", PLAIN),
    ],
)
def test_rows_of_the_hub(hub_home: tuple[Path, dict[str, Any]], name: str, rows: list[dict[str, Any]]) -> None:
    read = [item for item in hub_home[1][name] if item["kind"] != "Note"]
    assert [(item["kind"], item["line"], item["values"]) for item in read] == [
        ("Row", line, values) for line, values in enumerate(rows, start=1)
    ]


@pytest.mark.parametrize(
    ("name", "reason", "expected"),
    [
        ("no split", "there is no split 'valid'", "one of train, validation"),
        ("no stream split", "there is no split 'valid'", "one of train, validation"),
        ("bad slice", "Unrecognized instruction format: train[:x]", "one of the splits train, validation"),
        ("no revision", "org/plain has no revision 'v9'", "a branch, tag or commit"),
        ("missing", "the Hub has no data set org/missing", "a public id"),
        ("gated", "org/gated is gated", "a token"),
        ("which subset", "the data set has several subsets", "one of en, fr"),
        ("no subset", "there is no subset 'fe'", "one of en, fr"),
        ("script", "a script of its own, which is never run", "data files"),
        ("outside", "Data files don't belong to org/outside", ""),
        ("images", "columns that hold no text: image (Image)", "text"),
        ("streamed images", "columns that hold no text: image (Image)", "text"),
        ("columns", "its files cannot be read: Couldn't cast b: string", "one shape"),
        ("empty", "the split holds no row", "at least one row"),
        ("unreachable tag", f"the cache holds commit {COMMIT}", "revision v9"),
        ("unreachable and unknown", "the Hub cannot be reached (Couldn't reach 'org/never'", "a network connection"),
    ],
)
def test_faults_of_the_hub(hub_home: tuple[Path, dict[str, Any]], name: str, reason: str, expected: str) -> None:
    [problem] = hub_home[1][name]
    assert problem["kind"] == "Problem"
    assert reason in problem["reason"]
    assert expected in problem["expected"]
    assert problem["stops"] is True
    assert problem["line"] is None


def test_what_is_changed_is_told(hub_home: tuple[Path, dict[str, Any]]) -> None:
    notes = [item["text"] for name in ("labels", "turns", "unreachable") for item in hub_home[1][name][:1]]
    assert notes == [
        "hub:org/labels/train: column 'label': the class numbers are read as their names (negative, positive)",
        "hub:org/turns/train: column 'messages': the lists of each key are read as one list of turns",
        f"hub:org/plain/train: read without the Hub, from the local cache, at commit {COMMIT}",
    ]
    assert not [item for item in hub_home[1]["plain"] if item["kind"] == "Note"]


def test_a_broken_stream_says_after_which_row(hub_home: tuple[Path, dict[str, Any]]) -> None:
    *rows, problem = hub_home[1]["broken stream"]
    assert [row["values"] for row in rows] == PLAIN
    assert problem["reason"].startswith("the rows broke off after row 5: ")
    assert (problem["line"], problem["stops"]) == (6, True)
    *rows, problem = hub_home[1]["streamed columns"]
    assert [row["values"] for row in rows] == [{"a": 1}]
    assert problem["reason"].startswith("cannot be read behind row 1: Couldn't cast")
    assert hub_home[1]["resolved"] == COMMIT


def test_offline_after_a_run_online(hub_home: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    use_cache(hub_home[0], monkeypatch)
    source = HubSource("org/plain")
    resolved = resolve(source)
    assert resolved == ResolvedHubSource(source, COMMIT)
    items = list(read_hub_rows(resolved))
    assert isinstance(items[0], Note)
    assert COMMIT in items[0].text
    assert rows_of(items) == PLAIN
    for streaming in (False, True):  # of this data set not all files were downloaded, but the subset's rows are cached
        subset = HubSource("org/subsets", subset="fr", streaming=streaming)
        assert rows_of(list(read_hub_rows(subset))) == [{"text": "un"}]
    assert f"the cache holds commit {COMMIT}" in only_problem(HubSource("org/plain", revision=OTHER_COMMIT)).reason


@pytest.mark.parametrize("streaming", [False, True])
def test_downloaded_files_are_read_offline(cache: Path, streaming: bool) -> None:
    """`datasets` alone finds nothing here: it does not look into the Hub's own cache of files."""
    import datasets

    put_snapshot(cache, "org/name", {"train.jsonl": jsonl(PLAIN)})
    with pytest.raises(ConnectionError):
        datasets.load_dataset("org/name", split="train")
    source = HubSource("org/name", streaming=streaming, rows=3)
    assert resolve(source).commit == OTHER_COMMIT
    for revision in (None, "main", OTHER_COMMIT):
        items = list(read_hub_rows(HubSource("org/name", streaming=streaming, rows=3, revision=revision)))
        assert rows_of(items) == PLAIN[:3]
        assert [item.line for item in items if isinstance(item, Row)] == [1, 2, 3]
    assert "not in the cache" in only_problem(HubSource("org/name", revision=COMMIT)).reason
    assert "not in the cache" in only_problem(HubSource("org/name", revision="v2")).reason


def test_a_local_folder_of_the_same_name_is_not_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_bytes(jsonl(PLAIN))
    monkeypatch.chdir(tmp_path)
    assert len(datasets.load_dataset("org/name", split="train")) == len(PLAIN)
    problem = only_problem(HubSource("org/name"))
    assert "not in the cache" in problem.reason
    assert problem.fix.startswith("run `hf download org/name --repo-type dataset`")
    with pytest.raises(DataError, match="not in the cache"):
        resolve(HubSource("org/name"))


@pytest.mark.parametrize("pattern", ["{folder}/secret.jsonl", "../../../../../secret.jsonl"])
def test_a_card_cannot_name_files_of_this_machine(cache: Path, tmp_path: Path, pattern: str) -> None:
    import datasets

    (tmp_path / "secret.jsonl").write_bytes(jsonl([{"text": "secret"}]))
    put_snapshot(cache, "org/name", {"README.md": card(default=pattern.format(folder=tmp_path))})
    snapshot = cache / "datasets--org--name" / "snapshots" / OTHER_COMMIT
    assert datasets.load_dataset(str(snapshot), split="train")[0] == {"text": "secret"}
    assert "outside the repository" in only_problem(HubSource("org/name")).reason


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (HubSource("json"), "is no data set's id"),  # a file reader of `datasets`
        (HubSource("imagefolder"), "is no data set's id"),  # would read the current folder
        (HubSource("buckets/name"), "is no data set's id"),
        (HubSource("../org"), "is no data set's id"),
        (HubSource("org/../name"), "is no data set's id"),
        (HubSource("/org/name"), "is no data set's id"),
        (HubSource("org/name\n"), "is no data set's id"),
        (HubSource("org/a--b"), "is no data set's id"),
        (HubSource("org/name.py"), "is no data set's id"),
        (HubSource("org/name", revision="../../main"), "is no revision"),
        (HubSource("org/name", revision=""), "is no revision"),
        (HubSource("org/name", subset=".."), "is no subset"),
        (HubSource("org/name", subset="a/b"), "is no subset"),
        (HubSource("org/name", rows=0), "rows is 0"),
        (HubSource("org/name", split="train[:10]", streaming=True), "a stream has no slices"),
    ],
)
def test_sources_that_cannot_be_meant(cache: Path, source: HubSource, reason: str) -> None:
    assert reason in only_problem(source).reason


def test_name_and_hash_say_what_is_read() -> None:
    assert HubSource("org/name").name == "hub:org/name/train"
    source = HubSource("org/name", split="train[:9]", revision="v1", subset="en")
    assert source.name == "hub:org/name@v1[en]/train[:9]"
    one = ResolvedHubSource(HubSource("org/name"), COMMIT)
    others = [
        ResolvedHubSource(HubSource("org/name2"), COMMIT),
        ResolvedHubSource(HubSource("org/name"), OTHER_COMMIT),
        ResolvedHubSource(HubSource("org/name", subset="en"), COMMIT),
        ResolvedHubSource(HubSource("org/name", split="test"), COMMIT),
        ResolvedHubSource(HubSource("org/name", rows=5), COMMIT),
    ]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 6
    assert ResolvedHubSource(HubSource("org/name", streaming=True, revision="main"), COMMIT).sha256 == one.sha256


def test_a_config_trains_on_the_hub_at_one_commit(
    cache: Path, tmp_path: Path, chatml_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_kit.config import load_config
    from qlora_kit.data.token_cache import TokenCache
    from qlora_kit.data.tokenised_data import tokenised_data

    put_snapshot(cache, "org/chats", {"train.jsonl": jsonl(PLAIN)})
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "name: t\ntask: translation\ndata:\n  train:\n    - {hub: org/chats, rows: 3}\n", encoding="utf-8"
    )
    data = tokenised_data(load_config("run.yaml"), chatml_tokenizer, cache=TokenCache(tmp_path / "tokens"))
    data.require_usable()
    assert data.train is not None
    assert len(data.train) == 3
    (file,) = data.ledger.data_files("train")
    source = HubSource("org/chats", rows=3)
    assert (file.sha256, file.rows) == (ResolvedHubSource(source, OTHER_COMMIT).sha256, 3)
    assert file.name == f"hub:org/chats@{OTHER_COMMIT}/train"
    assert any(OTHER_COMMIT in note for note in data.report.notes)
    unknown = load_config("run.yaml", ["data.train=[{hub: org/unknown}]"])
    (problem,) = tokenised_data(unknown, chatml_tokenizer, cache=TokenCache(tmp_path / "tokens")).stopping
    assert problem.file == "hub:org/unknown/train"
