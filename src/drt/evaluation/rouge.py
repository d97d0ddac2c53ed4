"""ROUGE of words, with intervals, and the summary that is hard to beat: how the document begins."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from drt.evaluation.intervals import bootstrap_interval

ROUGE = ("rouge1", "rouge2", "rougeL")
"""Shared words, shared pairs of words, longest common subsequence of words."""

References = Literal["best", "mean"]
"""Of several reference summaries: for each figure the best, or the mean over all."""

NUM_RESAMPLES = 1000

# Where white space follows, a sentence ends; abbreviations are not told apart.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Estimate(NamedTuple):
    """A mean and where it lies."""

    mean: float
    """The mean over examples."""
    low: float | None
    """Lower end of the 95 % bootstrap interval; None with fewer than two documents."""
    high: float | None
    """Its upper end."""


class Rouge:
    """Scores texts by `rouge-score`: lower case, letters a to z and digits, Porter stemming.

    Texts in other alphabets have no words in this count and score 0.

    Raises:
        ImportError: `rouge-score` is not installed.
    """

    def __init__(self) -> None:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError(
                "ROUGE needs the package 'rouge-score': pip install 'drt-lm[eval]'"
            ) from error
        self._scorer = RougeScorer(list(ROUGE), use_stemmer=True)

    def score(
        self, text: str, summaries: Sequence[str], references: References = "best"
    ) -> np.ndarray:
        """F-measures in per cent, float64, shape (3,) in the order of `ROUGE`.

        Args:
            text: what a model wrote.
            summaries: the references, one or more.
            references: what becomes of several.
        """
        # Splitting the text again for each reference costs little beside what wrote it.
        found: list[Any] = [self._scorer.score(summary, text) for summary in summaries]
        scores = np.array([[score[name].fmeasure for name in ROUGE] for score in found])
        return 100 * (scores.max(axis=0) if references == "best" else scores.mean(axis=0))


def lead(document: str, num_sentences: int) -> str:
    """The first sentences of a document: up to a `.`, `!` or `?` that white space follows."""
    return " ".join(_SENTENCE_END.split(document.strip(), maxsplit=num_sentences)[:num_sentences])


def estimate_means(scores: np.ndarray, documents: Sequence[str], *, seed: int) -> list[Estimate]:
    """The mean of each column of scores, per cent, with a bootstrap interval over documents.

    Documents are drawn anew with all that was asked of them, since the answers about one document
    are not independent.

    Args:
        scores: (N, C), one row an example, 0 to 100.
        documents: for each of the N examples what its document is called.
        seed: seed of the resampling.

    Returns:
        C estimates.
    """
    _, groups = np.unique(np.array(documents), return_inverse=True)
    counts = np.bincount(groups)
    sums = np.stack([np.bincount(groups, weights=column) for column in scores.T], axis=1)
    means = sums.sum(axis=0) / counts.sum()
    intervals = [
        bootstrap_interval(column, counts, num_resamples=NUM_RESAMPLES, seed=seed)
        for column in sums.T
    ]
    return [
        # Widened for few documents, an interval could leave the range of a score.
        Estimate(float(mean), *(np.clip(interval, 0, 100).tolist() if interval else (None, None)))
        for mean, interval in zip(means, intervals, strict=True)
    ]
