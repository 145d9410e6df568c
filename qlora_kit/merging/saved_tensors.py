"""Whole tensors that an adapter brings (``modules_to_save``, ``bias``): which of the base's they replace, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.adapters import AdapterFiles
from qlora_kit.base_layout import BaseLayout
from qlora_kit.checkpoint import TensorSpec
from qlora_kit.errors import AdapterError, Fault
from qlora_kit.safetensors_header import shown

_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer"
_HEAD = "lm_head.weight"
_EMBEDDING_END = "embed_tokens.weight"
_FIX = "load the adapter on the base it was trained on, or train an adapter for this base"


@dataclass(frozen=True)
class SavedTensors:
    """What an adapter's whole tensors change in a base.

    Attributes:
        specs: The tensors of the output; a head of its own is added where the adapter unties it from the embedding.
        replaced: Tensor of the output to the adapter's tensor that takes its place.
        copied_from: Tensor of the output to the base's tensor of another name that it starts as.
        config: Keys of ``config.json`` that change with them.
    """

    specs: Mapping[str, TensorSpec]
    replaced: Mapping[str, str]
    copied_from: Mapping[str, str]
    config: Mapping[str, Any]


def locate_saved_tensors(files: AdapterFiles, specs: Mapping[str, TensorSpec], layout: BaseLayout) -> SavedTensors:
    """Where the adapter's biases and saved modules belong.

    PEFT holds a saved copy of the embedding or of the head beside the shared weight, so that the two are no longer one.
    More rows of both are a resized vocabulary.

    Args:
        files: The adapter.
        specs: The base's tensors as a merge writes them.
        layout: The base's layers.

    Raises:
        AdapterError: A tensor that the base lacks, or of another shape; with every such fault.
    """
    embedding = _embedding_name(specs)
    tied = _HEAD.removesuffix(".weight") in layout.tied
    replaced = {_base_name(name): name for name in (*_saved_names(files), *files.base_tensors)}
    faults: list[Fault] = []
    copied_from: dict[str, str] = {}
    config: dict[str, Any] = {}
    changed = dict(specs)
    shared = {_HEAD, embedding} & replaced.keys()
    if tied and shared:
        _refuse_kept_tied(files)
        config["tie_word_embeddings"] = False
        if _HEAD not in specs:
            changed[_HEAD] = specs[embedding]
            copied_from[_HEAD] = embedding
    for name, origin in replaced.items():
        shape = files.tensors[origin].shape
        spec = changed.get(name)
        if spec is None:
            faults.append(Fault(f"{files.weights}: brings {shown(name)}, which the base lacks", "its tensors", _FIX))
        elif spec.shape == shape:
            continue
        elif name in shared and len(shape) == 2 and shape[1:] == spec.shape[1:]:
            changed[name] = TensorSpec(spec.dtype, shape)
        else:
            what = f"{files.weights}: brings {shown(name)} of shape {shape}"
            faults.append(Fault(what, f"the base's shape {spec.shape}", _FIX))
    if faults:
        raise AdapterError.of(faults)
    vocabulary = _resized_vocabulary(files, specs, changed, embedding)
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    return SavedTensors(changed, replaced, copied_from, config)


def _refuse_kept_tied(files: AdapterFiles) -> None:
    """With ``ensure_weight_tying`` the copies are one again; PEFT 0.21 saves that one under a name it does not declare.

    Raises:
        AdapterError: The adapter was trained so.
    """
    if files.config.ensure_weight_tying:
        raise AdapterError(
            f"{files.weights}: brings the embedding or head of a tied base, trained with ensure_weight_tying",
            expected="a saved embedding or head that is no longer tied (the merge unties them)",
            fix="keep it as an adapter, or train one without ensure_weight_tying",
        )


def _saved_names(files: AdapterFiles) -> list[str]:
    rows = {files.token_tensor(module) for module in files.token_rows}
    magnitudes = {files.magnitude_tensor(module) for module in files.pairs}
    return [name for name in files.extra_tensors if name not in rows | magnitudes]


def _base_name(name: str) -> str:
    module, _, parameter = name.removeprefix(_PREFIX).rpartition(".")
    return f"{module.removesuffix(_BASE_LAYER)}.{parameter}"


def _embedding_name(specs: Mapping[str, TensorSpec]) -> str:
    return next((name for name in specs if name.endswith(_EMBEDDING_END)), "")


def _resized_vocabulary(
    files: AdapterFiles, base: Mapping[str, TensorSpec], changed: Mapping[str, TensorSpec], embedding: str
) -> int | None:
    """How many rows embedding and head have if not as many as the base's.

    Raises:
        AdapterError: Only one of them was resized.
    """
    sizes = {name: changed[name].shape[0] for name in (embedding, _HEAD) if name in changed}
    if all(name in base and base[name].shape[0] == size for name, size in sizes.items()):
        return None
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} has {size} rows" for name, size in sizes.items())
        raise AdapterError(
            f"{files.weights}: the vocabulary was resized, but not all of it was saved: {found}",
            expected="embedding and head with the same number of rows",
            fix="train again with modules_to_save: [embed_tokens, lm_head]",
        )
    size = sizes[embedding]
    return None if size == base[embedding].shape[0] else size
