"""Weights written by the kit open in safetensors and transformers; weights written by those are read as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qlora_kit.checkpoint import ShardWriter, TensorSource, TensorSpec, atomic_directory, spec_of, torch_dtype_name
from qlora_kit.errors import BaseModelError, OutputError

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
)


def mixed_tensors() -> dict[str, torch.Tensor]:
    """One tensor of each dtype, of odd sizes, beside a scalar and an empty one."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5 + index), generator=generator).to(dtype)
        for index, dtype in enumerate(DTYPES)
    }
    return {**tensors, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4)}


def specs_of(tensors: dict[str, torch.Tensor]) -> dict[str, TensorSpec]:
    """What a writer wants to know first."""
    return {name: spec_of(tensor) for name, tensor in tensors.items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Both hold the same names, dtypes, shapes and bits."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert torch.equal(tensor.double(), right[name].double())
        assert tensor.shape == right[name].shape


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    """A random two-layer Qwen2."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return Qwen2ForCausalLM(config).to(torch.bfloat16)


def test_the_safetensors_library_reads_what_was_written(tmp_path: Path) -> None:
    tensors = mixed_tensors()
    with ShardWriter(tmp_path, specs_of(tensors)) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert_same(load_file(tmp_path / "model.safetensors"), tensors)


@pytest.mark.parametrize("max_shard_bytes", [1, 100, 200])
def test_shards_hold_what_their_index_says(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = mixed_tensors()
    with ShardWriter(tmp_path, specs_of(tensors), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    found: dict[str, torch.Tensor] = {}
    for file_name in sorted(set(index["weight_map"].values())):
        shard = load_file(tmp_path / file_name)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= max_shard_bytes
        assert all(index["weight_map"][name] == file_name for name in shard)
        found |= shard
    assert_same(found, tensors)
    assert writer.file_names == tuple(sorted(set(index["weight_map"].values())))


@pytest.mark.parametrize("max_shard_bytes", [10_000, 10_000_000])
def test_transformers_loads_what_was_written(tmp_path: Path, model: Qwen2ForCausalLM, max_shard_bytes: int) -> None:
    state = model.state_dict()
    model.config.save_pretrained(tmp_path)
    with ShardWriter(tmp_path, specs_of(state), max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in state.items():
            for block in tensor.split(7):
                writer.write_rows(name, block)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert_same(loaded.state_dict(), state)


@pytest.mark.parametrize("max_shard_size", ["10KB", "1GB"])
def test_what_transformers_wrote_is_read(tmp_path: Path, model: Qwen2ForCausalLM, max_shard_size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    state = model.state_dict()
    with TensorSource(tmp_path) as source:
        assert_same({name: source.get(name) for name in source.names}, state)
        assert len(source) == len(state)
        assert "lm_head.weight" in source
        assert source.total_bytes == sum(tensor.nbytes for tensor in state.values())
        for name, tensor in state.items():
            assert source.spec(name) == spec_of(tensor)
            assert (source.shape(name), source.dtype(name)) == (tuple(tensor.shape), "BF16")
            assert torch.equal(source.rows(name, 3, 11), tensor[3:11])
            assert source.file(name).parent == tmp_path


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    source = TensorSource(tmp_path)
    source.get("a").add_(1)
    source.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))
    assert torch.equal(source.get("a"), torch.ones(4))


def test_wrong_names_and_rows_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4, 2), "s": torch.tensor(1.0)}, tmp_path / "model.safetensors")
    source = TensorSource(tmp_path)
    for read in (source.get, source.shape, source.dtype, source.spec, source.file):
        with pytest.raises(BaseModelError, match="no tensor 'b'"):
            read("b")
    for name, start, stop in (("a", 0, 5), ("a", -1, 2), ("a", 3, 2), ("s", 0, 1)):
        with pytest.raises(IndexError):
            source.rows(name, start, stop)


def test_a_cut_file_is_refused_at_once_and_when_it_is_cut_later(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 2)}, path)
    source = TensorSource(tmp_path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(BaseModelError, match=r"model\.safetensors: tensor 'a' cannot be read"):
        source.get("a")
    with pytest.raises(BaseModelError, match=r"model\.safetensors"):
        TensorSource(tmp_path)


def test_an_unfinished_writer_leaves_nothing(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("F32", (4, 2)), "b": TensorSpec("F32", (2,))}
    (tmp_path / "mine").write_text("1")

    def interrupted() -> None:
        with ShardWriter(tmp_path, specs, max_shard_bytes=8) as writer:
            writer.write("a", torch.ones(4, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="not wholly written"), ShardWriter(tmp_path, specs) as writer:
        writer.write("a", torch.ones(4, 2))
    writer = ShardWriter(tmp_path, specs)
    writer.write_rows("a", torch.ones(3, 2))
    writer.write("b", torch.ones(2))
    with pytest.raises(ValueError, match="first is a"):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_writer_takes_only_what_was_declared(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, {"a": TensorSpec("F32", (4, 2))})
    for tensor in (torch.ones(4, 3), torch.ones(4, 2, dtype=torch.float16), torch.ones(8)):
        with pytest.raises(ValueError, match="declared"):
            writer.write("a", tensor)
        with pytest.raises(ValueError, match="declared"):
            writer.write_rows("a", tensor)
    with pytest.raises(ValueError, match="declared"):
        writer.write("b", torch.ones(4, 2))
    writer.write_rows("a", torch.ones(3, 2))
    with pytest.raises(ValueError, match="declared"):
        writer.write_rows("a", torch.ones(2, 2))
    with pytest.raises(ValueError, match="declared"):
        writer.write("a", torch.ones(4, 2))
    writer.write_rows("a", torch.zeros(1, 2))
    writer.close()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.tensor([[1.0, 1]] * 3 + [[0, 0]]))
    with pytest.raises(ValueError, match="at least one tensor"):
        ShardWriter(tmp_path, {})


def test_slices_and_gradients_are_written_by_value(tmp_path: Path) -> None:
    whole = torch.nn.Parameter(torch.arange(24.0).reshape(4, 6))
    with ShardWriter(tmp_path, {"t": TensorSpec("F32", (6, 4)), "s": TensorSpec("F32", (2, 3))}) as writer:
        writer.write("t", whole.T)
        writer.write("s", whole[::2, ::2])
    assert_same(load_file(tmp_path / "model.safetensors"), {"t": whole.T.detach(), "s": whole[::2, ::2].detach()})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("rows", [2, 100_000])
def test_a_full_disk_leaves_no_folder(tmp_path: Path, rows: int) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out") as folder:
            (folder / ".model.safetensors.partial").symlink_to("/dev/full")
            with ShardWriter(folder, {"a": TensorSpec("F32", (rows, 2))}) as writer:
                writer.write("a", torch.ones(rows, 2))

    with pytest.raises(OutputError, match="disk is full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_dtypes_have_the_librarys_names(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {str(dtype): torch.zeros(2).to(dtype) for dtype in DTYPES}
    save_file(tensors, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        for dtype in DTYPES:
            assert opened.get_slice(str(dtype)).get_dtype() == torch_dtype_name(dtype)
    with pytest.raises(ValueError, match="no dtype"):
        torch_dtype_name(torch.complex128)
