"""Rows beyond the base's context are told before training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora_kit.base_files import BaseRef
from qlora_kit.data.ledger import Ledger
from qlora_kit.training.context import tell_beyond_context


@pytest.mark.parametrize(
    ("context", "told"),
    [(100, []), (99, ["1 rows"]), (8, ["4 rows", "8 positions", "longest 100", "train.max_length to 8"]), (None, [])],
)
def test_rows_beyond_the_context_are_counted(
    context: int | None, told: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {} if context is None else {"max_position_embeddings": context}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ledger = Ledger()
    ledger.lengths["train"].update({8: 5, 9: 3})
    ledger.lengths["validation"].update({100: 1})
    tell_beyond_context(BaseRef("base", tmp_path), ledger)
    assert len(caplog.records) == bool(told)
    assert all(part in caplog.text for part in told)
