"""Headers are read as the safetensors library wrote them; damaged ones are refused, never obeyed."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from qlora_kit.errors import AdapterError, BaseModelError, QloraKitError
from qlora_kit.safetensors_header import locate_tensors, read_safetensors_header

TENSORS: dict[str, np.ndarray] = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.arange(5, dtype=np.int64),
    "flags": np.array([True, False]),
    "scalar": np.array(2.5, dtype=np.float16),
    "empty": np.zeros((0, 4), dtype=np.float32),
}


def write_raw(path: Path, header: Any, data: bytes = b"", *, claimed: int | None = None) -> Path:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if claimed is None else claimed) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    """A header entry, sound by default."""
    shape, offsets = (list(v) if isinstance(v, tuple) else v for v in (shape, offsets))
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_header_agrees_with_what_the_library_wrote(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = read_safetensors_header(path, error=AdapterError)
    raw = path.read_bytes()
    assert set(header) == set(TENSORS)
    for name, array in TENSORS.items():
        info = header[name]
        assert info.shape == array.shape
        assert raw[info.start : info.end] == array.tobytes()
        assert info.size_bytes == array.nbytes


BAD_HEADERS: dict[str, tuple[Any, bytes]] = {
    "list": ([], b""),
    "number": (b"1 ", b""),
    "not JSON": (b"{oops", b""),
    "leading space": (b" {}", b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "deeply nested": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "doubled key": (b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", b"1234"),
    "NaN": (b'{"a":NaN}', b""),
    "huge number": (b'{"a":' + b"9" * 5000 + b"}", b""),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b""),
    "metadata a list": ({"__metadata__": []}, b""),
    "entry a list": ({"a": []}, b""),
    "entry without dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "entry with more": ({"a": {**entry(), "more": 1}}, b"1234"),
    "unknown dtype": ({"a": entry(dtype="F33")}, b"1234"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, b"1234"),
    "shape negative": ({"a": entry(shape=(-1, -1))}, b"1234"),
    "shape of flags": ({"a": entry(shape=(True,))}, b"1234"),
    "shape of fractions": ({"a": entry(shape=(1.0,))}, b"1234"),
    "shape a number": ({"a": entry(shape=1)}, b"1234"),
    "shape too deep": ({"a": entry(shape=(1,) * 100)}, b"1234"),
    "shape overflows": ({"a": entry(shape=(2**62, 4, 2**62))}, b"1234"),
    "size disagrees": ({"a": entry(shape=(2,))}, b"1234"),
    "offsets backwards": ({"a": entry(offsets=(4, 0))}, b"1234"),
    "offsets negative": ({"a": entry(offsets=(-4, 0))}, b"1234"),
    "offsets of three": ({"a": entry(offsets=(0, 4, 8))}, b"1234"),
    "past the end": ({"a": entry(shape=(2,), offsets=(0, 8))}, b"1234"),
    "gap at the start": ({"a": entry(offsets=(4, 8))}, b"12345678"),
    "gap between": ({"a": entry(), "b": entry(offsets=(8, 12))}, b"123456781234"),
    "overlap": ({"a": entry(), "b": entry(offsets=(0, 4))}, b"1234"),
    "bytes left over": ({"a": entry()}, b"12345"),
    "empty name": ({"": entry()}, b"1234"),
    "long name": ({"a" * 1000: entry()}, b"1234"),
    "control character": ({"a\x1b[2J": entry()}, b"1234"),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_bad_headers_are_refused_with_the_class_of_the_caller(tmp_path: Path, kind: str) -> None:
    header, data = BAD_HEADERS[kind]
    path = write_raw(tmp_path / "x.safetensors", header, data)
    for error in (AdapterError, BaseModelError):
        with pytest.raises(error) as caught:
            read_safetensors_header(path, error=error)
        assert "x.safetensors" in caught.value.faults[0].what
        assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 0), struct.pack("<Q", 1) + b"{", b"\xff" * 100])
def test_cut_off_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError):
        read_safetensors_header(path, error=AdapterError)


def test_missing_files_folders_and_large_headers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such file"):
        read_safetensors_header(tmp_path / "none", error=AdapterError)
    with pytest.raises(AdapterError, match="no such file"):
        read_safetensors_header(tmp_path, error=AdapterError)
    path = write_raw(tmp_path / "x.safetensors", {"a": entry()}, b"1234")
    assert read_safetensors_header(path, error=AdapterError)
    with pytest.raises(AdapterError, match="header claims"):
        read_safetensors_header(path, error=AdapterError, max_header_bytes=10)


def test_mutated_headers_never_crash_and_never_point_outside(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    sound = path.read_bytes()
    header_end = 8 + struct.unpack("<Q", sound[:8])[0]
    rng = random.Random(0)
    refused = 0
    for _ in range(600):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(header_end)] = rng.randrange(256)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        path.write_bytes(content)
        try:
            header = read_safetensors_header(path, error=AdapterError)
        except AdapterError:
            refused += 1
        else:
            assert all(8 <= info.start <= info.end <= len(content) for info in header.values())
    assert refused > 300


def sharded(folder: Path) -> Path:
    """Two shards and their index, as transformers lays them out."""
    folder.mkdir()
    save_file({"a": TENSORS["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["b"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {name: f"model-0000{1 if name == 'a' else 2}-of-00002.safetensors" for name in "abc"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    found = locate_tensors(folder, error=BaseModelError)
    assert {name: location.file.name[:11] for name, location in found.items()} == {
        "a": "model-00001",
        "b": "model-00002",
        "c": "model-00002",
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a": "../model-00001-of-00002.safetensors"}, "the same folder"),
        ({"a": "/etc/x.safetensors"}, "the same folder"),
        ({"a": "sub/x.safetensors"}, "the same folder"),
        ({"a": "sub\\x.safetensors"}, "the same folder"),
        ({"a": "x.bin"}, "the same folder"),
        ({"a": ".safetensors"}, "the same folder"),
        ({"a": "x\x00.safetensors"}, "the same folder"),
        ({"a": 1}, "weight_map"),
        ({"z": "model-00001-of-00002.safetensors"}, "'z' is missing from the file"),
        ({"z": "model-00003-of-00002.safetensors"}, "no such file"),
        ({"b": None}, "'b' is missing from model.safetensors.index.json"),
        ({"a": "model-00002-of-00002.safetensors", "keep": "model-00001-of-00002.safetensors"}, "'a' is missing from"),
    ],
)
def test_an_index_that_disagrees_is_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = sharded(tmp_path / "model")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(change)
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    path.write_text(json.dumps(index))
    with pytest.raises(BaseModelError) as caught:
        locate_tensors(folder, error=BaseModelError)
    assert expected in str(caught.value)


def test_a_tensor_in_two_shards_and_a_cut_shard_are_both_named(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(BaseModelError, match="'b' is also in model-00001"):
        locate_tensors(folder, error=BaseModelError)
    second = folder / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="the tensors end at byte"):
        locate_tensors(folder, error=BaseModelError)


def test_a_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    with pytest.raises(QloraKitError, match=r"no model\.safetensors"):
        locate_tensors(tmp_path, error=BaseModelError)
