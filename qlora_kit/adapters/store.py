"""The adapter store: a folder of adapter folders, published whole through the gate, listed without reading weights."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from qlora_kit.adapters.card import AdapterCard, AdapterDetails, own_files, read_details
from qlora_kit.adapters.contract import AdapterContract
from qlora_kit.adapters.contract_file import CONTRACT_FILE, read_contract_json, write_contract_json
from qlora_kit.adapters.gate import CONFIG_FILE, WEIGHTS_FILE, check_adapter_folder, require_regular_file
from qlora_kit.adapters.names import check_name, is_name, require_unambiguous
from qlora_kit.atomic import (
    atomic_directory,
    discard_directory,
    moved_aside_names,
    recover_leftovers,
    require_own_folder,
)
from qlora_kit.errors import AdapterError, Fault, OutputError
from qlora_kit.regular_file import folder_identity, open_regular
from qlora_kit.safetensors_header import shown
from qlora_kit.suggest import like

DEFAULT_STORE = Path("adapters")
MAX_TEXT_BYTES = 16_000_000
LOCK_FILE = ".lock"


@dataclass(frozen=True)
class StoreListing:
    """Every entry of a store: the adapters by name, and what is wrong with the entries that cannot be used."""

    cards: tuple[AdapterCard, ...]
    problems: tuple[Fault, ...]


# `list` means the method inside the class.
_Cards = list[AdapterCard]
_Names = list[str]


class AdapterStore:
    """The adapters in the folder ``root``, which need not exist until the first one is added.

    Changes are atomic and exclude each other across processes: a reader sees an adapter whole or not at all.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def scan(self) -> StoreListing:
        """Every entry of the store, by name; an entry that cannot be read is a problem, never an exception."""
        cards: list[AdapterCard] = []
        problems: list[Fault] = []
        for name in self._entries():
            path = self.root / name
            try:
                check_name(name)
                self._refuse_link(path)
                details = self._details(path)
                if details is not None:
                    cards.append(details.card)
            except AdapterError as error:
                problems.extend(error.faults)
        return StoreListing(tuple(cards), tuple(problems))

    def names(self) -> _Names:
        """Names of the folders in the store, sorted; nothing in them is read."""
        return [name for name in self._entries() if is_name(name)]

    def list(self) -> _Cards:
        """The cards of all usable adapters, by name; ``problems`` tells of the others."""
        return [*self.scan().cards]

    @property
    def problems(self) -> tuple[Fault, ...]:
        """What is wrong with the entries that ``list`` leaves out."""
        return self.scan().problems

    def get(self, name_or_folder: str | Path) -> Path:
        """The folder of an adapter, given by its name in the store or as a folder anywhere; the store's name wins.

        Its files are not checked here: ``check_adapter_folder`` does it before a load.

        Raises:
            AdapterError: Neither is there; the nearest names are suggested.
        """
        text = str(name_or_folder)
        if isinstance(name_or_folder, str) and is_name(text):
            path = self.root / text
            if os.path.isdir(path) or text in self._entries():
                self._refuse_link(path)
                return path
        folder = Path(name_or_folder)
        if text and os.path.isdir(folder):  # never raises, whatever the text
            if (folder / CONFIG_FILE).is_file():
                return folder.resolve()
            what = f"{folder}: the folder holds no {CONFIG_FILE}"
            raise AdapterError(what, expected="an adapter's folder", fix="give the folder that training wrote")
        raise self._unknown(text)

    def show(self, name_or_folder: str | Path) -> AdapterDetails:
        """Card and contract of one adapter.

        Raises:
            AdapterError: It is not there, or its files cannot be read.
        """
        details = self._details(self.get(name_or_folder))
        if details is None:
            raise self._unknown(str(name_or_folder))
        return details

    def add(
        self,
        run_folder: Path,
        name: str | None = None,
        *,
        replace: bool = False,
        contract: AdapterContract | None = None,
        omit: Collection[str] = (),
    ) -> AdapterCard:
        """Publish the adapter in ``run_folder``: copy its own files, check the copy, and only then let it appear.

        Args:
            run_folder: What training wrote, or any PEFT adapter folder; it stays as it is.
            name: Its name in the store; the folder's name by default.
            replace: Replace the adapter of that name.
            contract: Takes the place of the folder's own; with it, an adapter of this store may replace itself.
            omit: Names of files that are not copied.

        Raises:
            AdapterError: The adapter does not pass the gate, or the name is not allowed or taken.
            OutputError: The store cannot be written to.
        """
        run_folder = Path(run_folder)
        name = self._name_for(run_folder, name)
        check_adapter_folder(run_folder)
        with self._locked():
            self._refuse_link(self.root / name)
            itself = self._holds(run_folder, name)
            self._refuse_collision(name, replace=replace or (itself and contract is not None))
            _refuse_name_of_base(name, run_folder, contract)
            if itself and contract is None:
                what = f"{run_folder}: is already the adapter {name!r} of this store"
                fix = "give another name with --name"
                raise AdapterError(what, expected="a folder outside, or another name", fix=fix)
            self._require_adapter(name)
            with atomic_directory(self.root / name, overwrite=replace or itself) as temporary:
                _copy_own_files(run_folder, temporary, omit=omit)
                if contract is None:
                    _set_contract_name(temporary, name)
                else:
                    contract.save(temporary)
                check_adapter_folder(temporary)  # the copy counts: the source may have changed meanwhile
            return read_details(self.root / name).card

    def require_place(self, folder: Path, name: str | None = None, *, replace: bool = False) -> str:
        """The name that ``add`` would give ``folder``, checked before long work for it; nothing is held.

        Args:
            folder: An adapter's folder; one of this store may replace itself.
            name: Its name in the store; the folder's name by default.
            replace: Whether another adapter of that name may be replaced.

        Raises:
            AdapterError: There is no such folder, or the name is not allowed or taken.
            OutputError: The store cannot be written to.
        """
        name = self._name_for(folder, name)
        with self._locked():
            self._refuse_collision(name, replace=replace or self._holds(folder, name))
        return name

    def _holds(self, folder: Path, name: str) -> bool:
        """Whether ``folder`` is the adapter ``name`` of this store."""
        target = self.root / name
        return target.is_dir() and target.samefile(folder)

    def _name_for(self, folder: Path, name: str | None) -> str:
        if not os.path.isdir(folder):  # never raises, whatever the name
            raise self._unknown(str(folder))
        return check_name(folder.resolve().name if name is None else name)

    def rename(self, old: str, new: str) -> AdapterCard:
        """Give the adapter ``old`` the name ``new``, in its contract too.

        Raises:
            AdapterError: ``old`` is not in the store or broken, or ``new`` is not allowed or taken.
            OutputError: The store cannot be written to.
        """
        check_name(new)
        with self._locked():
            path = self._existing(old)
            self._refuse_collision(new, replace=False, besides=old)
            target = self.root / new
            read_details(path)  # files that are broken, or links out of the store, are left as they are
            _refuse_name_of_base(new, path, None)
            if os.path.lexists(path / CONTRACT_FILE):
                _set_contract_name(path, new)
            try:
                path.rename(target)
            except OSError as error:
                raise _not_writable(self.root, error) from error
            return read_details(target).card

    def delete(self, name: str) -> None:
        """Delete the adapter ``name``.

        Raises:
            AdapterError: It is not in the store.
            OutputError: The store cannot be written to.
        """
        with self._locked():
            folder = self._existing(name)
            self._require_adapter(name)
            discard_directory(folder)

    def _entries(self) -> _Names:
        names = self._folder_names()
        # An adapter is without its name only while a replacement is in progress, or was killed: wait, or finish it.
        if moved_aside_names(names) and os.access(self.root, os.W_OK):
            with self._locked():
                names = self._folder_names()
        return [name for name in names if not name.startswith(".")]

    def _folder_names(self) -> _Names:
        try:
            with os.scandir(self.root) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir() or entry.is_symlink())
        except FileNotFoundError:
            return []
        except OSError as error:
            what = f"{self.root}: the store cannot be read: {error.strerror}"
            raise AdapterError(what, expected="a folder of adapters", fix="give another folder with --store") from error

    def _details(self, path: Path) -> AdapterDetails | None:
        """Card and contract from one and the same adapter, even while others replace it; None once it is deleted."""
        before = folder_identity(path)
        try:
            details = read_details(path)
            if folder_identity(path) == before:
                return details
        except AdapterError:
            if before is not None and folder_identity(path) == before:
                raise
        with self._locked() if os.access(self.root, os.W_OK) else nullcontext():
            return read_details(path) if os.path.isdir(path) else None

    def _existing(self, name: str) -> Path:
        path = self.root / check_name(name)
        if not path.is_dir() and not path.is_symlink():
            raise self._unknown(name)
        self._refuse_link(path)
        return path

    def _refuse_link(self, path: Path) -> None:
        if path.is_symlink():
            fix = "delete the link, and add the folder it points to with `qlora-kit adapters add`"
            raise AdapterError(f"{path}: is a symbolic link", expected="a folder inside the store", fix=fix)

    def _refuse_collision(self, name: str, *, replace: bool, besides: str | None = None) -> None:
        require_unambiguous(name)
        for other in self._entries():
            if other == name and not replace:
                fix = "give another name, delete that adapter first, or give --replace (not with `adapters rename`)"
                raise AdapterError(f"{self.root / name}: the name is taken", expected="a new name", fix=fix)
            if other != name and other != besides and other.casefold() == name.casefold():
                what = f"{name!r} differs from the adapter {other!r} only in upper and lower case"
                fix = f"give another name, or use {other!r} itself"
                raise AdapterError(what, expected="names that stay apart on every file system", fix=fix)

    def _require_adapter(self, name: str) -> None:
        """Neither replace nor delete what is no adapter, whole or broken: any folder may be given as a store."""
        require_own_folder(self.root / name, (CONFIG_FILE, WEIGHTS_FILE, CONTRACT_FILE))

    def _unknown(self, name: str) -> AdapterError:
        names = self._entries()
        near = like(name, names, most=3, cutoff=0.5)
        known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        return AdapterError(
            f"{shown(name)}: no adapter of this name in {self.root}, and no such folder",
            expected=f"one of: {known}" if names else "a name in the store (it holds no adapters yet) or a folder",
            fix=f"did you mean {' or '.join(near)}?" if near else "see `qlora-kit adapters list`",
        )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude every other process that changes this store; clean up first what a killed one left."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.root / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise _not_writable(self.root, error) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            recover_leftovers(self.root)
            yield
        finally:
            os.close(lock)


