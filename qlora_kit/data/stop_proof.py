"""Where answers end: that training supervises it in every row, and that the base's own settings agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.base_files import BaseRef, read_model_config
from qlora_kit.data.chat import read_turn_format
from qlora_kit.data.ledger import Ledger
from qlora_kit.data.template_file import read_stop_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class StopProof:
    """Where answers end.

    Attributes:
        token: The control token that ends an answer by the chat template.
        token_id: Its id, where the kit's own generation stops.
        supervised_rows: Rows whose last supervised token ends an answer.
        cut_rows: Rows that ``data.overlength: truncate`` robbed of it.
        tokenizer_eos_id: What the tokenizer calls the end of a text.
        generation_ids: Where transformers' ``generate`` stops by the base's own settings.
    """

    token: str
    token_id: int
    supervised_rows: int
    cut_rows: int
    tokenizer_eos_id: int | None
    generation_ids: tuple[int, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What does not agree, and what follows from it."""
        found = []
        if self.cut_rows:
            found.append(
                f"{self.cut_rows:,} answers were cut and end without {self.token}: from them the model learns to go on"
            )
        if self.generation_ids and self.token_id not in self.generation_ids:
            found.append(
                f"answers end with {self.token} ({self.token_id}), but the base's generation_config.json stops at "
                f"{', '.join(map(str, self.generation_ids))}: the kit stops at {self.token} and `merge` adds it; other "
                "programs that load the adapter on this base must be told"
            )
        if self.tokenizer_eos_id != self.token_id and self.token_id not in self.generation_ids:
            found.append(f"the tokenizer's eos_token is id {self.tokenizer_eos_id}, not {self.token}: a base model's")
        return tuple(found)


def prove_stops(ref: BaseRef, tokenizer: PreTrainedTokenizerBase, ledger: Ledger) -> StopProof:
    """Look at the rows' ends as ``ledger`` counted them, and at the settings of the base in ``ref``.

    Raises:
        BaseModelError: The template ends turns with nothing, or a settings file is no sound JSON.
    """
    turn_format = read_turn_format(tokenizer)
    return StopProof(
        token=turn_format.stop,
        token_id=turn_format.stop_id,
        supervised_rows=ledger.stopped_rows.total(),
        cut_rows=sum(rows for counts in ledger.lengths.values() for rows in counts.values())
        - ledger.stopped_rows.total(),
        tokenizer_eos_id=tokenizer.eos_token_id,
        generation_ids=read_stop_facts(ref.path, read_model_config(ref)).generation_ids,
    )
