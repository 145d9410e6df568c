"""Pure scorers: predictions and references in, a number out, with a bootstrap confidence interval.

Shares lie in 0-1; ``chrf`` and ``bleu`` are sacrebleu's, in 0-100. Nothing here loads a model.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np  # imported where it is used: every command that reads a config would wait for it
    from numpy.typing import ArrayLike, NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references) or not references:
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; as many of each, at least one"
        )


def normalize_answer(text: str) -> str:
    """SQuAD's (Rajpurkar et al. 2016): lower case, no ASCII punctuation or English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _token_f1(prediction: str, reference: str) -> float:
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not predicted or not expected:
        return float(predicted == expected)
    shared = sum((Counter(predicted) & Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected))


def accuracy_rows(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row: 1 where prediction and reference are the same but for white space around them."""
    _check_pairs(predictions, references)
    return [float(a.strip() == b.strip()) for a, b in zip(predictions, references, strict=True)]


def exact_match_rows(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row: 1 where prediction and reference are equal after ``normalize_answer``."""
    _check_pairs(predictions, references)
    return [float(normalize_answer(a) == normalize_answer(b)) for a, b in zip(predictions, references, strict=True)]


def token_f1_rows(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row: F1 of the bags of normalised words, as SQuAD's script computes it."""
    _check_pairs(predictions, references)
    return [_token_f1(a, b) for a, b in zip(predictions, references, strict=True)]


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows that are the same but for white space around them."""
    import numpy as np

    return float(np.mean(accuracy_rows(predictions, references)))


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of rows that are equal after SQuAD's normalisation."""
    import numpy as np

    return float(np.mean(exact_match_rows(predictions, references)))


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of the rows' word F1 after SQuAD's normalisation."""
    import numpy as np

    return float(np.mean(token_f1_rows(predictions, references)))


def _class_ids(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """(N, 2) ids of predicted and true class; -1 for a prediction that is no class of the references."""
    import numpy as np

    _check_pairs(predictions, references)
    ids = {name: number for number, name in enumerate(sorted({reference.strip() for reference in references}))}
    pairs = zip(predictions, references, strict=True)
    return np.array([(ids.get(a.strip(), -1), ids[b.strip()]) for a, b in pairs], dtype=np.int64)


def _macro_f1_of_ids(ids: NDArray[Any]) -> float:
    import numpy as np

    predicted, true = ids[:, 0], ids[:, 1]
    scores = []
    for label in np.unique(true):
        hits = np.sum((predicted == label) & (true == label))
        scores.append(2 * hits / (np.sum(predicted == label) + np.sum(true == label)))
    return float(np.mean(scores))


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Unweighted mean over the references' classes of F1 = 2TP / (2TP + FP + FN).

    A prediction that is no class counts as a miss of its row's class, and adds no class of its own: scikit-learn's
    ``f1_score(labels=sorted(set(references)), average="macro")``.
    """
    return _macro_f1_of_ids(_class_ids(predictions, references))


def chrf(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF (Popovic 2015) by sacrebleu's defaults, 0-100."""
    import sacrebleu

    _check_pairs(predictions, references)
    return float(sacrebleu.corpus_chrf(list(predictions), [list(references)]).score)


def chrf_rows(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Per row: sentence chrF, 0-100. Their mean is near the corpus score, not equal to it."""
    import sacrebleu

    _check_pairs(predictions, references)
    return [float(sacrebleu.sentence_chrf(a, [b]).score) for a, b in zip(predictions, references, strict=True)]


def bleu(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002) by sacrebleu's defaults (13a tokens), 0-100."""
    import sacrebleu

    _check_pairs(predictions, references)
    return float(sacrebleu.corpus_bleu(list(predictions), [list(references)]).score)


def _bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """(N, 10) per row: four n-gram hits, four n-gram totals, prediction and reference length."""
    import numpy as np
    import sacrebleu

    _check_pairs(predictions, references)
    scores = [sacrebleu.corpus_bleu([a], [[b]]) for a, b in zip(predictions, references, strict=True)]
    return np.array([[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores], dtype=float)


def _bleu_of_counts(counts: NDArray[Any]) -> float:
    from sacrebleu.metrics.bleu import BLEU

    sums = [int(value) for value in counts.sum(axis=0)]
    return float(BLEU.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9]).score)


def perplexity(nll_sum: float, tokens: int) -> float:
    """exp(mean negative log-likelihood) of ``tokens`` supervised tokens whose sum, in nats, is ``nll_sum``."""
    if tokens < 1:
        raise ValueError("perplexity of no tokens")
    mean = nll_sum / tokens
    return math.exp(mean) if mean < 700 else math.inf  # exp overflows beyond 709


def _perplexity_of_rows(rows: NDArray[Any]) -> float:
    return perplexity(float(rows[:, 0].sum()), int(rows[:, 1].sum()))


def _mean(rows: NDArray[Any]) -> float:
    return float(rows.mean())


def bootstrap_ci95(
    per_row_scores: ArrayLike,
    *,
    statistic: Callable[[NDArray[Any]], float] = _mean,
    centre: float | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval (Efron 1979) over rows, the same for the same input.

    Args:
        per_row_scores: (N,) scores, or (N, K) counts that ``statistic`` needs of each row.
        statistic: A resampled array -> the score.
        centre: Shift the interval so that ``statistic`` of all rows falls on this value: for a corpus score that
            the rows' scores only approximate.
        resamples: Number of resampled sets.
        seed: Seed of the resampling.

    Raises:
        ValueError: There are no rows.
    """
    import numpy as np

    rows = np.asarray(per_row_scores)
    if len(rows) == 0:
        raise ValueError("a confidence interval of no rows")
    generator = np.random.default_rng(seed)
    values = [statistic(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    shift = 0.0 if centre is None else centre - statistic(rows)
    return float(low + shift), float(high + shift)


@dataclass(frozen=True)
class Score:
    """A metric's value on ``n`` rows with its 95 % interval."""

    metric: str
    value: float
    ci95: tuple[float, float]
    n: int


@dataclass(frozen=True)
class Metric:
    """What a metric is computed from and how to read it.

    Attributes:
        name: Its name on the command line and in results.
        source: ``text`` (predictions and references), ``rows`` (a 0-1 value for each row, such as pass or stop) or
            ``likelihood`` (the reference answers' negative log-likelihood).
        scale: The best value's order: 1, 100, or None where there is no upper limit.
        higher_is_better: False for perplexity.
        description: One line for people.
    """

    name: str
    source: Literal["text", "rows", "likelihood"]
    scale: int | None
    higher_is_better: bool
    description: str


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy", "text", 1, True, "share of answers that are the reference"),
    "macro_f1": Metric("macro_f1", "text", 1, True, "mean F1 of the classes"),
    "exact_match": Metric("exact_match", "text", 1, True, "share of answers equal after SQuAD's normalisation"),
    "token_f1": Metric("token_f1", "text", 1, True, "mean word F1 after SQuAD's normalisation"),
    "chrf": Metric("chrf", "text", 100, True, "sacrebleu's corpus chrF"),
    "bleu": Metric("bleu", "text", 100, True, "sacrebleu's corpus BLEU"),
    "pass@1": Metric("pass@1", "rows", 1, True, "share of functions that pass all their assertions"),
    "perplexity": Metric("perplexity", "likelihood", None, False, "perplexity of the reference answers"),
    "stop_rate": Metric("stop_rate", "rows", 1, True, "share of answers that end by themselves"),
}

# The value of one row, or what comes nearest to it where the metric is not a mean over rows.
_ROW_SCORERS: dict[str, Callable[[Sequence[str], Sequence[str]], list[float]]] = {
    "accuracy": accuracy_rows,
    "macro_f1": accuracy_rows,
    "exact_match": exact_match_rows,
    "token_f1": token_f1_rows,
    "chrf": chrf_rows,
    "bleu": chrf_rows,
}
_MEANS_OVER_ROWS = ("accuracy", "exact_match", "token_f1")


def text_rows(metric: str, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Each row's value of a ``text`` metric; accuracy stands for macro F1, sentence chrF for BLEU."""
    return _ROW_SCORERS[metric](predictions, references)


def score_text(metric: str, predictions: Sequence[str], references: Sequence[str]) -> Score:
    """A ``text`` metric with its interval.

    Raises:
        ValueError: The metric is not computed from texts, or the lists do not pair up.
    """
    n = len(references)
    if metric in _MEANS_OVER_ROWS:
        return score_rows(metric, text_rows(metric, predictions, references))
    if metric == "macro_f1":
        ids = _class_ids(predictions, references)
        return Score(metric, _macro_f1_of_ids(ids), bootstrap_ci95(ids, statistic=_macro_f1_of_ids), n)
    if metric == "chrf":
        value = chrf(predictions, references)
        low, high = bootstrap_ci95(chrf_rows(predictions, references), centre=value)
        return Score(metric, value, (max(low, 0.0), min(high, 100.0)), n)
    if metric == "bleu":
        counts = _bleu_counts(predictions, references)
        interval = bootstrap_ci95(counts, statistic=_bleu_of_counts)
        return Score(metric, bleu(predictions, references), interval, n)
    raise ValueError(f"{metric!r} is not computed from texts")


def score_rows(metric: str, per_row_scores: Sequence[float]) -> Score:
    """The mean of one value for each row (``pass@1``, ``stop_rate``), with its interval."""
    import numpy as np

    rows = np.asarray(per_row_scores, dtype=float)
    return Score(metric, float(rows.mean()) if len(rows) else math.nan, bootstrap_ci95(rows), len(rows))


def score_perplexity(nll_sums: Sequence[float], tokens: Sequence[int]) -> Score:
    """Perplexity from each row's negative log-likelihood sum (nats) and supervised tokens, with its interval."""
    import numpy as np

    rows = np.column_stack([np.asarray(nll_sums, dtype=float), np.asarray(tokens, dtype=float)])  # (N, 2)
    return Score(
        "perplexity", _perplexity_of_rows(rows), bootstrap_ci95(rows, statistic=_perplexity_of_rows), len(rows)
    )
