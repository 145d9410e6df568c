"""``write_gguf``: a 16-bit checkpoint folder in, one GGUF file for llama.cpp out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.architecture import weight_differences
from qlora_kit.atomic import atomic_file, require_free_space
from qlora_kit.base_files import BaseRef, read_model_config, refuse_unsafe_keys
from qlora_kit.checkpoint import TensorSpec
from qlora_kit.errors import BaseModelError
from qlora_kit.export.gguf_file import GgufTensor, finished_file, require_new_file, tensors_in, write_gguf_file
from qlora_kit.export.gguf_kquants import find_quantizer, quantize_file
from qlora_kit.export.gguf_metadata import ROPE_FREQUENCIES, GgufModel, read_gguf_model
from qlora_kit.export.gguf_names import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    gguf_name,
    head_rows_in_pairs,
    is_table,
    rotated_heads,
)
from qlora_kit.export.gguf_quants import GgufQuant, find_quant, lossless_quant, pack_rows
from qlora_kit.export.gguf_results import GgufFile
from qlora_kit.export.gguf_tokenizer import GgufVocabulary, read_vocabulary
from qlora_kit.merging.input_checks import WEIGHT_DTYPES
from qlora_kit.merging.layerwise import Weights
from qlora_kit.merging.tensor_check import WrittenTensors
from qlora_kit.safetensors_header import locate_tensors, shown

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter

Progress = Callable[[int, int], None]
_WHOLE_FIX = "give the complete 16-bit checkpoint: a folder that `merge` wrote, or the base itself"


@dataclass(frozen=True)
class _Plan:
    """All that is known before a weight is read."""

    name: str
    model: GgufModel
    vocabulary: GgufVocabulary
    weights: Weights
    specs: dict[str, TensorSpec]

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.model.architecture.family]

    def tensors(self, quant: GgufQuant) -> list[GgufTensor]:
        """What the file holds, in the order of the model."""
        listed = [
            GgufTensor(gguf_name(source), spec.shape, quant.type_of(spec.shape, is_table=is_table(source)), source)
            for source, spec in self.specs.items()
        ]
        factors = self.model.rope_factors
        if factors is not None:
            listed.insert(0, GgufTensor(ROPE_FREQUENCIES, (len(factors),), "F32", ROPE_FREQUENCIES))
        return listed

    def header(self, quant: GgufQuant) -> GGUFWriter:
        """The keys of the file."""
        from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

        writer = GGUFWriter(None, self.architecture)
        writer.add_type("model")
        writer.add_name(self.name)
        writer.add_file_type(LlamaFileType[quant.file_type])
        writer.add_quantization_version(GGML_QUANT_VERSION)
        self.model.write_to(writer)
        self.vocabulary.write_to(writer)
        return writer

    def blocks(self, tensor: GgufTensor) -> Iterator[np.ndarray]:
        """The packed bytes of a tensor; query and key weights of ``llama`` whole, since their rows change places."""
        import torch

        if tensor.source == ROPE_FREQUENCIES:
            yield pack_rows(torch.tensor(self.model.rope_factors), tensor.kind, name=tensor.name)
            return
        shape = self.model.architecture
        heads = rotated_heads(tensor.source, shape.family, heads=shape.heads, kv_heads=shape.kv_heads)
        blocks = (block.result for block in self.weights.blocks(tensor.source))
        for rows in blocks if heads is None else [head_rows_in_pairs(torch.cat(list(blocks)), heads)]:
            yield pack_rows(rows, tensor.kind, name=tensor.source)


def write_gguf(
    model_dir: Path,
    out_file: Path,
    *,
    quant: str,
    name: str | None = None,
    progress: Progress | None = None,
) -> GgufFile:
    """Write the model in ``model_dir`` as one GGUF file, a block of rows at a time.

    The file holds what llama.cpp needs to compute, tokenise, render and stop as transformers does: every tensor, the
    rotary settings of ``rope_parameters``, the vocabulary padded to the embedding's rows, the chat template and the
    stop tokens. What llama.cpp cannot do is refused by name.

    Args:
        model_dir: A checkpoint of unquantized weights with its tokenizer: merged, or a plain base.
        out_file: The file to make; its folder must exist.
        quant: A name of ``QUANTS``; those of k-quants need llama.cpp's ``llama-quantize``.
        name: What the file calls the model; the folder's name by default.
        progress: Called with the bytes of tensors written and in all.

    Raises:
        ConfigError: There is no such ``quant``, or no quantizer for it.
        BaseModelError: The checkpoint is damaged, not finite, or of a kind that llama.cpp does not compute alike.
        OutputError: ``out_file`` is occupied, or does not fit on the disk.
        GuardError: The quantizer failed.
    """
    chosen = find_quant(quant)
    quantizer = None if chosen.quantizer is None else find_quantizer(chosen)
    with ExitStack() as opened:
        plan = _plan(model_dir, model_dir.resolve().name if name is None else name, opened)
        if quantizer is None:
            tensors = plan.tensors(chosen)
            require_new_file(out_file, tensors)
            write_gguf_file(out_file, plan.header(chosen), tensors, plan.blocks, progress=progress)
        else:
            _write_by_quantizer(plan, out_file, chosen, quantizer, progress)
            tensors = tensors_in(out_file)
    return finished_file(
        out_file,
        tensors,
        kind="model",
        quant=chosen.name,
        architecture=plan.architecture,
        context_length=plan.model.context_length,
        stop_token_ids=plan.vocabulary.stop_ids,
    )


def _write_by_quantizer(
    plan: _Plan, out_file: Path, quant: GgufQuant, quantizer: Path, progress: Progress | None
) -> None:
    """Write the weights as they are into a file beside ``out_file``, and have it quantized."""
    whole = lossless_quant(plan.specs[EMBEDDING].dtype)
    tensors = plan.tensors(whole)
    require_new_file(out_file, tensors)
    require_free_space(out_file, 2 * sum(tensor.size_bytes for tensor in tensors))
    with tempfile.TemporaryDirectory(dir=out_file.parent, prefix=".gguf-") as folder:
        source = Path(folder) / "whole.gguf"
        write_gguf_file(source, plan.header(whole), tensors, plan.blocks, progress=progress)
        with atomic_file(out_file) as temporary:
            quantize_file(quantizer, source, temporary, quant)


def _plan(model_dir: Path, name: str, opened: ExitStack) -> _Plan:
    """Everything cheap is checked here."""
    refuse_unsafe_keys(model_dir)
    config = read_model_config(BaseRef(str(model_dir), model_dir))
    where = str(model_dir / "config.json")
    if config.get("quantization_config"):
        raise BaseModelError(f"{where}: the weights are quantized already", expected="16-bit weights", fix=_WHOLE_FIX)
    model = read_gguf_model(config, where=where)
    differences = weight_differences(model.architecture, locate_tensors(model_dir, error=BaseModelError))
    if differences:
        raise BaseModelError(
            f"{model_dir}: the weights are not those that config.json describes: {'; '.join(differences)}",
            expected="a complete checkpoint",
            fix=_WHOLE_FIX,
        )
    weights = opened.enter_context(WrittenTensors(model_dir))
    specs = {tensor: _spec(weights, tensor) for tensor in model.architecture.tensors()}
    if model.architecture.tied:
        _require_really_tied(weights, model_dir)
    vocabulary = read_vocabulary(model_dir, config, specs[EMBEDDING].shape[0])
    return _Plan(name, model, vocabulary, weights, specs)


def _spec(weights: Weights, tensor: str) -> TensorSpec:
    spec = weights.spec(tensor)
    if spec.dtype not in WEIGHT_DTYPES:
        raise BaseModelError(
            f"tensor {shown(tensor)} is {spec.dtype}", expected=f"one of {', '.join(WEIGHT_DTYPES)}", fix=_WHOLE_FIX
        )
    return spec


def _require_really_tied(weights: Weights, model_dir: Path) -> None:
    """A file that config.json calls tied may hold a head of its own; transformers 5 then uses it, with a warning."""
    import torch

    if HEAD not in weights:
        return
    same = weights.spec(HEAD) == weights.spec(EMBEDDING) and all(
        torch.equal(head.result, table.result)
        for head, table in zip(weights.blocks(HEAD), weights.blocks(EMBEDDING), strict=True)
    )
    if not same:
        raise BaseModelError(
            f"{model_dir}: config.json ties the head to the embedding, and the files hold another {HEAD}",
            expected="one of the two: a tied head, or tie_word_embeddings false",
            fix="set tie_word_embeddings to what the model was trained with, or delete the tensor",
        )
