"""The data check on its own: everything that training does to the rows before a model is loaded, as one report."""

from __future__ import annotations

from collections.abc import Sequence

from qlora_kit.base_files import resolve_description
from qlora_kit.config import RunConfig
from qlora_kit.data.chat import control_tokens
from qlora_kit.data.ledger import DataReport, Problem
from qlora_kit.data.preparing import examine
from qlora_kit.data.tokenising import encode_split
from qlora_kit.errors import DataError
from qlora_kit.models import load_tokenizer


def check(config: RunConfig) -> tuple[DataReport, Sequence[Problem]]:
    """Read, check and tokenise all splits of ``config`` with its base's tokenizer.

    Returns:
        The report, and the problems because of which ``train`` would refuse the data.
    """
    tokenizer = load_tokenizer(resolve_description(config.model.base, config.model.revision))
    data = examine(config, control_tokens=control_tokens(tokenizer))
    stopping = list(data.stopping)
    for split, examples in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        if not examples:
            continue
        known = len(data.ledger.problems)
        try:
            encode_split(config, examples, tokenizer, ledger=data.ledger, split=split)
        except DataError:
            stopping += data.ledger.problems[known:]
    return data.report, stopping
