"""Processes that work in one store at once, or are killed in it: each adapter is there whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from faults.runs import make_run, value_of

from qlora_kit.adapters import AdapterStore, check_adapter_folder, read_adapter
from qlora_kit.errors import AdapterError

STRESS_SECONDS = float(os.environ.get("QLORA_KIT_STRESS_SECONDS", "1"))
KILLS = int(os.environ.get("QLORA_KIT_STRESS_KILLS", "6"))
WRITER = """
import sys
from pathlib import Path
from qlora_kit.adapters import AdapterStore
store, runs, way = AdapterStore(Path(sys.argv[1])), [Path(path) for path in sys.argv[3:]], sys.argv[2]
print("ready", flush=True)
while True:
    for run in runs:
        store.add(run, "a", replace=True)
        if way == "add":
            store.delete("a")
        elif way == "rename":
            store.rename("a", "b")
            store.rename("b", "a")
"""


def make_marked(folder: Path, value: int) -> Path:
    """A run whose weights, configuration and contract all carry ``value``."""
    make_run(folder, value=value)
    for name, key in (("adapter_config.json", "lora_alpha"), ("qlora_kit.json", "metrics")):
        content = json.loads((folder / name).read_text())
        content[key] = value if key == "lora_alpha" else {"accuracy": value}
        (folder / name).write_text(json.dumps(content))
    return folder


def read_value(store: AdapterStore, name: str) -> float | None:
    """The value of the adapter if it was read; it must be the same in all of its files."""
    import numpy as np

    try:
        adapter = read_adapter(lambda: store.get(name), lambda *found: None)
    except AdapterError:
        return None
    assert adapter.contract is not None
    factors = next(tensor for key, tensor in adapter.tensors.items() if "lora_A" in key)
    values = {adapter.files.config.lora_alpha, adapter.contract.metrics["accuracy"], *np.frombuffer(factors, "<f4")}
    assert len(values) == 1, f"{name} is mixed from several adapters: {values}"
    return float(values.pop())


def _add(root: Path, run: Path, start: Event, won: multiprocessing.SimpleQueue) -> None:
    start.wait()
    try:
        AdapterStore(root).add(run, "a")
    except AdapterError as error:
        won.put(str(error))
    else:
        won.put(run.name)


def test_of_several_processes_that_add_one_name_one_wins(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    start, won = spawn.Event(), spawn.SimpleQueue()
    runs = [make_marked(tmp_path / f"run{value}", value) for value in (1, 2, 3)]
    processes = [spawn.Process(target=_add, args=(tmp_path / "adapters", run, start, won)) for run in runs]
    for process in processes:
        process.start()
    start.set()
    answers = [won.get() for _ in processes]
    for process in processes:
        process.join()
    names = [answer for answer in answers if answer.startswith("run")]
    assert len(names) == 1
    assert sum("the name is taken" in answer for answer in answers) == 2
    store = AdapterStore(tmp_path / "adapters")
    assert value_of(store.get("a")) == float(names[0][-1]) == read_value(store, "a")


def _change_until(root: Path, runs: list[Path], stop: Event, seed: int) -> None:
    store, rng = AdapterStore(root), random.Random(seed)
    while not stop.is_set():
        name, other = rng.sample(["a", "b"], 2)
        try:
            how = rng.randrange(5)
            if how <= 1:
                store.add(rng.choice(runs), name, replace=True)
            elif how == 2:
                store.add(rng.choice(runs), name)
            elif how == 3:
                store.delete(name)
            else:
                store.rename(name, other)
        except AdapterError:
            pass  # taken, or gone already


def test_readers_get_whole_adapters_while_others_add_replace_rename_and_delete(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    store, stop = AdapterStore(tmp_path / "adapters"), spawn.Event()
    runs = [make_marked(tmp_path / f"run{value}", value) for value in (1, 2, 3)]
    processes = [spawn.Process(target=_change_until, args=(store.root, runs, stop, seed)) for seed in (0, 1)]
    for process in processes:
        process.start()
    seen: list[float | None] = []
    try:
        while {1.0, 2.0, 3.0} - set(seen) and all(process.is_alive() for process in processes):
            seen.append(read_value(store, "a"))
        end = time.monotonic() + STRESS_SECONDS
        while time.monotonic() < end:
            seen += [read_value(store, "a"), read_value(store, "b")]
            listing = store.scan()
            assert listing.problems == ()
            assert {card.name for card in listing.cards} <= {"a", "b"}
    finally:
        stop.set()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    print(f"{len(seen)} reads, {sum(value is None for value in seen)} refused")
    assert set(os.listdir(store.root)) <= {".lock", "a", "b"}


@pytest.mark.parametrize("way", ["add", "replace", "rename"])
def test_a_kill_at_any_moment_leaves_old_or_new_and_the_next_change_cleans_up(tmp_path: Path, way: str) -> None:
    runs = [make_marked(tmp_path / f"run{value}", value) for value in (1, 2)]
    store, rng = AdapterStore(tmp_path / "adapters"), random.Random(0)
    command = [sys.executable, "-c", WRITER, str(store.root), way, *map(str, runs)]
    for _ in range(max(1, KILLS // 3)):
        store.add(runs[0], "a", replace=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.02, 0.12))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        listing = store.scan()
        assert listing.problems == ()
        names = [card.name for card in listing.cards]
        assert names in {"add": ([], ["a"]), "replace": (["a"],), "rename": (["a"], ["b"])}[way]
        for name in names:
            check_adapter_folder(store.get(name))
            assert read_value(store, name) in (1.0, 2.0)
        store.add(runs[0], "c", replace=True)
        assert sorted(os.listdir(store.root)) == [".lock", *names, "c"]
        for name in (*names, "c"):
            store.delete(name)
