"""Watches the adapter store: what is added appears through the gate, what is replaced is reloaded, what goes leaves."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from qlora_kit.adapters import CONTRACT_FILE, AdapterDetails, AdapterStore
from qlora_kit.adapters.gate import CONFIG_FILE, WEIGHTS_FILE
from qlora_kit.errors import AdapterError
from qlora_kit.regular_file import folder_identity
from qlora_kit.server.protocol import ServedEngine
from qlora_kit.server.served_models import ServedModels

POLL_SECONDS = 1.0
_log = logging.getLogger(__name__)
_FILES = (WEIGHTS_FILE, CONFIG_FILE, CONTRACT_FILE)
# Of the folder and of its three files; changes with any of them.
_Identity = tuple[object, ...]


class StoreWatcher:
    """Keeps the engine and the list of models as the store is, by looking at it every second.

    Looking costs a few file attributes for each adapter; only what changed is read. An adapter that does not pass the
    gate is logged once and left out until its files change.
    """

    def __init__(self, store: AdapterStore, engine: ServedEngine, models: ServedModels) -> None:
        self._store = store
        self._engine = engine
        self._models = models
        self._seen: dict[str, _Identity] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="store-watcher", daemon=True)

    def sync(self) -> None:
        """Look once, and take over what changed."""
        served = dict(self._models.adapters)
        present = self._present()
        for name in self._seen.keys() - present.keys():
            if self._is_gone(name):
                self._drop(name, served)
                self._seen.pop(name)
                _log.info("%s: gone from the store", name)
        for name, identity in present.items():
            if self._seen.get(name) != identity:
                self._take(name, served)
                self._seen[name] = identity
                self._models.set(served)
        self._models.set(served)

    def start(self) -> None:
        """Look again and again, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            try:
                self.sync()
            except OSError as error:
                _log.warning("the store cannot be looked at: %s", error.strerror)

    def _present(self) -> dict[str, _Identity]:
        try:
            with os.scandir(self._store.root) as entries:
                names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
        except FileNotFoundError:
            names = []
        return {name: _identity(self._store.root / name) for name in names}

    def _is_gone(self, name: str) -> bool:
        """While an adapter is replaced there is a moment without it, which the store's own look waits out."""
        try:
            self._store.get(name)
        except AdapterError:
            return True
        return False

    def _take(self, name: str, served: dict[str, AdapterDetails]) -> None:
        """Load an adapter that is new or changed; one that cannot be used leaves."""
        try:
            if name == self._models.base:
                what = f"{name}: the adapter has the base's name"
                raise AdapterError(what, expected="another name", fix="rename it: qlora-kit adapters rename")
            self._engine.load(name)
            served[name] = self._store.show(name)
        except AdapterError as error:
            _log.warning("left out: %s", error.faults[0])
            self._drop(name, served)
        else:
            _log.info("%s: served", name)

    def _drop(self, name: str, served: dict[str, AdapterDetails]) -> None:
        if served.pop(name, None) is not None:
            self._models.set(served)  # before the engine forgets it, so that no request is sent to it any more
        self._engine.unload(name)  # it may have been loaded, and not been served yet


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() or entry.is_symlink()


def _identity(folder: Path) -> _Identity:
    parts: list[object] = [folder_identity(folder)]
    for name in _FILES:
        try:
            status = os.lstat(folder / name)
        except OSError:
            parts.append(None)
        else:
            parts.append((status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(parts)
