"""The nearest known word."""

from __future__ import annotations

from qlora_kit.suggest import MAX_WORD_LENGTH, advice, like, nearest


def test_nearest() -> None:
    assert nearest("Learning_Rat", ["learning_rate", "r"]) == "learning_rate"
    assert nearest("zzz", ["learning_rate"]) is None
    assert advice("zzz", ["learning_rate"]) == "use one of the names above, or remove it"


def test_several_like_words_the_nearest_first() -> None:
    assert like("Review", ["reviews-2", "stories", "reviews"], most=3, cutoff=0.5) == ["reviews", "reviews-2"]
    assert like("review", ["reviews-2", "reviews"], most=1) == ["reviews"]
    assert nearest("adaptors", ["adapter"], cutoff=0.9) is None


def test_of_a_word_without_end_the_beginning_is_compared() -> None:
    assert nearest("r" * MAX_WORD_LENGTH, ["r" * MAX_WORD_LENGTH]) is not None
    assert nearest("r" * MAX_WORD_LENGTH + "x" * 10**7, ["r" * MAX_WORD_LENGTH]) is not None
