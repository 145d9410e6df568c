"""Files and folders appear whole or not at all, whatever stops the writing."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlora_kit import atomic
from qlora_kit.errors import OutputError


def tree(folder: Path) -> dict[str, str]:
    """Every path under ``folder`` with its content."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else "<folder>"
        for path in sorted(folder.rglob("*"))
    }


def test_a_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with atomic.atomic_directory(target) as temporary:
        (temporary / "file").write_text("1")
        assert temporary.parent == target.parent
        assert not target.exists()
    assert tree(tmp_path) == {"a": "<folder>", "a/b": "<folder>", "a/b/file": "1"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(), ValueError(), OSError(errno.EIO, "")])
def test_nothing_stays_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    def write() -> None:
        with atomic.atomic_directory(tmp_path / "a" / "b") as temporary:
            (temporary / "file").write_text("1")
            raise error

    with pytest.raises(type(error)):
        write()
    assert tree(tmp_path) == {}


def test_an_occupied_folder_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("1")
    with pytest.raises(OutputError, match="not empty"), atomic.atomic_directory(tmp_path / "out"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"out": "<folder>", "out/mine": "1"}


def test_an_empty_folder_is_used_and_a_file_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic.atomic_directory(tmp_path / "empty") as temporary:
        (temporary / "file").write_text("1")
    assert (tmp_path / "empty" / "file").read_text() == "1"
    with pytest.raises(OutputError, match="not a folder"), atomic.atomic_directory(tmp_path / "empty" / "file"):
        pytest.fail("the block must not run")


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with atomic.atomic_directory(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "new").write_text("2")
        assert (tmp_path / "out" / "old").read_text() == "1"
    assert tree(tmp_path) == {"out": "<folder>", "out/new": "2"}


def test_overwrite_restores_the_old_folder_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(KeyError), atomic.atomic_directory(tmp_path / "out", overwrite=True):
        raise KeyError
    assert tree(tmp_path) == {"out": "<folder>", "out/old": "1"}

    rename = Path.rename

    def second_rename_fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, "input/output")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_rename_fails)
    with pytest.raises(OutputError), atomic.atomic_directory(tmp_path / "out", overwrite=True):
        pass
    assert tree(tmp_path) == {"out": "<folder>", "out/old": "1"}


@pytest.mark.parametrize("relative", [".", "..", "/"])
def test_overwrite_never_takes_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, relative: str
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(OutputError, match="current"), atomic.atomic_directory(Path(relative), overwrite=True):
        pytest.fail("the block must not run")


def test_a_linked_target_is_written_where_the_link_points(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with atomic.atomic_directory(tmp_path / "link") as temporary:
        (temporary / "file").write_text("1")
    assert (tmp_path / "disk" / "out" / "file").read_text() == "1"
    assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_the_users_to_solve(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="disk is full") as caught, atomic.atomic_directory(tmp_path / "out"):
        Path("/dev/full").write_text("1")
    assert caught.value.exit_code == 2
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        OSError(errno.EDQUOT, "quota"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_kind_of_full_disk_is_known(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OutputError, match="disk is full"), atomic.atomic_directory(tmp_path / "out"):
        raise error
    with pytest.raises(OutputError, match="disk is full"), atomic.atomic_file(tmp_path / "file"):
        raise error
    assert tree(tmp_path) == {}


def test_an_unusable_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    for target in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/out")):
        with pytest.raises(OutputError, match="cannot be written"), atomic.atomic_directory(target):
            pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="cannot be written"), atomic.atomic_file(tmp_path / "none" / "file"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == {"file": "1"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("1")

    def interrupted() -> None:
        with atomic.atomic_file(path) as temporary:
            temporary.write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert tree(tmp_path) == {"file": "1"}
    with atomic.atomic_file(path) as temporary:
        temporary.write_text("3")
    assert tree(tmp_path) == {"file": "3"}
    with pytest.raises(OutputError, match="is a folder"), atomic.atomic_file(tmp_path):
        pytest.fail("the block must not run")


def test_free_space_is_asked_of_the_disk_of_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    atomic.require_free_space(tmp_path / "a" / "b", 1)
    with pytest.raises(OutputError, match="GiB are free"):
        atomic.require_free_space(tmp_path / "a" / "b", 2**60)


def test_leftovers_of_a_killed_process_are_undone(tmp_path: Path) -> None:
    (tmp_path / ".a.0123456789ab.old").mkdir()
    (tmp_path / ".a.0123456789ab.old" / "file").write_text("1")
    (tmp_path / ".a.cdefcdefcdef.partial").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / ".b.0123456789ab.old").mkdir()
    (tmp_path / ".c.0123456789ab.partial").write_text("1")
    (tmp_path / ".mine.old").write_text("1")
    assert atomic.moved_aside_names(os.listdir(tmp_path)) == {"a"}
    atomic.recover_leftovers(tmp_path)
    assert tree(tmp_path) == {".mine.old": "1", "a": "<folder>", "a/file": "1", "b": "<folder>"}


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom qlora_kit.atomic import atomic_directory\n"
        "target, round = Path(sys.argv[1]), 0\n"
        "while True:\n"
        "    with atomic_directory(target, overwrite=True) as temporary:\n"
        "        for name in 'abc': (temporary / name).write_text(str(round))\n"
        "    round += 1\n"
        "    print(round, flush=True)\n"
    )
    target = tmp_path / "out"
    for delay in (0.0, 0.001, 0.002, 0.004, 0.008):
        process = subprocess.Popen([sys.executable, "-c", program, str(target)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        atomic.recover_leftovers(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        contents = {name: (target / name).read_text() for name in "abc"}
        assert len(set(contents.values())) == 1


def test_what_a_killed_process_left_of_a_folder_goes_when_it_is_made_again(tmp_path: Path) -> None:
    """A lock tells a folder that is being written from one that a killed process left."""
    abandoned, used = tmp_path / ".out.0123456789ab.partial", tmp_path / ".out.cdefcdefcdef.partial"
    replaced, other = tmp_path / ".out.0123456789ab.old", tmp_path / ".else.0123456789ab.partial"
    for folder in (abandoned, used, replaced, other, tmp_path / "out"):
        folder.mkdir()
    (abandoned / "weights").write_text("half")
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        with atomic.atomic_directory(tmp_path / "out") as folder:
            assert set(tmp_path.iterdir()) == {used, other, folder, tmp_path / "out"}
            with atomic.atomic_directory(tmp_path / "out") as second:  # neither takes the other for abandoned
                assert folder.is_dir()
            assert not second.exists()
            (tmp_path / "out").rmdir()
            (folder / "file").write_text("1")
    finally:
        os.close(lock)
    assert set(tmp_path.iterdir()) == {used, other, tmp_path / "out"}
