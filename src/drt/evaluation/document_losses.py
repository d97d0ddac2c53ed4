"""Losses summed by document: perplexities, how certain they are, and two models compared."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drt.data.prepared import PreparedSplit
from drt.evaluation.intervals import bootstrap_interval
from drt.evaluation.text_counts import Spelling
from drt.evaluation.windows import Window


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
        `perplexity_interval` is that over documents.

        Args:
            num_resamples: of the bootstrap.
            seed: of the bootstrap.
        """
        nats, num_tokens = float(self.nats.sum()), int(self.tokens.sum())
        num_words = None if self.words is None else int(self.words.sum())
        num_bytes = None if self.bytes is None else int(self.bytes.sum())
        interval = perplexity_interval(
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


def perplexity_interval(
    nats: np.ndarray, tokens: np.ndarray, *, num_resamples: int, seed: int
) -> list[float] | None:
    """[low, high] of exp(sum of nats / sum of tokens), by `bootstrap_interval`.

    Args:
        nats: (n,) or (R, n) float64, a difference of two models' nats for a ratio of perplexities.
        tokens: (n,) int64, at least 1.
        num_resamples: of the bootstrap.
        seed: of the bootstrap.
    """
    interval = bootstrap_interval(nats, tokens, num_resamples=num_resamples, seed=seed)
    return None if interval is None else np.exp(interval).tolist()


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
    return pooled_difference([(record_a, record_b)], num_resamples=num_resamples, seed=seed)


def pooled_difference(
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`paired_difference` of two kinds of models, of each of which there are several runs.

    The `ratio` is the geometric mean over the pairs of runs, and its interval that of other
    documents and other pairs: wide of two or three pairs, which show little of how far a fourth
    may lie.

    Args:
        pairs: a record of each kind, as often as there are runs.
        num_resamples: resamples of the bootstrap over documents and pairs.
        seed: of the bootstrap.
    """
    records = [record for pair in pairs for record in pair]
    first = records[0]
    for name in ("mode", "data_sha256"):
        for record in records:
            if record[name] != first[name]:
                raise ValueError(f"{name} differs: {first[name]} and {record[name]}")
    rows = [{row["label"]: row for row in record["rows"]} for record in records]
    shared = [label for label in rows[0] if all(label in each for each in rows)]
    if not shared:
        raise ValueError(f"no row is in all records: {' and '.join(str(list(r)) for r in rows)}")
    by_label = [[each[label] for each in rows] for label in shared]
    return [
        compare_rows(each[::2], each[1::2], num_resamples=num_resamples, seed=seed)
        for each in by_label
    ]


def compare_rows(
    rows_a: Sequence[dict[str, Any]],
    rows_b: Sequence[dict[str, Any]],
    *,
    num_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compare rows that score the same tokens, pair by pair: an item of `pooled_difference`.

    Raises:
        ValueError: they score other tokens.
    """
    first = rows_a[0]
    for row in (*rows_a, *rows_b):
        if row["scored_sha256"] != first["scored_sha256"]:
            raise ValueError(
                f"{first['label']} and {row['label']} score other tokens: "
                f"{first['num_tokens']:,} of {first['num_documents']:,} documents and "
                f"{row['num_tokens']:,} of {row['num_documents']:,}"
            )
    a, b = ([row["by_document"]["nats"] for row in rows] for rows in (rows_a, rows_b))
    nats, tokens = np.subtract(a, b), np.array(first["by_document"]["tokens"])
    return {
        "label": first["label"],
        "num_documents": len(tokens),
        "num_tokens": int(tokens.sum()),
        "ratio": math.exp(nats.sum() / (len(nats) * tokens.sum())),
        "interval": perplexity_interval(nats, tokens, num_resamples=num_resamples, seed=seed),
    }
