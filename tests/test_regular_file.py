"""Only regular files are opened, at once, and a folder that is not the same any more is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_kit.regular_file import folder_identity, open_regular


def test_files_are_opened_and_links_only_where_they_are_followed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    (tmp_path / "link").symlink_to("file")
    for path, follow in ((tmp_path / "file", False), (tmp_path / "file", True), (tmp_path / "link", True)):
        with open_regular(path, follow_links=follow) as file:
            assert file.read() == b"1"
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", follow_links=False)


@pytest.mark.timeout(20)
def test_nothing_else_is_opened_or_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null"), tmp_path / "none"):
        with pytest.raises(OSError, match=r"regular file|No such file"):
            open_regular(path)
    assert len(os.listdir("/dev/fd")) == before


def test_another_folder_of_the_same_name_has_another_identity(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert folder_identity(folder) is None
    folder.mkdir()
    first = folder_identity(folder)
    assert first == folder_identity(folder) is not None
    folder.rename(tmp_path / "aside")
    assert folder_identity(folder) is None
    folder.mkdir()
    assert folder_identity(folder) != first
