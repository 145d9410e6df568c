"""The server follows its store: what is added appears through the gate, bad ones stay out, the rest go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.runs import make_run
from live_server import LiveServer, serving
from scripted_engine import ScriptedEngine, wait_until

from qlora_kit.adapters import AdapterStore
from qlora_kit.errors import AdapterError


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    found = AdapterStore(tmp_path / "store")
    found.add(make_run(tmp_path / "run"), "first")
    return found


@pytest.fixture
def live(store: AdapterStore) -> Iterator[LiveServer]:
    with serving(ScriptedEngine(store.root), store.root) as server:
        yield server


def served(live: LiveServer) -> list[str]:
    return [model["id"] for model in live.send("GET", "/v1/models").json["data"]]


def status_of(live: LiveServer, model: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "Good soup."}]}
    return live.post("/v1/chat/completions", body).status


def test_an_adapter_that_is_added_renamed_or_deleted_is_followed(
    live: LiveServer, store: AdapterStore, tmp_path: Path
) -> None:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)
    assert status_of(live, "second") == 404
    store.add(tmp_path / "run", "second")
    live.watcher.sync()
    assert served(live) == ["base", "first", "second"]
    assert status_of(live, "second") == 200
    store.rename("second", "third")
    live.watcher.sync()
    assert (served(live), engine.loaded) == (["base", "first", "third"], ["first", "third"])
    store.delete("first")
    live.watcher.sync()
    assert (served(live), engine.loaded) == (["base", "third"], ["third"])
    assert status_of(live, "first") == 404


def test_a_replaced_adapter_is_loaded_again_and_an_untouched_one_is_not(
    live: LiveServer, store: AdapterStore, tmp_path: Path
) -> None:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)
    store.add(tmp_path / "run", "second")
    live.watcher.sync()
    live.watcher.sync()
    assert engine.versions == {"first": 1, "second": 1}
    changed = make_run(tmp_path / "changed", value=2.0)
    store.add(changed, "second", replace=True)
    live.watcher.sync()
    assert engine.versions == {"first": 1, "second": 2}


def test_bad_entries_are_logged_once_and_left_out(
    live: LiveServer, store: AdapterStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = store.root
    make_run(tmp_path / "bad")
    (tmp_path / "bad" / "adapter_model.safetensors").write_bytes(b"not a tensor")
    shutil.copytree(tmp_path / "bad", root / "damaged")
    (root / "empty").mkdir()
    (root / "linked").symlink_to(tmp_path / "run")
    shutil.copytree(tmp_path / "run", root / "no name!")
    shutil.copytree(tmp_path / "run", root / "base")  # the name of the base itself
    (root / "a file").write_text("")
    for _ in range(3):
        live.watcher.sync()
    assert served(live) == ["base", "first"]
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(told) == 5
    assert all(sum(name in message for message in told) >= 1 for name in ("damaged", "empty", "linked", "no name!"))
    assert status_of(live, "first") == 200
    for model in ("damaged", "empty", "linked", "no name!"):
        assert status_of(live, model) == 404
    shutil.copy(tmp_path / "run" / "adapter_model.safetensors", root / "damaged")
    live.watcher.sync()
    assert served(live) == ["base", "damaged", "first"]


def test_an_adapter_that_goes_bad_behind_the_gate_is_let_go(
    live: LiveServer, store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = live.service.engine
    assert isinstance(engine, ScriptedEngine)

    def gone(*_: object) -> None:
        raise AdapterError("it is gone", expected="x", fix="x")

    shutil.copytree(tmp_path / "run", store.root / "second")
    monkeypatch.setattr(AdapterStore, "show", gone)  # after the engine has loaded it
    live.watcher.sync()
    assert served(live) == ["base", "first"]
    assert engine.versions["second"] == 1
    assert engine.loaded == ["first"]


def test_an_adapter_whose_files_go_bad_is_left_out_until_they_are_good(live: LiveServer, store: AdapterStore) -> None:
    config = store.root / "first" / "adapter_config.json"
    good = config.read_text()
    config.write_text(json.dumps({**json.loads(good), "r": 3}))
    live.watcher.sync()
    assert served(live) == ["base"]
    config.write_text(good)
    live.watcher.sync()
    assert served(live) == ["base", "first"]


def test_the_store_is_looked_at_again_and_again(live: LiveServer, store: AdapterStore, tmp_path: Path) -> None:
    live.watcher.start()
    store.add(tmp_path / "run", "second")
    wait_until(lambda: "second" in served(live), "the adapter appears")
    shutil.rmtree(store.root)
    wait_until(lambda: served(live) == ["base"], "the store is gone")
    store.add(tmp_path / "run", "third")
    wait_until(lambda: served(live) == ["base", "third"], "there is a store again")
    live.watcher.stop()
