"""Tokenises checked examples batch by batch: over-long rows and rows that cannot be encoded go to the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal

from qlora_kit.config import RunConfig
from qlora_kit.data.chat import read_turn_format
from qlora_kit.data.encoding import IGNORED_LABEL, Encoded, LossOn, Unencodable, encode_rows, self_check
from qlora_kit.data.ledger import Ledger, Problem, split_source
from qlora_kit.formats import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.segments import SegmentRenderer

Overlength = Literal["stop", "drop", "truncate"]

BATCH_ROWS = 1000
SELF_CHECKED_ROWS = 32


@dataclass(frozen=True)
class TokenRules:
    """What becomes of a conversation when it is tokenised.

    Attributes:
        max_length: Longest row allowed, in tokens.
        loss_on: Supervise all assistant turns, or the last one only.
        overlength: What to do with a longer row: stop with all of them listed, drop it, or truncate it. Truncating
            keeps as many whole turns as fit; where not even the first answer fits, the answer itself is cut and its
            stop token lost, and the ledger says so. A row whose prompt alone fills ``max_length`` is dropped.
    """

    max_length: int
    loss_on: LossOn
    overlength: Overlength

    @classmethod
    def of(cls, config: RunConfig) -> TokenRules:
        """The rules that a config gives."""
        return cls(config.train.max_length, config.data.loss_on, config.data.overlength)


def tokenise(
    examples: Iterable[Example],
    tokenizer: PreTrainedTokenizerBase,
    rules: TokenRules,
    *,
    ledger: Ledger,
    split: str,
    renderer: SegmentRenderer | None = None,
) -> Iterator[list[Encoded]]:
    """Token ids and labels of the rows that are kept, a batch at a time, in their order.

    Args:
        examples: Checked rows; read as they are needed.
        tokenizer: The base model's tokenizer.
        rules: What to do with long rows, and what to supervise.
        ledger: Told of each row dropped, truncated or refused, of the rows' lengths and of the supervised tokens.
        split: The split's name in the ledger.
        renderer: Renders in place of the template, where that is proven to be the same.

    Raises:
        ContentChangesTemplate: ``renderer`` cannot be used for these rows.
        BaseModelError: The tokenizer has no usable chat template, or what it encodes does not decode to the answer.
    """
    ends = {read_turn_format(tokenizer).stop_id, tokenizer.eos_token_id}
    remaining = iter(examples)
    batch = list(islice(remaining, BATCH_ROWS))
    self_check(batch[:SELF_CHECKED_ROWS], tokenizer, loss_on=rules.loss_on)
    while batch:
        kept = []
        encodings = encode_rows(batch, tokenizer, loss_on=rules.loss_on, renderer=renderer)
        for example, encoded in zip(batch, encodings, strict=True):
            row = _kept(example, encoded, rules, ledger=ledger, split=split)
            if row is not None:
                ledger.lengths[split][len(row.input_ids)] += 1
                ledger.supervised_tokens[split] += row.supervised_tokens
                ledger.stopped_rows[split] += row.labels[-1] in ends
                kept.append(replace(row, source=example.source))
        yield kept
        batch = list(islice(remaining, BATCH_ROWS))


def _kept(
    example: Example, encoded: Encoded | Unencodable, rules: TokenRules, *, ledger: Ledger, split: str
) -> Encoded | None:
    """The row as it is trained on; None when it went to the ledger."""
    file, line = split_source(example.source)
    if isinstance(encoded, Unencodable):
        ledger.refuse(split, Problem(file, line, encoded.reason, encoded.expected, encoded.fix))
        ledger.record(split, example.source, "dropped", encoded.reason)
        return None
    length = len(encoded.input_ids)
    if length <= rules.max_length:
        return encoded
    reason = f"{length} tokens, max_length is {rules.max_length}"
    if rules.overlength == "stop":
        fix = "raise train.max_length, shorten the row, or set data.overlength to drop or truncate"
        expected = f"at most train.max_length = {rules.max_length} tokens"
        ledger.refuse(split, Problem(file, line, f"{length} tokens long", expected, fix, stops=True))
        ledger.record(split, example.source, "dropped", reason)
        return None
    shorter, lost = None, ""
    if rules.overlength == "truncate" and example.text is not None:
        shorter = Encoded(encoded.input_ids[: rules.max_length], encoded.labels[: rules.max_length])
        lost = f": the text was cut, its last {length - rules.max_length} tokens are lost"
    elif rules.overlength == "truncate":
        shorter, lost = _shorten(encoded, rules.max_length)
    ledger.record(split, example.source, "dropped" if shorter is None else "truncated", reason + lost)
    return shorter


def _shorten(encoded: Encoded, max_length: int) -> tuple[Encoded | None, str]:
    """The row cut to ``max_length``, after a whole turn if one fits, and what was lost; None if no answer is left."""
    labels = encoded.labels[:max_length]
    cut_inside = encoded.labels[max_length] != IGNORED_LABEL and labels[-1] != IGNORED_LABEL
    end = _last_supervised_end(labels, before_open_run=cut_inside)
    if end > 0:
        kept = Encoded(encoded.input_ids[:end], labels[:end])
        lost = encoded.supervised_tokens - kept.supervised_tokens
        return kept, f": later turns with {lost} supervised tokens were cut off, whole turns are left"
    if all(label == IGNORED_LABEL for label in labels):
        return None, ": the prompt alone fills it, no answer token would be left"
    kept = Encoded(encoded.input_ids[:max_length], labels)
    lost = encoded.supervised_tokens - kept.supervised_tokens
    return kept, f": the answer was cut, {lost} of its supervised tokens and its stop token are lost"


def _last_supervised_end(labels: list[int], *, before_open_run: bool) -> int:
    """One past the last supervised token of a complete turn, 0 if there is none."""
    end = len(labels)
    while before_open_run and end > 0 and labels[end - 1] != IGNORED_LABEL:
        end -= 1
    while end > 0 and labels[end - 1] == IGNORED_LABEL:
        end -= 1
    return end
