"""The store changes as a whole or not at all, whoever else works in it, and survives what is broken in it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.runs import BAD_NAMES, CONTRACT, make_run, value_of

from qlora_kit.adapters import (
    AdapterContract,
    AdapterStore,
    check_adapter_folder,
    check_name,
)
from qlora_kit.errors import AdapterError, OutputError


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """An empty store, not yet on disk."""
    return AdapterStore(tmp_path / "adapters")


@pytest.mark.parametrize("name", ["a", "A1", "sentiment-v2_x", "0", "x" * 64])
def test_good_names_are_returned(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names_are_refused_everywhere(store: AdapterStore, tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path / "run")
    store.add(run, "good")
    calls: tuple[Callable[[], object], ...] = (
        lambda: check_name(name),
        lambda: store.add(run, name),
        lambda: store.rename("good", name),
        lambda: store.rename(name, "other"),
        lambda: store.delete(name),
    )
    for call in calls:
        with pytest.raises(AdapterError) as caught:
            call()
        assert "\x00" not in str(caught.value)
    assert [card.name for card in store.list()] == ["good"]
    assert sorted(os.listdir(tmp_path)) == ["adapters", "run"]


def test_add_copies_the_adapters_own_files_only(store: AdapterStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "my-run")
    card = store.add(run)
    assert (card.name, card.task, card.base_model, card.r) == ("my-run", "sentiment", CONTRACT.base.id, 2)
    assert (card.created, card.metrics, card.path) == (CONTRACT.created, {"accuracy": 0.95}, store.root / "my-run")
    expected = {"adapter_config.json", "adapter_model.safetensors", "qlora_kit.json", "config.yaml", "README.md"}
    assert set(os.listdir(card.path)) == expected
    assert card.bytes == sum((run / name).stat().st_size for name in expected)
    for name in expected:
        assert (card.path / name).read_bytes() == (run / name).read_bytes()
    assert store.list() == [card]
    assert store.show("my-run").contract == CONTRACT
    assert store.get("my-run") == card.path
    assert store.get(run) == store.get(str(run)) == run
    check_adapter_folder(card.path)


def test_a_plain_adapter_is_listed_by_what_its_files_say(store: AdapterStore, tmp_path: Path) -> None:
    card = store.add(make_run(tmp_path / "plain", contract=None))
    assert (card.task, card.base_model, card.metrics) == (None, "some/base", {})
    assert store.show("plain").contract is None


def test_a_taken_name_is_refused_unless_replaced(store: AdapterStore, tmp_path: Path) -> None:
    store.add(make_run(tmp_path / "one", value=1), "a")
    two = make_run(tmp_path / "two", value=2)
    with pytest.raises(AdapterError, match="--replace"):
        store.add(two, "a")
    assert value_of(store.get("a")) == 1
    store.add(two, "a", replace=True)
    assert value_of(store.get("a")) == 2
    with pytest.raises(AdapterError, match="only in upper and lower case"):
        store.add(two, "A", replace=True)
    with pytest.raises(AdapterError, match="already the adapter"):
        store.add(store.get("a"), "a", replace=True)
    store.add(store.get("a"), "copy")
    assert sorted(os.listdir(store.root)) == [".lock", "a", "copy"]


def test_what_the_gate_refuses_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    store.add(make_run(tmp_path / "one", value=1), "a")
    with pytest.raises(AdapterError, match="NaN or infinite"):
        store.add(make_run(tmp_path / "bad", value=float("nan")), "a", replace=True)
    linked = make_run(tmp_path / "linked")
    (linked / "README.md").unlink()
    (linked / "README.md").symlink_to("/etc/hostname")
    with pytest.raises(AdapterError, match="symbolic link"):
        store.add(linked, "b")
    assert sorted(os.listdir(store.root)) == [".lock", "a"]
    assert value_of(store.get("a")) == 1


def test_rename_and_add_carry_the_name_in_the_contract(store: AdapterStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", contract=dataclasses.replace(CONTRACT, name="run"))
    path = run / "qlora_kit.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_tomorrow": 1}))
    store.add(run, "first")
    card = store.rename("first", "second")
    assert card.name == "second"
    assert json.loads((card.path / "qlora_kit.json").read_text())["name"] == "second"
    assert json.loads((card.path / "qlora_kit.json").read_text())["of_tomorrow"] == 1
    assert AdapterContract.load(run).name == "run"
    store.rename("second", "SECOND")
    assert [card.name for card in store.list()] == ["SECOND"]
    store.add(run, "third")
    with pytest.raises(AdapterError, match="taken"):
        store.rename("third", "SECOND")
    with pytest.raises(AdapterError, match="taken"):
        store.rename("third", "third")


def test_delete_takes_the_whole_folder_and_nothing_else(store: AdapterStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("a", "b"):
        store.add(run, name)
    store.delete("a")
    assert sorted(os.listdir(store.root)) == [".lock", "b"]
    with pytest.raises(AdapterError, match="no adapter of this name"):
        store.delete("a")


def test_an_unknown_name_gets_the_nearest_one(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="holds no adapters yet"):
        store.get("sentiment")
    store.add(make_run(tmp_path / "run"), "sentiment")
    for call in (store.get, store.show, store.delete):
        with pytest.raises(AdapterError, match="did you mean sentiment"):
            call("sentimant")
    with pytest.raises(AdapterError, match="one of: sentiment"):
        store.get("zzz")
    with pytest.raises(AdapterError, match=r"holds no adapter_config\.json"):
        store.get(tmp_path)
    with pytest.raises(AdapterError):
        store.get("")
    with pytest.raises(AdapterError, match="no such folder"):
        store.add(tmp_path / "none")


def test_broken_entries_are_problems_not_crashes(store: AdapterStore, tmp_path: Path) -> None:
    assert store.list() == []
    run = make_run(tmp_path / "run")
    for name in ("good", "no-weights", "bad-config", "bad-contract"):
        store.add(run, name)
    (store.root / "no-weights" / "adapter_model.safetensors").unlink()
    (store.root / "bad-config" / "adapter_config.json").write_text("{")
    (store.root / "bad-contract" / "qlora_kit.json").write_text('{"format_version": 9}')
    (store.root / "empty").mkdir()
    (store.root / "bad name").mkdir()
    (store.root / "link").symlink_to(run)
    (store.root / "dangling").symlink_to(tmp_path / "none")
    (store.root / "README.md").write_text("not an adapter")
    assert [card.name for card in store.list()] == ["good"]
    whats = " ".join(fault.what for fault in store.problems)
    for name in ("no-weights", "bad-config", "bad-contract", "empty", "bad name", "link", "dangling"):
        assert name in whats
    with pytest.raises(AdapterError, match="symbolic link"):
        store.get("link")
    with pytest.raises(AdapterError, match="symbolic link"):
        store.delete("link")
    assert run.is_dir()
    store.delete("bad-config")


def test_a_killed_replacement_is_finished_by_the_next_reader(store: AdapterStore, tmp_path: Path) -> None:
    store.add(make_run(tmp_path / "run", value=3), "a")
    (store.root / "a").rename(store.root / ".a.0123456789ab.old")
    shutil.copytree(store.root / ".a.0123456789ab.old", store.root / ".a.cdefcdefcdef.partial")
    assert value_of(store.get("a")) == 3
    assert [card.name for card in store.list()] == ["a"]
    assert sorted(os.listdir(store.root)) == [".lock", "a"]


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("1")
    for root in (tmp_path / "file" / "store", Path("/proc/store")):
        with pytest.raises(OutputError, match="cannot be written"):
            AdapterStore(root).add(run)
    with pytest.raises(AdapterError, match="cannot be read"):
        AdapterStore(tmp_path / "file").list()


def _replace_again_and_again(root: Path, run: Path, count: int) -> None:
    for _ in range(count):
        AdapterStore(root).add(run, "a", replace=True)


def test_readers_and_writers_in_many_processes_see_whole_adapters(store: AdapterStore, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"run{value}", value=value) for value in (1, 2)]
    store.add(runs[0], "a")
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_replace_again_and_again, args=(store.root, run, 6)) for run in runs]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        assert [card.name for card in store.list()] == ["a"]
        assert store.problems == ()
        assert store.get("a").name == "a"
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(os.listdir(store.root)) == [".lock", "a"]
    check_adapter_folder(store.get("a"))


def test_changes_wait_for_the_lock(store: AdapterStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    store.add(run, "a")
    with (store.root / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        writer = threading.Thread(target=store.add, args=(run, "b"))
        writer.start()
        writer.join(timeout=0.5)
        assert writer.is_alive()
        assert [card.name for card in store.list()] == ["a"]
    writer.join()
    assert [card.name for card in store.list()] == ["a", "b"]


def test_what_is_replaced_while_it_is_read_is_read_again(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.add(make_run(tmp_path / "old"), "a")
    store.add(make_run(tmp_path / "gone"), "b")
    new = make_run(tmp_path / "new", contract=dataclasses.replace(CONTRACT, task="translation"))
    load, calls = AdapterContract.load, []

    def load_while_others_write(path: Path) -> AdapterContract:
        calls.append(path)
        if len(calls) == 1:
            AdapterStore(store.root).add(new, "a", replace=True)
            AdapterStore(store.root).delete("b")
        return load(path)

    monkeypatch.setattr(AdapterContract, "load", load_while_others_write)
    assert [(card.name, card.task) for card in store.list()] == [("a", "translation")]


def test_listing_imports_neither_torch_nor_numpy(store: AdapterStore, tmp_path: Path) -> None:
    store.add(make_run(tmp_path / "run"), "a")
    program = (
        "import sys; from pathlib import Path; from qlora_kit.adapters import AdapterStore\n"
        "print([card.name for card in AdapterStore(Path(sys.argv[1])).list()])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(store.root)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["['a']", "[]"]


def test_a_thousand_adapters_are_listed_by_name(store: AdapterStore, tmp_path: Path) -> None:
    source = store.add(make_run(tmp_path / "run"), "a0000").path
    for index in range(1, 1000):
        shutil.copytree(source, store.root / f"a{index:04d}")
    assert [card.name for card in store.list()] == [f"a{index:04d}" for index in range(1000)]


def test_folders_that_are_no_adapters_are_neither_replaced_nor_deleted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.csv").write_text("text,label\n")
    store = AdapterStore(tmp_path)  # a slip of the hand: --store .
    with pytest.raises(OutputError, match="did not write the folder"):
        store.add(make_run(tmp_path / "run"), "data", replace=True)
    with pytest.raises(OutputError, match="did not write the folder"):
        store.delete("data")
    assert os.listdir(tmp_path / "data") == ["mine.csv"]


def test_no_adapter_is_called_as_its_base(store: AdapterStore) -> None:
    shipped = Path(__file__).parents[1] / "adapters" / "sentiment"
    store.add(shipped, "a")
    with pytest.raises(AdapterError, match="the name of the adapter's base"):
        store.add(shipped, "Tiny")
    with pytest.raises(AdapterError, match="the name of the adapter's base"):
        store.rename("a", "tiny")


def test_no_adapter_is_called_base(store: AdapterStore, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    store.add(run, "a")
    with pytest.raises(AdapterError, match="the base alone"):
        store.add(run, "base")
    with pytest.raises(AdapterError, match="the base alone"):
        store.rename("a", "Base")
