"""Losses summed by document: perplexities, how certain they are, and two models compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drt.data.prepared import PreparedSplit
from drt.evaluation.text_counts import Spelling
from drt.evaluation.windows import Window

CONFIDENCE = 0.95
"""Of all intervals."""

# Draws of the bootstrap that are held at once.
_BLOCK = 1 << 22


class ScoredWindows(NamedTuple):
    """What one row of a record is made of."""

    place: dict[str, Any]
    """What the row is called, and what else is known of it."""
    windows: list[Window]
    """What was scored, document by document in ascending order."""
    nats: np.ndarray
    """(len(windows),) float64 summed losses of their scored tokens."""

    @property
    def spans(self) -> np.ndarray:
        """(n, 3) int64: document, first scored token, end."""
        spans = [(window.document, window.first, window.stop) for window in self.windows]
        return np.array(spans, dtype="<i8").reshape(-1, 3)

    def digest(self) -> str:
        """A hash of which tokens were scored."""
        return hashlib.sha256(self.spans.tobytes()).hexdigest()


class DocumentLosses(NamedTuple):
    """What was scored of each of n documents."""

    documents: np.ndarray
    """(n,) int64 numbers in the split, ascending."""
    nats: np.ndarray
    """(n,) float64 summed losses."""
    tokens: np.ndarray
    """(n,) int64 scored tokens, at least 1."""
    bytes: np.ndarray | None
    """(n,) int64 bytes of the text that those tokens spell; None = not known."""
    words: np.ndarray | None
    """(n,) int64 words of it."""

    def figures(self, *, num_resamples: int, seed: int) -> dict[str, Any]:
        """Counts, perplexities and sums by document, ready for JSON.

        `perplexity` is exp(nats / tokens), the sums taken over all documents; a word's and a
        byte's likewise, None where bytes and words are not known or the figure is beyond float64.
        `perplexity_interval` is that of `bootstrap_interval`.

        Args:
            num_resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        nats, num_tokens = float(self.nats.sum()), int(self.tokens.sum())
        num_words = None if self.words is None else int(self.words.sum())
        num_bytes = None if self.bytes is None else int(self.bytes.sum())
        interval = bootstrap_interval(
            self.nats, self.tokens, num_resamples=num_resamples, seed=seed
        )
        return {
            "num_documents": len(self.documents),
            "num_tokens": num_tokens,
            "num_words": num_words,
            "num_bytes": num_bytes,
            "nats": nats,
            "perplexity": _exp(nats, num_tokens),
            "perplexity_interval": interval,
            "perplexity_per_word": _exp(nats, num_words),
            "perplexity_per_byte": _exp(nats, num_bytes),
            "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
            "by_document": {
                "documents": self.documents.tolist(),
                "nats": self.nats.tolist(),
                "tokens": self.tokens.tolist(),
            },
        }


def sum_by_document(
    scored: Sequence[ScoredWindows], split: PreparedSplit, spelling: Spelling
) -> list[DocumentLosses]:
    """The sums of each row by document; bytes and words of a document are counted once for all.

    Args:
        scored: the rows.
        split: where the documents are.
        spelling: of the tokenizer that made them.
    """
    all_spans = [row.spans for row in scored]
    texts = [np.zeros((len(spans), 2), dtype=np.int64) for spans in all_spans]
    is_spelled = [True] * len(scored)
    for number in np.unique(np.concatenate([spans[:, 0] for spans in all_spans])).tolist():
        counts = spelling.count(split.document(number))
        for row, spans in enumerate(all_spans):
            low, high = spans[:, 0].searchsorted([number, number + 1])
            if counts is None:
                is_spelled[row] &= bool(low == high)
                continue
            first, stop = spans[low:high, 1], spans[low:high, 2]
            texts[row][low:high, 0] = counts.bytes[stop] - counts.bytes[first]
            texts[row][low:high, 1] = counts.words[stop] - counts.words[first]
    rows = zip(scored, all_spans, texts, is_spelled, strict=True)
    return [_sum_row(row.nats, spans, text if known else None) for row, spans, text, known in rows]


