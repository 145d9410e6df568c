"""Whether a base ever learned its stop token, measured on the rows of its embedding and head, and which rows to train.

A base model may come with a chat template whose stop token never stood in its training text (Qwen2.5 without Instruct:
``<|im_end|>``). Its row of the head is then still what it was when training began, or what years of other tokens pushed
it to; with a frozen head no adapter makes the model end an answer. How such rows are told from others follows Land and
Bartolo 2024 (https://arxiv.org/abs/2405.05417): they lie close to the rows of ids that no token uses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from qlora_kit.architecture import EMBEDDING, HEAD
from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.checkpoint import TensorSource
from qlora_kit.config import LoraSection
from qlora_kit.data.chat import read_turn_format
from qlora_kit.data.template_file import read_stop_facts
from qlora_kit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SAMPLED_ROWS, SAMPLED_BLOCKS, COMPARED_ROWS = 4096, 64, 256
NEAR = 0.1  # of the scale: as close as two rows that were trained never are
INSIDE_CLUSTER, MAX_CLUSTER = 2.0, 0.5  # of the unused rows' spread, of the scale
MIN_CLUSTER_ROWS = 8


@dataclass(frozen=True)
class RowFinding:
    """How the stop token's row of a matrix lies among the others.

    Attributes:
        module: ``embed_tokens`` or ``lm_head``.
        nearest: What the row lies nearest to, of the rows that hold nothing learned.
        distance: How far from it (L2).
        scale: How far ordinary rows lie from their mean, in the median: what a distance is measured by.
        untrained: Whether the row is one of those that hold nothing learned.
    """

    module: str
    nearest: str
    distance: float
    scale: float
    untrained: bool

    def __str__(self) -> str:
        ratio = self.distance / self.scale if self.scale else 0.0
        return f"{self.module}: {ratio:.2f} of an ordinary row's distance away from {self.nearest}"


@dataclass(frozen=True)
class StopTokenFinding:
    """What is known of a stop token at which the base itself does not stop.

    Attributes:
        token: The token that ends a turn by the chat template.
        token_id: Its id.
        model_stop_ids: Where the base's own generation stops.
        rows: Its rows; the head's is left out where it is the embedding.
    """

    token: str
    token_id: int
    model_stop_ids: tuple[int, ...]
    rows: tuple[RowFinding, ...]

    @property
    def untrained(self) -> tuple[str, ...]:
        """The matrices whose row was never trained."""
        return tuple(row.module for row in self.rows if row.untrained)

    def __str__(self) -> str:
        stops = ", ".join(map(str, self.model_stop_ids))
        measured = "; ".join(map(str, self.rows)) or "its rows cannot be read"
        return f"the template ends turns with {self.token} (id {self.token_id}), the base stops at {stops} ({measured})"


@dataclass(frozen=True)
class TokenRows:
    """Which rows of embedding and head are trained beside the adapter.

    Attributes:
        indices: Module name to token ids, as PEFT's ``trainable_token_indices``; empty for none.
        message: What a user should know about it.
    """

    indices: dict[str, tuple[int, ...]]
    message: str | None = None


def examine_stop_token(ref: BaseRef, tokenizer: PreTrainedTokenizerBase) -> StopTokenFinding | None:
    """Measure the stop token's rows; None for a base that stops there itself, or does not say where it stops.

    Args:
        ref: The base.
        tokenizer: Its tokenizer.

    Raises:
        BaseModelError: The base's files cannot be read, or the template ends turns with no control token.
    """
    turn = read_turn_format(tokenizer)
    stops = read_stop_facts(ref.path, read_model_config(ref)).generation_ids
    if not stops or turn.stop_id in stops:
        return None
    with TensorSource(ref.path) as source:
        names = _row_tensors(source, ref)
        rows = [_examine_row(source, module, name, turn.stop_id, tokenizer) for module, name in names.items()]
    return StopTokenFinding(turn.stop, turn.stop_id, stops, tuple(rows))


def choose_token_rows(ref: BaseRef, tokenizer: PreTrainedTokenizerBase, lora: LoraSection) -> TokenRows:
    """The rows that ``lora.trainable_token_indices`` asks for; ``auto``: the stop token's, where they are untrained.

    Args:
        ref: The base.
        tokenizer: Its tokenizer.
        lora: The configuration.

    Raises:
        ConfigError: Ids that the base does not have, or modules that are trained whole already.
        BaseModelError: The base's files cannot be read.
    """
    asked = lora.trainable_token_indices
    if asked is None:
        return TokenRows({})
    if asked == "auto":
        return _automatic_rows(examine_stop_token(ref, tokenizer), lora)
    with TensorSource(ref.path) as source:
        names = _row_tensors(source, ref)
        too_large = [token for name in names.values() for token in asked if token >= source.shape(name)[0]]
    whole = [module for module in names if _is_trained_whole(module, lora)]
    if too_large or whole or EMBEDDING not in names:
        what = f"{too_large[0]} is no row of {ref.id}" if too_large else f"{ref.id} has no {EMBEDDING} of plain weights"
        what = f"lora.modules_to_save trains {whole[0]} whole" if whole else what
        raise ConfigError(
            f"lora.trainable_token_indices: {what}",
            expected=f"ids of rows of {EMBEDDING} and {HEAD}, which are trained in no other way",
            fix="correct the ids, or leave lora.trainable_token_indices out",
        )
    return TokenRows({module: tuple(sorted(set(asked))) for module in names})


def _automatic_rows(finding: StopTokenFinding | None, lora: LoraSection) -> TokenRows:
    if finding is None:
        return TokenRows({})
    modules = [module for module in finding.untrained if not _is_trained_whole(module, lora)]
    if not modules:
        return TokenRows({}, f"{finding}: nothing is done about it, answers end where the template says")
    return TokenRows(
        dict.fromkeys(modules, (finding.token_id,)),
        f"{finding}: that row was never trained, so it is trained with the adapter "
        "(lora.trainable_token_indices: null leaves it as it is)",
    )


def _is_trained_whole(module: str, lora: LoraSection) -> bool:
    """Whether ``modules_to_save`` names the embedding or the head; for PEFT its names are endings."""
    return f"model.{module}".endswith(lora.modules_to_save)


def _row_tensors(source: TensorSource, ref: BaseRef) -> dict[str, str]:
    """Module to tensor name: the embedding, and the head where it is a matrix of its own, if they are not packed."""
    embedding = [name for name in source.names if f".{name}".endswith(f".{EMBEDDING}.weight")]
    head = [name for name in source.names if f".{name}".endswith(f".{HEAD}.weight")]
    tied = read_model_config(ref).get("tie_word_embeddings") is True
    found = {EMBEDDING: embedding, HEAD: [] if tied else head}
    return {module: names[0] for module, names in found.items() if len(names) == 1 and source.dtype(names[0]) != "U8"}


def _examine_row(
    source: TensorSource, module: str, name: str, stop_id: int, tokenizer: PreTrainedTokenizerBase
) -> RowFinding:
    import torch

    control = {token: text.content for token, text in tokenizer.added_tokens_decoder.items() if token != stop_id}
    rows = source.shape(name)[0]
    unused = _spread(range(len(tokenizer), rows), COMPARED_ROWS)
    others = [token for token in sorted(control)[:COMPARED_ROWS] if token < rows]
    sampled = [token for token in _sampled_ids(min(len(tokenizer), rows)) if token not in control and token != stop_id]
    ordinary = _read_rows(source, name, sampled)  # (N, H)
    stop = _read_rows(source, name, [stop_id])[0]  # (H)
    mean = ordinary.mean(dim=0)
    scale = float((ordinary - mean).norm(dim=1).median())
    empty = _read_rows(source, name, unused)  # (U, H)
    near = [(float(stop.norm()), "zero"), (float((stop - mean).norm()), "the mean of the ordinary rows")]
    near += _distances(stop, empty, [f"the row of the unused id {token}" for token in unused])
    near += _distances(stop, _read_rows(source, name, others), [f"the row of {control[token]}" for token in others])
    distance, nearest = min(near)
    untrained = distance <= NEAR * scale
    if not untrained and len(unused) >= MIN_CLUSTER_ROWS:
        center = empty.mean(dim=0)
        spread = float(torch.quantile((empty - center).norm(dim=1), 0.95))
        to_center = float((stop - center).norm())
        if to_center <= min(INSIDE_CLUSTER * spread, MAX_CLUSTER * scale):
            untrained, distance, nearest = True, to_center, f"the middle of {len(unused)} unused rows"
    return RowFinding(module, nearest, distance, scale, untrained)


def _distances(stop: torch.Tensor, rows: torch.Tensor, names: Sequence[str]) -> list[tuple[float, str]]:
    return list(zip((rows - stop).norm(dim=1).tolist(), names, strict=True))


def _sampled_ids(count: int) -> list[int]:
    """Ids from 0 to ``count`` in evenly spread blocks, because neighbours are read at once."""
    if count <= SAMPLED_ROWS:
        return list(range(count))
    size = SAMPLED_ROWS // SAMPLED_BLOCKS
    starts = [index * (count - size) // (SAMPLED_BLOCKS - 1) for index in range(SAMPLED_BLOCKS)]
    return [token for start in starts for token in range(start, start + size)]


def _spread(ids: range, count: int) -> list[int]:
    return list(ids) if len(ids) <= count else [ids[index * len(ids) // count] for index in range(count)]


def _read_rows(source: TensorSource, name: str, ids: Sequence[int]) -> torch.Tensor:
    """The rows ``ids`` (ascending) of a matrix in fp32: (N, H), reading each run of neighbours at once."""
    import torch

    if not ids:
        return torch.empty(0, source.shape(name)[1])
    return torch.cat([source.rows(name, first, last + 1).float() for first, last in _runs(ids)])


def _runs(ids: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending ids as (first, last) of each run without a gap."""
    listed = list(ids)
    edges = [0, *(index + 1 for index, (a, b) in enumerate(pairwise(listed)) if b != a + 1), len(listed)]
    return [(listed[start], listed[stop - 1]) for start, stop in pairwise(edges)]
