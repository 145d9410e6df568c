"""``write_gguf_lora``: a LoRA adapter in, the adapter alone as a GGUF file for llama.cpp out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.adapters import AdapterContract, AdapterFiles, AdapterSnapshot, pair_faults, read_adapter
from qlora_kit.architecture import Architecture
from qlora_kit.base_files import BaseRef, read_model_config, refuse_unsafe_keys
from qlora_kit.checkpoint import TensorSpec, torch_dtype
from qlora_kit.config.serving_targets import LIMITS, LLAMA_CPP, adapter_faults
from qlora_kit.errors import AdapterError, ConfigError, Fault
from qlora_kit.export.gguf_file import GgufTensor, finished_file, require_new_file, write_gguf_file
from qlora_kit.export.gguf_metadata import read_gguf_model
from qlora_kit.export.gguf_names import ARCHITECTURES, EMBEDDING, gguf_name, head_rows_in_pairs, rotated_heads
from qlora_kit.export.gguf_quants import find_quant, pack_rows
from qlora_kit.export.gguf_results import GgufFile
from qlora_kit.merging.layerwise import Weights
from qlora_kit.merging.tensors import LoraFactors, Rows
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter

LORA_QUANTS = ("f32", "f16", "bf16")
MAX_FAULTS = 10
_PREFIX = "base_model.model."


def write_gguf_lora(
    adapter_dir: Path,
    base_dir: Path,
    out_file: Path,
    *,
    quant: str = "f32",
    progress: Callable[[int, int], None] | None = None,
) -> GgufFile:
    """Write a LoRA adapter as a GGUF file, for ``llama-server --lora`` and the like.

    llama.cpp adds alpha / rank · B · A with one alpha for all pairs, so that for rsLoRA (alpha / √r) the file says
    alpha · √r. Rows of B change places as those of the weight do (``head_rows_in_pairs``).

    Args:
        adapter_dir: The adapter's folder.
        base_dir: The base that it will be put on, for its shape: llama.cpp has to have that base as a GGUF file.
        out_file: The file to make; its folder must exist.
        quant: ``f32``, ``f16`` or ``bf16``.
        progress: Called with the bytes of tensors written and in all.

    Raises:
        ConfigError: There is no such ``quant``.
        AdapterError: The adapter is unsound, is for another base, or has what llama.cpp's adapters cannot say; with
            every such thing.
        BaseModelError: llama.cpp does not compute a base of this kind alike.
        OutputError: ``out_file`` is occupied, or does not fit on the disk.
    """
    if quant not in LORA_QUANTS:
        raise ConfigError(
            f"--quant {shown(quant)}: adapters are not written so",
            expected="one of " + ", ".join(LORA_QUANTS),
            fix="leave --quant out: an adapter is small",
        )
    refuse_unsafe_keys(base_dir)
    config = read_model_config(BaseRef(str(base_dir), base_dir))
    shape = read_gguf_model(config, where=str(base_dir / "config.json")).architecture
    snapshot = _read(adapter_dir, shape)
    kind = find_quant(quant).matrices
    tensors = [
        GgufTensor(f"{gguf_name(f'{module}.weight')}.lora_{letter.lower()}", (rows, columns), kind, name)
        for module, pair in snapshot.files.pairs.items()
        for letter, rows, columns in (("A", pair.r, pair.in_features), ("B", pair.out_features, pair.r))
        for name in [_tensor(module, letter)]
    ]
    require_new_file(out_file, tensors)

    def blocks(tensor: GgufTensor) -> Iterator[np.ndarray]:
        values = tensor_of(snapshot, tensor.source)
        if tensor.name.endswith("lora_b"):
            module = tensor.source.removeprefix(_PREFIX).removesuffix(".lora_B.weight")
            heads = rotated_heads(f"{module}.weight", shape.family, heads=shape.heads, kv_heads=shape.kv_heads)
            values = values if heads is None else head_rows_in_pairs(values, heads)
        yield pack_rows(values, kind, name=tensor.source)

    write_gguf_file(out_file, _header(snapshot, shape, quant), tensors, blocks, progress=progress)
    return finished_file(out_file, tensors, kind="lora", quant=quant, architecture=ARCHITECTURES[shape.family])


class AdaptedWeights:
    """A base's weights with a plain LoRA adapter added in fp32, nothing rounded: ``layerwise.Weights``.

    Args:
        base: The base's own.
        adapter_dir: The adapter's folder; what ``write_gguf_lora`` refuses is refused.
    """

    def __init__(self, base: Weights, adapter_dir: Path) -> None:
        self._base = base
        snapshot = read_adapter(lambda: adapter_dir, lambda files, contract: _require_plain(files))
        scaling = snapshot.files.config.scaling_of
        self._pairs: dict[str, LoraFactors] = {
            f"{module}.weight": LoraFactors(
                tensor_of(snapshot, _tensor(module, "A")),
                tensor_of(snapshot, _tensor(module, "B")),
                scaling(module),
                None,
            )
            for module in snapshot.files.pairs
        }

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def spec(self, name: str) -> TensorSpec:
        """Dtype and shape in the base."""
        return self._base.spec(name)

    def blocks(self, name: str) -> Iterator[Rows]:
        """Its rows, with the adapter where it touches them."""
        factors = self._pairs.get(name)
        for rows in self._base.blocks(name):
            merged = None if factors is None else factors.added_to(rows.result.float(), rows.start)
            yield Rows(rows.start, rows.result, merged)

    def rows(self, name: str, ids: Sequence[int]) -> torch.Tensor:
        """Some rows of the embedding, which no pair touches."""
        return self._base.rows(name, ids)


def _tensor(module: str, letter: str) -> str:
    return f"{_PREFIX}{module}.lora_{letter}.weight"


def tensor_of(snapshot: AdapterSnapshot, name: str) -> torch.Tensor:
    """A tensor of the adapter in fp32."""
    import torch

    info = snapshot.files.tensors[name]
    return torch.frombuffer(snapshot.tensors[name], dtype=torch_dtype(info.dtype)).float().view(info.shape)


def _read(adapter_dir: Path, shape: Architecture) -> AdapterSnapshot:
    linear: Mapping[str, tuple[int, int]] = {
        name.removesuffix(".weight"): (plan.shape[0], plan.shape[1])
        for name, plan in shape.tensors().items()
        if len(plan.shape) == 2 and name != EMBEDDING
    }

    def accept(files: AdapterFiles, contract: AdapterContract | None) -> None:
        _require_plain(files)
        faults = pair_faults(files, linear)
        if faults:
            raise AdapterError.of(faults, at_most=MAX_FAULTS)

    return read_adapter(lambda: adapter_dir, accept)


def _require_plain(files: AdapterFiles) -> None:
    """Refuse what a GGUF adapter cannot say: llama.cpp would leave it out, or scale it wrongly, without a word."""
    faults = adapter_faults(files.folder, files.config, LLAMA_CPP)
    if not faults and files.extra_tensors:
        what = f"{files.folder}: the adapter has tensors beside its pairs: {shown(files.extra_tensors[0])}"
        faults.append(Fault(what, "plain LoRA pairs", LIMITS[LLAMA_CPP].merged))
    if faults:
        raise AdapterError.of(faults, at_most=MAX_FAULTS)


def _header(snapshot: AdapterSnapshot, shape: Architecture, quant: str) -> GGUFWriter:
    from gguf import GGML_QUANT_VERSION, GGUFWriter, Keys, LlamaFileType

    config = snapshot.files.config
    writer = GGUFWriter(None, ARCHITECTURES[shape.family])
    writer.add_type("adapter")
    writer.add_name(snapshot.files.folder.resolve().name)
    writer.add_file_type(LlamaFileType[find_quant(quant).file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    # alpha / rank is what llama.cpp scales by: with alpha · √r that is alpha / √r, as rsLoRA was trained.
    writer.add_float32(Keys.Adapter.LORA_ALPHA, config.lora_alpha * (sqrt(config.r) if config.use_rslora else 1.0))
    return writer
