"""The nearest known word."""

from __future__ import annotations

from qlora_kit.suggest import advice, nearest


def test_nearest() -> None:
    assert nearest("Learning_Rat", ["learning_rate", "r"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate"]) is None
    assert advice("zzz", ["learning_rate"]) == "use one of the names above, or remove it"