def _copy_own_files(source: Path, target: Path, *, omit: Collection[str]) -> None:
    for name in own_files(source):
        if name in omit:
            continue
        require_regular_file(source / name)
        try:
            file = open_regular(source / name, follow_links=False)
        except OSError as error:
            what = f"{source / name}: cannot be read: {error.strerror}"
            raise AdapterError(
                what, expected="a regular file", fix="leave the folder alone while it is added"
            ) from error
        with file, (target / name).open("wb") as copy:
            if name != WEIGHTS_FILE and os.fstat(file.fileno()).st_size > MAX_TEXT_BYTES:
                what = f"{source / name}: the file is too large"
                raise AdapterError(what, expected=f"at most {MAX_TEXT_BYTES} bytes", fix="shorten or delete the file")
            shutil.copyfileobj(file, copy)


def _refuse_name_of_base(name: str, folder: Path, contract: AdapterContract | None) -> None:
    if contract is None and not os.path.lexists(folder / CONTRACT_FILE):
        return
    require_unambiguous(name, base=(AdapterContract.load(folder) if contract is None else contract).base.id)


def _set_contract_name(folder: Path, name: str) -> None:
    path = folder / CONTRACT_FILE
    if not os.path.lexists(path):
        return
    content = read_contract_json(path)
    if content.get("name") not in (None, name):
        write_contract_json(path, {**content, "name": name})


def _not_writable(root: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{root}: the store cannot be written: {error.strerror}",
        expected="a folder that may be written to",
        fix="give another folder with --store, or make this one writable",
    )
