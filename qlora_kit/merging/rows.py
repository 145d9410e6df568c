"""The adapter's own validation rows, as far as its config and contract lead to them: a plan in, encoded rows out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.adapters import AdapterContract, DataFile
from qlora_kit.adapters.card import RUN_CONFIG_FILE
from qlora_kit.config import load_config
from qlora_kit.conversation import Example
from qlora_kit.data.chat import control_tokens
from qlora_kit.data.encoding import encode_texts
from qlora_kit.data.preparing import prepare
from qlora_kit.errors import ConfigError, DataError
from qlora_kit.likelihood import Loss
from qlora_kit.merging.planning import MergePlan
from qlora_kit.merging.probes import SOME_NUMBERS
from qlora_kit.models import load_tokenizer
from qlora_kit.reference_answers import encode_answers
from qlora_kit.tasks import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.encoding import Encoded

MAX_ROWS = 64
LOGITS_BYTES = 64 * 2**20
ACTIVATION_BYTES = 192 * 2**20
_ACTIVATIONS = 3  # of the widest layer, in fp32, at a time
_FP32_BYTES = 4


@dataclass(frozen=True)
class ValidationRows:
    """Rows that a merge is measured on.

    Attributes:
        task: Says system prompt, metrics and the longest answer.
        examples: At most ``MAX_ROWS``, from the first.
        batch_size: How many of them are answered at once.
        encoded: As many of them, from the first, as fit the memory for measuring logits; their answers supervised.
    """

    task: Task
    examples: tuple[Example, ...]
    batch_size: int
    encoded: tuple[Encoded, ...]


def validation_rows(plan: MergePlan) -> ValidationRows | str:
    """The validation rows of the adapter's own config, from files that are as in training; or why there are none."""
    if plan.adapter is None:
        return "no adapter"
    rows = read_rows(plan.adapter.folder, plan.contract, load_tokenizer(plan.base))
    if isinstance(rows, str):
        return rows
    kept = _within_memory(plan, rows.encoded)
    return replace(rows, encoded=kept) if kept else "no validation row fits the memory for measuring"


def read_rows(
    folder: Path, contract: AdapterContract | None, tokenizer: PreTrainedTokenizerBase
) -> ValidationRows | str:
    """As ``validation_rows``, all of them that count.

    Args:
        folder: The adapter's.
        contract: Its contract; None where nothing says what its data were.
        tokenizer: The base's.
    """
    path = folder / RUN_CONFIG_FILE
    if not path.is_file():
        return f"there is no {RUN_CONFIG_FILE} beside the adapter, so no validation rows"
    try:
        config = load_config(path)
        names = tuple(entry for entry in config.data.validation if isinstance(entry, str))
        if not names:
            return "the adapter's config names no validation file"
        only = config.data.model_copy(update={"train": (), "validation": names, "test": (), "mix": ()})
        prepared = prepare(config.model_copy(update={"data": only}), control_tokens=control_tokens(tokenizer))
        changed = _changed_file(contract, prepared.ledger.data_files("validation"))
        if changed is not None:
            return f"the validation file {changed} is not the one of training"
        examples = prepared.validation[:MAX_ROWS]
        texts = [example.text for example in examples if example.text is not None]
        conversations = [example.messages for example in examples]
        encoded = encode_texts(texts, tokenizer) if texts else encode_answers(examples, conversations, tokenizer)
    except (ConfigError, DataError) as error:
        return f"the validation rows cannot be used ({error.faults[0].what})"
    if not encoded:
        return "the validation files hold no rows"
    return ValidationRows(config.task_spec(), tuple(examples), config.eval.batch_size, tuple(encoded))


def rows_loss(rows: Sequence[Encoded], logits: Sequence[torch.Tensor]) -> Loss:
    """The loss of the rows' answers.

    Args:
        rows: With supervised answers.
        logits: Of each row at the positions that predict its answer: (supervised tokens, V).
    """
    import torch
    from torch.nn.functional import cross_entropy

    nlls = []
    for row, found in zip(rows, logits, strict=True):
        targets = torch.tensor(row.input_ids[-row.supervised_tokens :])
        step = max(1, SOME_NUMBERS // found.shape[-1])
        parts = zip(found.split(step), targets.split(step), strict=True)
        nlls.append(sum(float(cross_entropy(some.double(), wanted, reduction="sum")) for some, wanted in parts))
    return Loss(tuple(nlls), tuple(row.supervised_tokens for row in rows))


def _changed_file(contract: AdapterContract | None, files: Sequence[DataFile]) -> str | None:
    """A file whose bytes the contract does not know; an adopted or combined adapter may record none."""
    known = () if contract is None else tuple(file.sha256 for file in contract.data if file.split == "validation")
    return next((file.name for file in files if known and file.sha256 not in known), None)


def _within_memory(plan: MergePlan, rows: Sequence[Encoded]) -> tuple[Encoded, ...]:
    """As many rows, from the first, as fit the memory for logits and activations."""
    widest = max((max(shape) for name, shape in plan.layout.linear_shapes.items() if name != "lm_head"), default=1)
    most_logits = LOGITS_BYTES // (_FP32_BYTES * plan.vocabulary)
    most_tokens = ACTIVATION_BYTES // (_FP32_BYTES * _ACTIVATIONS * widest)
    kept: list[Encoded] = []
    longest = logits = 0
    for row in rows:
        longest, logits = max(longest, len(row.input_ids)), logits + row.supervised_tokens
        if logits > most_logits or longest * (len(kept) + 1) > most_tokens:
            break
        kept.append(row)
    return tuple(kept)