def _sum_row(nats: np.ndarray, spans: np.ndarray, text: np.ndarray | None) -> DocumentLosses:
    documents, starts = np.unique(spans[:, 0], return_index=True)
    sums = None if text is None else np.add.reduceat(text, starts)
    return DocumentLosses(
        documents=documents,
        nats=np.add.reduceat(nats, starts),
        tokens=np.add.reduceat(spans[:, 2] - spans[:, 1], starts),
        bytes=None if sums is None else sums[:, 0],
        words=None if sums is None else sums[:, 1],
    )


def _exp(nats: float, count: int | None) -> float | None:
    """exp(nats / count), where there is such a number."""
    try:
        return math.exp(nats / count) if count else None
    except OverflowError:
        return None


def bootstrap_interval(
    nats: np.ndarray, tokens: np.ndarray, *, num_resamples: int, seed: int
) -> list[float] | None:
    """The 95 % interval of exp(sum of nats / sum of tokens) when documents are drawn anew.

    Each resample draws as many documents as there are, with replacement; the interval is that
    between the 2.5 % and the 97.5 % quantile.

    Args:
        nats: (n,) float64, a difference of two models' nats for the ratio of their perplexities.
        tokens: (n,) int64, at least 1.
        num_resamples: resamples.
        seed: of the draws; with the same seed and n they are the same.

    Returns:
        [low, high]; None of a single document, which says nothing about others.
    """
    count = len(nats)
    if count < 2:
        return None
    rng, sums, even = np.random.default_rng(seed), np.stack([nats, tokens]), [1 / count] * count
    # The draws of many documents are made in blocks: all at once may be more than memory holds.
    size = max(_BLOCK // count, 1)
    sizes = [min(size, num_resamples - done) for done in range(0, num_resamples, size)]
    drawn = [rng.multinomial(count, even, size=block) @ sums.T for block in sizes]
    means = np.concatenate([totals[:, 0] / totals[:, 1] for totals in drawn])
    tail = (1 - CONFIDENCE) / 2
    return np.exp(np.quantile(means, [tail, 1 - tail])).tolist()


def paired_difference(
    record_a: Mapping[str, Any],
    record_b: Mapping[str, Any],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare two models on the same tokens, document by document.

    What makes a document hard is hard for both models and cancels, so that differences far smaller
    than the interval of either perplexity can be seen.

    Args:
        record_a: what `PerplexityTask.evaluate` returned for one model.
        record_b: the same for another, of the same settings and split.
        num_resamples: resamples of the bootstrap over documents.
        seed: of the bootstrap.

    Returns:
        For each row that both have: its `label`, `num_documents`, `num_tokens`, the `ratio` of the
        perplexities (below 1: a predicts better), and its 95 % `interval`, None of one document.

    Raises:
        ValueError: the records are of other tokens or modes, or share no row.
    """
    for name in ("mode", "data_sha256"):
        if record_a[name] != record_b[name]:
            raise ValueError(f"{name} differs: {record_a[name]} and {record_b[name]}")
    others = {row["label"]: row for row in record_b["rows"]}
    pairs = [(row, others[row["label"]]) for row in record_a["rows"] if row["label"] in others]
    if not pairs:
        labels = [row["label"] for row in record_a["rows"]]
        raise ValueError(f"no row is in both records: {labels} and {list(others)}")
    return [compare_rows(a, b, num_resamples=num_resamples, seed=seed) for a, b in pairs]


def compare_rows(
    row_a: dict[str, Any], row_b: dict[str, Any], *, num_resamples: int, seed: int
) -> dict[str, Any]:
    """Compare two rows that score the same tokens: an item of `paired_difference`.

    Raises:
        ValueError: they score other tokens.
    """
    a, b = row_a["by_document"], row_b["by_document"]
    if row_a["scored_sha256"] != row_b["scored_sha256"]:
        raise ValueError(
            f"{row_a['label']} and {row_b['label']} score other tokens: {row_a['num_tokens']:,} "
            f"of {row_a['num_documents']:,} documents and {row_b['num_tokens']:,} of "
            f"{row_b['num_documents']:,}"
        )
    nats, tokens = np.subtract(a["nats"], b["nats"]), np.array(a["tokens"])
    return {
        "label": row_a["label"],
        "num_documents": len(tokens),
        "num_tokens": int(tokens.sum()),
        "ratio": math.exp(nats.sum() / tokens.sum()),
        "interval": bootstrap_interval(nats, tokens, num_resamples=num_resamples, seed=seed),
    }
