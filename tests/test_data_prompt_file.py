"""Files of prompts: what must not be taken for something else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from qlora_kit.data.prompt_file import read_prompts
from qlora_kit.errors import DataError


@pytest.mark.parametrize("column", ["adaptor", "adapters", "Adapter", "sytem", "system "])
def test_a_misspelt_column_does_not_let_the_wrong_model_answer(tmp_path: Path, column: str) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt,{column}\nHello,sentiment\n")
    with pytest.raises(DataError, match="is unknown") as caught:
        read_prompts(path)
    assert "prompts.csv:2" in str(caught.value)
    assert "did you mean" in caught.value.faults[0].fix


def test_columns_that_nothing_uses_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("id,prompt,adapter\n7,Hello,sentiment\n")
    with caplog.at_level(logging.WARNING):
        (prompt,) = read_prompts(path)
    assert (prompt.text, prompt.adapter) == ("Hello", "sentiment")
    assert "nothing uses the columns id" in caplog.text
