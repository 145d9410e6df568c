"""Damaged and hostile safetensors files: refused in bounded time and memory, or read as the library does."""

from __future__ import annotations

import json
import random
import shutil
import struct
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qlora_kit.adapters import check_adapter_folder
from qlora_kit.errors import AdapterError
from qlora_kit.safetensors_header import read_safetensors_header

CASES = 900
MAX_SECONDS = 30.0
# A header is kept as bytes, text and Python objects: up to some 25 times its size. All files here are under 4 MB.
MAX_PEAK_BYTES = 128 << 20
NAMES = [f"base_model.model.model.layers.{layer}.q_proj.lora_{ab}.weight" for layer in (0, 1) for ab in "AB"]
SETTINGS = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
ODD_NUMBERS = ["-1", "-0", "0", "1", "2", "4", "8", "1.0", "1e0", "1e999", "true", "null", '"4"', "[4]", "{}", "NaN"]
ODD_NUMBERS += [str(2**31), str(2**32), str(2**53), str(2**62), str(2**63), str(2**64), str(2**64 + 4), "9" * 100_000]
ODD_SHAPES = ["[]", "[0]", "[[2]]", "[2,[3]]", "[-1,-16]", "2", '"2"', "null", "[1e0]", "[true,16]", "[2,2,2,2,1,1]"]
ODD_SHAPES += [f"[{2**62},4,{2**62}]", f"[{2**62},{2**62},0]", f"[0,{2**63}]", "[16," + "1," * 90 + "1]", "[4,4]"]
ODD_DTYPES = [
    "F16",
    "BF16",
    "F64",
    "I32",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "f32",
    "F33",
    "",
    "F32\\u0000",
    "\\ud800",
]
ODD_NAMES = ["", "__metadata__", "\\u0000", "\\u001b[2J", "\\ud83d", "a\\nb", "..", "/etc/passwd", "é", "x" * 600]
ODD_NAMES += ["\\u202e", "x" * 1_000_000, "\\u007f", "%s%n", NAMES[1], "base_model.model.q_proj.lora_A.weight"]
ODD_METADATA = ["null", "[]", "{}", '{"a":1}', '{"a":null}', '{"a":"b","a":"c"}', '{"a":{"b":"c"}}', '"x"', "1", "true"]
ODD_METADATA += ['{"a":"\\ud800"}', '{"a":"' + "x" * 1_000_000 + '"}', "[" * 100_000 + "]" * 100_000]
ODD_LENGTHS = [0, 1, 2, 7, 10**6, 10**8, 10**8 + 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of an adapter of two layers."""
    path = tmp_path_factory.mktemp("sound") / "x.safetensors"
    arrays = {name: np.ones((2, 8) if "lora_A" in name else (8, 2), np.float32) for name in NAMES}
    save_file(arrays, path, metadata={"format": "pt"})
    return path.read_bytes()


def split(content: bytes) -> tuple[str, bytes]:
    """Header text and data."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end].decode(), content[end:]


def joined(header: str | bytes, data: bytes, length: int | None = None) -> bytes:
    """The file of a header and data."""
    text = header if isinstance(header, bytes) else header.encode("utf-8", errors="surrogatepass")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def structured(content: bytes) -> Iterator[bytes]:
    """One file for each odd value in each place."""
    text, data = split(content)
    header: dict[str, Any] = json.loads(text)
    metadata, tensors = header.pop("__metadata__"), header

    def write(entries: dict[str, str], extra: str = "", meta: str | None = None) -> bytes:
        fields = [f'"__metadata__":{json.dumps(metadata) if meta is None else meta}']
        fields += [f'"{name}":{entry}' for name, entry in entries.items()]
        return joined("{" + ",".join(fields) + extra + "}", data)

    def entry(name: str, **changes: str) -> str:
        values = {key: json.dumps(value) for key, value in tensors[name].items()} | changes
        return "{" + ",".join(f'"{key}":{value}' for key, value in values.items()) + "}"

    plain = {name: entry(name) for name in tensors}
    yield write(plain)
    for name in (NAMES[0], NAMES[3]):
        begin, end = tensors[name]["data_offsets"]
        rows, columns = tensors[name]["shape"]
        for odd in ODD_NUMBERS:
            for offsets in (f"[{odd},{end}]", f"[{begin},{odd}]", f"[{odd},{odd}]", odd, f"[{begin},{end},{odd}]"):
                yield write(plain | {name: entry(name, data_offsets=offsets)})
            for shape in (f"[{odd},{columns}]", f"[{rows},{odd}]", f"[{rows},{columns},{odd}]"):
                yield write(plain | {name: entry(name, shape=shape)})
        for shift in (-8, -4, 4, 8, 64):
            yield write(plain | {name: entry(name, data_offsets=f"[{begin + shift},{end + shift}]")})
        for shape in ODD_SHAPES:
            yield write(plain | {name: entry(name, shape=shape)})
        for dtype in ODD_DTYPES:
            yield write(plain | {name: entry(name, dtype=f'"{dtype}"')})
        for more in ('"more":1', '"dtype":"F32"', '"shape":[2,8]', '"":0', '"x":' + "[" * 5000 + "]" * 5000):
            yield write(plain | {name: entry(name)[:-1] + "," + more + "}"})
    for name in ODD_NAMES:
        yield write({**{key: value for key, value in plain.items() if key != NAMES[0]}, name: plain[NAMES[0]]})
        yield write(plain, extra=f',"{name}":' + entry(NAMES[0]))
    for meta in ODD_METADATA:
        yield write(plain, meta=meta)
    for length in ODD_LENGTHS:
        yield joined(text, data, length=length)
    many = ",".join(f'"t{index}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(8_000))
    for odd_text in ("", "{}", "[]", "{", "null", " " + text, text + " " * 8, text + "\0", text + "}", "\ufeff" + text):
        yield joined(odd_text, data)
    yield joined("{" + many + "}", b"")
    yield joined('{"a":[' + "[]," * 100_000 + "[]]}", data)
    yield joined('"' + '\\"' * 500_000, data)
    yield joined('{"' + '\\"' * 500_000, data)


def scrambled(content: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header flipped, inserted, deleted, doubled or cut."""
    text, data = split(content)
    header = bytearray(text.encode())
    digits = [place for place, byte in enumerate(header) if chr(byte).isdigit() and place > 60]
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(header))
        how = rng.randrange(7)
        if how == 0:
            header[place] = rng.randrange(256)
        elif how == 1:
            header.insert(place, rng.choice(b'{}[]",:0123456789-.eE\\ \n\x00\xff'))
        elif how == 2:
            del header[place]
        elif how == 3:
            header[place:place] = header[place : place + rng.randrange(60)]
        elif how == 4:
            header[place] ^= 1 << rng.randrange(8)
        elif how == 5:
            place = rng.choice(digits)
            header[place : place + 1] = rng.choice(b"0123456789").to_bytes(1, "big")
        else:
            del header[place : place + rng.randrange(30)]
        header = header or bytearray(b"{}")
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    return joined(bytes(header), data, None if rng.random() < 0.8 else max(0, len(header) + rng.randint(-9, 9)))


def mutations(content: bytes, *, count: int, seed: int) -> Iterator[bytes]:
    """The odd values, then scrambled headers up to ``count`` in all."""
    rng = random.Random(seed)
    cases = list(structured(content))
    yield from cases
    for _ in range(count - len(cases)):
        yield scrambled(content, rng)


def library_reads(path: Path) -> dict[str, tuple[str, tuple[int, ...]]] | None:
    """Dtypes and shapes by name as the library reads them; None when it refuses the file."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OverflowError):
        return None


def check_one(path: Path, adapter: Path) -> bool:
    """Whether the header was accepted; fails where it should not have been, or where anything but a refusal happens."""
    header, refusal = None, None
    try:
        header = read_safetensors_header(path, error=AdapterError, max_header_bytes=16_000_000)
    except AdapterError as error:
        refusal = error
    if refusal is not None:
        assert all(fault.what and fault.expected and fault.fix for fault in refusal.faults)
        assert len(str(refusal)) < 2000
        assert str(refusal).replace("\n", "").isprintable()
    if header is not None:
        assert library_reads(path) == {name: (info.dtype, info.shape) for name, info in header.items()}
        assert all(8 <= info.start <= info.end <= path.stat().st_size for info in header.values())
    try:
        check_adapter_folder(adapter)
    except AdapterError:
        return header is not None
    assert header is not None and set(header) == set(NAMES)
    return True


def test_mutated_headers_are_refused_or_read_as_the_library_reads_them(sound: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(SETTINGS))
    path = tmp_path / "adapter_model.safetensors"
    accepted, cases, slowest = 0, 0, 0.0
    began = time.monotonic()
    tracemalloc.start()
    try:
        for content in mutations(sound, count=CASES, seed=0):
            path.write_bytes(content)
            assert len(content) < 4 << 20
            tracemalloc.reset_peak()
            before, started = tracemalloc.get_traced_memory()[0], time.monotonic()
            accepted += check_one(path, tmp_path)
            slowest = max(slowest, time.monotonic() - started)
            assert tracemalloc.get_traced_memory()[1] - before < MAX_PEAK_BYTES
            cases += 1
    finally:
        tracemalloc.stop()
    print(f"{cases} cases, {accepted} accepted, the slowest took {slowest:.2f} s")
    assert cases >= 500
    assert 10 < accepted < cases / 2
    assert time.monotonic() - began < MAX_SECONDS


def test_a_large_claim_costs_nothing(sound: bytes, tmp_path: Path) -> None:
    """A header of 100 MB claimed in a sparse file that has them: refused unread."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_000) + b"{")
    with path.open("r+b") as file:
        file.truncate(200_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(AdapterError, match="header claims"):
            read_safetensors_header(path, error=AdapterError, max_header_bytes=16_000_000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    shutil.rmtree(tmp_path)
