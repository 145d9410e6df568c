"""No name and no path leads a store out of its folder, into a link, or into anything but a refusal in three parts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from faults.runs import BAD_PATHS, make_run, value_of

from qlora_kit.adapters import AdapterStore, check_adapter_folder, read_adapter
from qlora_kit.errors import AdapterError, OutputError, QloraKitError


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterStore:
    """A store with the adapter ``good``; the current folder holds a file and a loop of links."""
    store = AdapterStore(tmp_path / "adapters")
    store.add(make_run(tmp_path / "run"), "good")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    Path("file").write_text("1")
    Path("loop").symlink_to("loop")
    return store


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path under ``folder`` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(call: Callable[[], object], error: type[QloraKitError] = AdapterError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert all(fault.what and fault.expected and fault.fix for fault in caught.value.faults)
    text = str(caught.value)
    assert text.replace("\n", "").isprintable() and len(text) < 3000
    return text


@pytest.mark.parametrize("path", BAD_PATHS, ids=lambda path: ascii(path[:20]))
def test_bad_paths_are_refused_by_every_verb(store: AdapterStore, tmp_path: Path, path: str) -> None:
    before = tree(tmp_path)
    for call in (store.get, store.show, store.delete):
        refused(lambda call=call: call(path))  # type: ignore[misc]
    refused(lambda: store.rename(path, "other"))
    refused(lambda: store.add(Path(path), "other"))
    if path.casefold() != "good":
        refused(lambda: store.add(tmp_path / "run", path))
        refused(lambda: store.rename("good", path))
    assert tree(tmp_path) == before


def test_there_are_enough_of_them() -> None:
    assert len(set(BAD_PATHS)) >= 50


def test_names_that_differ_in_case_only_collide(store: AdapterStore, tmp_path: Path) -> None:
    for name in ("GOOD", "Good"):
        for replace in (False, True):
            refused(lambda name=name, replace=replace: store.add(tmp_path / "run", name, replace=replace))  # type: ignore[misc]
    assert [card.name for card in store.list()] == ["good"]


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """An adapter that no verb on the store may touch."""
    return make_run(tmp_path / "outside", value=7)


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_in_the_store_is_neither_read_nor_followed(
    store: AdapterStore, tmp_path: Path, outside: Path, dangling: bool
) -> None:
    (store.root / "link").symlink_to(tmp_path / "none" if dangling else outside)
    before = tree(tmp_path)
    for call in (
        lambda: store.get("link"),
        lambda: store.show("link"),
        lambda: store.delete("link"),
        lambda: store.rename("link", "other"),
        lambda: store.add(tmp_path / "run", "link"),
        lambda: store.add(tmp_path / "run", "link", replace=True),
        lambda: store.rename("good", "link"),
    ):
        refused(call)
    assert tree(tmp_path) == before
    assert [card.name for card in store.list()] == ["good"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "qlora_kit.json"])
def test_a_link_inside_an_adapter_is_neither_read_nor_written_through(
    store: AdapterStore, tmp_path: Path, outside: Path, name: str
) -> None:
    (store.root / "good" / name).unlink()
    (store.root / "good" / name).symlink_to(outside / name)
    before = tree(tmp_path)
    refused(lambda: store.show("good"))
    refused(lambda: store.rename("good", "other"))
    refused(lambda: store.add(store.root / "good", "copy"))
    refused(lambda: read_adapter(lambda: store.get("good"), lambda *found: None))
    assert tree(tmp_path) == before
    assert store.list() == []
    store.delete("good")
    assert tree(outside) == {path.removeprefix("outside/"): v for path, v in before.items() if "outside/" in path}


@pytest.mark.parametrize("name", ["README.md", "config.yaml"])
@pytest.mark.parametrize("when", ["before", "while it is copied"])
def test_links_among_the_other_files_are_not_published(
    store: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    (tmp_path / "secret").write_text("secret")
    run = tmp_path / "run"

    def swap() -> None:
        (run / name).unlink()
        (run / name).symlink_to(tmp_path / "secret")

    if when == "before":
        swap()
    else:
        from qlora_kit.adapters import store as module

        look = module.require_regular_file

        def look_then_swap(path: Path) -> None:
            look(path)
            if path == run / name:
                swap()

        monkeypatch.setattr(module, "require_regular_file", look_then_swap)
    refused(lambda: store.add(run, "new"), QloraKitError)
    assert sorted(os.listdir(store.root)) == [".lock", "good"]


def test_folders_outside_are_allowed_where_they_are_named(store: AdapterStore, tmp_path: Path, outside: Path) -> None:
    """By ``get`` and ``show``, through links and dots too: the user said so. The store's own verbs take names only."""
    (tmp_path / "way").symlink_to(tmp_path)
    for path in (outside, tmp_path / "way" / "outside", tmp_path / "run" / ".." / "outside", Path("../outside")):
        assert store.get(str(path)) == store.get(path) == outside
        assert store.show(str(path)).card.path == outside
        check_adapter_folder(path)
        refused(lambda path=path: store.delete(str(path)))  # type: ignore[misc]
        refused(lambda path=path: store.rename(str(path), "other"))  # type: ignore[misc]
    assert value_of(store.add(tmp_path / "way" / "outside").path) == 7


def test_the_store_may_be_a_link_and_its_name_wins_over_a_folder(store: AdapterStore, tmp_path: Path) -> None:
    (tmp_path / "other-name").symlink_to(store.root)
    assert [card.name for card in AdapterStore(tmp_path / "other-name").list()] == ["good"]
    shutil.copytree(tmp_path / "run", "good")
    assert store.get("good") == store.root / "good"
    assert store.get("./good") == Path("good").resolve()


@pytest.mark.parametrize("root", ["file", "file/below", "loop", "loop/below", "x" * 300])
def test_a_store_that_is_no_folder_is_refused(store: AdapterStore, tmp_path: Path, root: str) -> None:
    broken = AdapterStore(Path(root))
    refused(lambda: broken.add(tmp_path / "run"), OutputError)
    for call in (broken.list, lambda: broken.get("a"), lambda: broken.show("a")):
        refused(call)
    for change in (lambda: broken.delete("a"), lambda: broken.rename("a", "b")):
        refused(change, QloraKitError)


def test_hidden_and_partial_folders_are_no_adapters(store: AdapterStore, tmp_path: Path) -> None:
    names = [".hidden", ".a.0123456789ab.partial", ".good.0123456789ab.partial", ".good.0123456789ab.old"]
    for name in names:
        shutil.copytree(tmp_path / "run", store.root / name)
    assert [card.name for card in store.list()] == ["good"]
    for name in names:
        refused(lambda name=name: store.get(name))  # type: ignore[misc]
        refused(lambda name=name: store.delete(name))  # type: ignore[misc]
    store.add(tmp_path / "run", "new")
    assert sorted(os.listdir(store.root)) == [".hidden", ".lock", "good", "new"]


def test_a_lock_that_is_a_link_or_a_folder_is_refused(store: AdapterStore, tmp_path: Path) -> None:
    (store.root / ".lock").unlink()
    (tmp_path / "victim").write_text("1")
    (store.root / ".lock").symlink_to(tmp_path / "victim")
    refused(lambda: store.add(tmp_path / "run", "new"), OutputError)
    (store.root / ".lock").unlink()
    (store.root / ".lock").mkdir()
    refused(lambda: store.delete("good"), OutputError)
    assert (tmp_path / "victim").read_text() == "1"
    assert [card.name for card in store.list()] == ["good"]
