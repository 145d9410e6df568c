"""Keeps tokenised data between runs: a folder for each key, the least recently used ones removed beyond a bound.

The key is made of everything that the tokens depend on, so that a change of any of it misses.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from qlora_kit.atomic import atomic_directory, full_disk_errors, is_leftover
from qlora_kit.config import RunConfig
from qlora_kit.data.chat import chat_template_sha256, control_tokens
from qlora_kit.data.tokenising import TokenRules

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 3  # raise it when the same rows give other tokens, other counts, or other columns
CACHE_VARIABLE = "QLORA_KIT_CACHE"
MAX_CACHE_BYTES = 20 * 2**30
LEFTOVER_SECONDS = 3600.0
_LIBRARIES = ("tokenizers", "transformers", "jinja2")


def cache_folder() -> Path:
    """Where the kit keeps what it can make again: ``$QLORA_KIT_CACHE``, else a folder in the user's cache folder."""
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-kit"


def token_key(config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Mapping[str, Any]) -> str:
    """The hash of everything that tokenised rows depend on.

    Args:
        config: Its tasks, formats, templates and rules.
        tokenizer: Its vocabulary, its rules and its chat template.
        data: What identifies the data: the hashes of their bytes.
    """
    rules = TokenRules.of(config)
    content = {
        "format": FORMAT,
        "kit": version("qlora-kit"),
        "libraries": {name: version(name) for name in _LIBRARIES},
        "data": data,
        "parts": [
            {"task": vars(part.task), "format": part.section.format, "weight": part.section.weight}
            for part in config.parts()
        ],
        "settings": config.data.model_dump(mode="json", exclude={"train", "validation", "test", "mix"}),
        "seed": config.train.seed,
        "rules": vars(rules),
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "rendered": chat_template_sha256(tokenizer),
        "control_tokens": control_tokens(tokenizer),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """Folders of tokenised data by key.

    Args:
        root: Where they lie; it need not exist.
        max_bytes: Beyond this size in all, the least recently used entries are removed.
    """

    def __init__(self, root: Path | None = None, *, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self.root = cache_folder() / "tokens" if root is None else root
        self.max_bytes = max_bytes

    def find(self, key: str) -> Path | None:
        """The entry's folder, marked as used now; None where there is none."""
        folder = self.root / key
        if folder.is_file() or folder.is_symlink():  # not ours: an entry is a folder
            folder.unlink(missing_ok=True)
        if not folder.is_dir():
            return None
        with suppress(OSError):
            os.utime(folder)
        return folder

    @contextmanager
    def adding(self, key: str) -> Iterator[Path]:
        """A folder to write an entry into; it appears whole when the block ends, and not at all if it raises.

        Raises:
            OutputError: The cache cannot be written, or the disk is full.
        """
        with atomic_directory(self.root / key, overwrite=True) as folder:
            yield folder
        self.trim(keep=key)

    def remove(self, key: str) -> None:
        """Remove an entry."""
        shutil.rmtree(self.root / key, ignore_errors=True)

    def trim(self, *, keep: str) -> None:
        """Remove the least recently used entries, but for ``keep``, until the rest is within the bound.

        Files that a running process has mapped stay readable for it after their removal.
        """
        self._remove_leftovers()
        ages = {folder: _modified(folder) for folder in self.root.iterdir() if _is_entry(folder)}
        entries = sorted((age, folder) for folder, age in ages.items() if age is not None)
        sizes = {folder: _size_bytes(folder) for _, folder in entries}
        total_bytes = sum(sizes.values())
        for _, folder in entries:
            if total_bytes <= self.max_bytes:
                return
            if folder.name != keep:
                self.remove(folder.name)
                total_bytes -= sizes[folder]

    def _remove_leftovers(self) -> None:
        """Remove what killed processes left behind; a running one writes to its folder all the time."""
        for folder in self.root.iterdir():
            newest = max((_modified(path) or 0.0 for path in (folder, *_files(folder))), default=0.0)
            if is_leftover(folder.name) and newest < time.time() - LEFTOVER_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def token_folder(cache: TokenCache, key: str) -> Iterator[tuple[Path, TemporaryDirectory[str] | None]]:
    """A folder to write tokens into: of the cache, or a temporary one where the cache cannot be written."""
    try:
        cache.root.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache.root, os.W_OK)
    except OSError:
        writable = False
    if writable:
        with cache.adding(key) as folder:
            yield folder, None
    else:
        temporary = TemporaryDirectory(prefix="qlora-kit-tokens-")
        with full_disk_errors(Path(temporary.name)):
            yield Path(temporary.name), temporary


def _is_entry(folder: Path) -> bool:
    return len(folder.name) == 64 and set(folder.name) <= set("0123456789abcdef")


def _files(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _modified(path: Path) -> float | None:
    """When it was last written; None where it has gone meanwhile."""
    with suppress(OSError):
        return path.stat().st_mtime
    return None


def _size_bytes(folder: Path) -> int:
    total = 0
    for path in _files(folder):
        with suppress(OSError):
            total += path.stat().st_size
    return total
