"""Writes the merged checkpoint into a folder: its tensors block by block, and the base's small files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.checkpoint import ShardWriter, TensorSpec, torch_dtype
from qlora_kit.data.template_file import read_stop_facts
from qlora_kit.errors import AdapterError, GuardError
from qlora_kit.merging.arithmetic import all_finite
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.tensors import AdapterTensors, MergeTensors, Rows
from qlora_kit.safetensors_header import shown

if TYPE_CHECKING:
    import torch

_GENERATION_FILE = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
COPIED_FILES = (_GENERATION_FILE, *_TOKENIZER_FILES, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


@dataclass(frozen=True)
class WrittenWeights:
    """What was written: the tensors' size, how many numbers the adapter targets, how many of them it changed."""

    weight_bytes: int
    adapted_weights: int
    changed_weights: int


def require_effect(plan: MergePlan) -> None:
    """Refuse an adapter that cannot change anything before anything is written.

    Raises:
        AdapterError: One factor of each pair is zero, and nothing else is trained.
    """
    if plan.adapter is None:
        return
    with closing(AdapterTensors(plan)) as adapter:
        pairs = (adapter.factors(module) for module in plan.files.pairs)
        if plan.token_rows or plan.replaced or any(bool(pair.a.any()) and bool(pair.b.any()) for pair in pairs):
            return
    raise changes_nothing(plan, "every B·A is zero")


def write_weights(
    plan: MergePlan, folder: Path, *, max_shard_bytes: int, progress: Callable[[int, int], None] | None
) -> WrittenWeights:
    """Write the tensors of ``plan.specs`` to ``folder``, with one block of rows at a time in memory.

    Args:
        plan: What to merge.
        folder: An existing folder.
        max_shard_bytes: Shards hold at most so many bytes of tensors.
        progress: Called with the bytes done and the bytes in all after each block.

    Raises:
        AdapterError: No weight is changed after the rounding, or what the adapter brings does not fit the dtype.
        BaseModelError: A tensor of the base cannot be read or is not finite.
        GuardError: A merged weight is not finite.
    """
    adapted = changed = done_bytes = 0
    total_bytes = sum(spec.size_bytes for spec in plan.specs.values())
    with (
        MergeTensors(plan, four_bit=plan.onto == "dequantized") as tensors,
        ShardWriter(folder, plan.specs, max_shard_bytes=max_shard_bytes) as writer,
    ):
        for name, spec in plan.specs.items():
            dtype = torch_dtype(spec.dtype)
            for rows in tensors.blocks(name):
                written = rows.result.to(dtype)
                if rows.merged is not None and not all_finite(written):
                    raise _not_finite(name, dtype)
                counts = _counts(plan, name, rows, written)
                adapted, changed = adapted + counts[0], changed + counts[1]
                _write_block(writer, name, spec, written)
                done_bytes += written.numel() * written.element_size()
                if progress is not None:
                    progress(done_bytes, total_bytes)
    if not changed and plan.adapter is not None:
        raise changes_nothing(plan, "every change is smaller than the rounding of the base's dtype")
    return WrittenWeights(total_bytes, adapted, changed)


def _not_finite(name: str, dtype: torch.dtype) -> GuardError:
    return GuardError(
        f"tensor {shown(name)}: the merged weight is not finite in {dtype}",
        expected="weights within the range of the base's dtype",
        fix="train with a smaller learning rate or lora_alpha, or merge onto a bf16 copy of the base",
    )


def _write_block(writer: ShardWriter, name: str, spec: TensorSpec, block: torch.Tensor) -> None:
    if block.numel() == prod(spec.shape):
        writer.write(name, block.view(spec.shape))
    else:
        writer.write_rows(name, block)


def _counts(plan: MergePlan, name: str, rows: Rows, written: torch.Tensor) -> tuple[int, int]:
    """How many numbers of a block the adapter targets, and how many of them it changed."""
    if rows.merged is None:
        return 0, 0
    is_partial = name in plan.token_rows
    ids = plan.token_rows[name].ids if is_partial else ()
    inside = sum(rows.start <= row < rows.start + written.shape[0] for row in ids)
    targeted = inside * prod(written.shape[1:]) if is_partial else written.numel()
    if rows.used is None:
        return targeted, targeted
    return targeted, int((written != rows.used.to(written.dtype)).count_nonzero())


def copy_small_files(plan: MergePlan, folder: Path) -> None:
    """Copy configuration, tokenizer, chat template and licence from the base into ``folder``.

    Where the base's generation does not stop at the token that ends a turn by the chat template, the copy's does.
    """
    config = json.loads((plan.base.path / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    write_json(folder / "config.json", {**config, **plan.config})
    for name in COPIED_FILES:
        path = plan.base.path / name
        if path.is_file():
            shutil.copyfile(path, folder / name)
    if "vocab_size" in plan.config:  # the new tokens are in the tokenizer that training saved
        for name in _TOKENIZER_FILES:
            path = plan.files.folder / name
            if path.is_file():
                shutil.copyfile(path, folder / name)
    stops = read_stop_facts(plan.base.path, config)
    if stops.agree is False:  # of a base that was never taught to end a turn; the adapter is what teaches it
        path = folder / _GENERATION_FILE
        defaults = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        write_json(path, {**defaults, "eos_token_id": [stops.token_id, *stops.generation_ids]})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write one JSON object, in the order of its keys."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def changes_nothing(plan: MergePlan, reason: str) -> AdapterError:
    """The error for an adapter that is there without any effect."""
    return AdapterError(
        f"{plan.files.weights}: the adapter changes nothing: {reason}",
        expected="a trained adapter",
        fix="check that the training ran (loss fell, learning rate above zero), and merge its best checkpoint",
    )
