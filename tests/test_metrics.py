"""Metrics against hand computation, sacrebleu and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu

from qlora_kit import metrics

PREDICTIONS = ["a", "a", "b", "b", "c", "odd"]
REFERENCES = ["a", "b", "b", "b", "c", "c"]
FRENCH = ["le petit chat dort dans la maison .", "la table est rouge .", "nous aimons le jardin vert ."]
GUESSES = ["le petit chien dort dans la maison .", "la table est rouges .", "nous aimons les jardins verts ."]


def test_accuracy() -> None:
    assert metrics.accuracy([" a\n", "b"], ["a", "a"]) == 0.5


def test_macro_f1_by_hand() -> None:
    # a: TP 1, FP 1, FN 0 -> 2/3; b: TP 2, FP 0, FN 1 -> 4/5; c: TP 1, FP 0, FN 1 -> 2/3; "odd" is no class
    assert metrics.macro_f1(PREDICTIONS, REFERENCES) == pytest.approx((2 / 3 + 4 / 5 + 2 / 3) / 3)
    assert metrics.macro_f1(["x", "x"], ["a", "b"]) == 0.0


def test_macro_f1_by_precision_and_recall() -> None:
    generator = np.random.default_rng(1)
    truth, guess = (list(generator.choice(["a", "b", "c"], 50)) for _ in range(2))
    scores = []
    for label in "abc":
        hits = sum(p == t == label for p, t in zip(guess, truth, strict=True))
        precision, recall = hits / guess.count(label), hits / truth.count(label)
        scores.append(2 * precision * recall / (precision + recall))
    assert metrics.macro_f1(guess, truth) == pytest.approx(sum(scores) / 3)


def test_squad_normalisation_and_scores() -> None:
    assert metrics.normalize_answer(" The  Small, blue box! ") == "small blue box"
    assert metrics.normalize_answer("another theatre") == "another theatre"
    assert metrics.exact_match(["a Box.", "box"], ["the box", "bag"]) == 0.5
    # shared words: small, box -> precision 2/2, recall 2/3
    assert metrics.token_f1(["the small box"], ["small blue box"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
    assert metrics.token_f1(["x x"], ["x"]) == pytest.approx(2 / 3)
    assert metrics.token_f1(["the", "", "x"], ["a", "x", "y"]) == pytest.approx(1 / 3)


def test_chrf_and_bleu_are_sacrebleus() -> None:
    assert metrics.chrf(GUESSES, FRENCH) == pytest.approx(sacrebleu.corpus_chrf(GUESSES, [FRENCH]).score)
    assert metrics.bleu(GUESSES, FRENCH) == pytest.approx(sacrebleu.corpus_bleu(GUESSES, [FRENCH]).score)
    assert metrics.chrf(FRENCH, FRENCH) == pytest.approx(100)
    assert metrics.bleu(FRENCH, FRENCH) == pytest.approx(100)


def test_bleu_from_summed_counts_is_corpus_bleu() -> None:
    counts = metrics._bleu_counts(GUESSES, FRENCH)
    assert metrics._bleu_of_counts(counts) == pytest.approx(sacrebleu.corpus_bleu(GUESSES, [FRENCH]).score)


def test_perplexity() -> None:
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e9, 1) == math.inf
    with pytest.raises(ValueError, match="no tokens"):
        metrics.perplexity(0.0, 0)
    score = metrics.score_perplexity([math.log(2), 3 * math.log(4)], [1, 3])
    assert score.value == pytest.approx(2 ** (7 / 4))
    assert score.n == 2
    assert score.ci95[0] == pytest.approx(2)
    assert score.ci95[1] == pytest.approx(4)


def test_bootstrap_is_repeatable_and_near_the_normal_interval() -> None:
    rows = np.random.default_rng(3).normal(5.0, 2.0, 400)
    low, high = metrics.bootstrap_ci95(rows)
    half = 1.96 * rows.std(ddof=1) / math.sqrt(len(rows))
    assert (low, high) == metrics.bootstrap_ci95(rows) != metrics.bootstrap_ci95(rows, seed=1)
    assert low == pytest.approx(rows.mean() - half, abs=0.05)
    assert high == pytest.approx(rows.mean() + half, abs=0.05)
    shifted = metrics.bootstrap_ci95(rows, centre=float(rows.mean()) + 1)
    assert shifted == (pytest.approx(low + 1), pytest.approx(high + 1))
    assert metrics.bootstrap_ci95([1.0, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize("name", [name for name, metric in metrics.METRICS.items() if metric.source == "text"])
def test_score_text_brackets_the_plain_value(name: str) -> None:
    plain = {
        "accuracy": metrics.accuracy,
        "macro_f1": metrics.macro_f1,
        "exact_match": metrics.exact_match,
        "token_f1": metrics.token_f1,
        "chrf": metrics.chrf,
        "bleu": metrics.bleu,
    }
    score = metrics.score_text(name, GUESSES * 5, FRENCH * 5)
    assert score.value == pytest.approx(plain[name](GUESSES * 5, FRENCH * 5))
    assert score.n == 15
    assert score.ci95[0] <= score.value + 1e-9
    assert score.value - 1e-9 <= score.ci95[1]
    assert metrics.METRICS[name].name == name


def test_score_rows() -> None:
    score = metrics.score_rows("pass@1", [1, 0, 1, 1])
    assert score.value == 0.75
    assert 0 <= score.ci95[0] <= 0.75 <= score.ci95[1] <= 1


def test_what_cannot_be_scored() -> None:
    for predictions in (["a"], []):
        with pytest.raises(ValueError, match="at least one"):
            metrics.accuracy(predictions, [])
    with pytest.raises(ValueError, match="not computed from texts"):
        metrics.score_text("pass@1", ["a"], ["a"])
    with pytest.raises(ValueError, match="no rows"):
        metrics.score_rows("pass@1", [])
