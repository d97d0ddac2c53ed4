"""Perplexities from sums, their intervals, and pairs of models."""

import math
from typing import Any

import numpy as np
import pytest

from drt.evaluation.document_losses import (
    DocumentLosses,
    paired_difference,
    perplexity_interval,
    pooled_difference,
)


def losses(nats: Any, tokens: Any, words: Any = None) -> DocumentLosses:
    counts = None if words is None else np.array(words)
    documents = np.arange(len(nats))
    return DocumentLosses(documents, np.array(nats, float), np.array(tokens), counts, counts)


def record(nats: Any, tokens: Any, **changes: Any) -> dict[str, Any]:
    row = {"label": "1K", "scored_sha256": "s"}
    row |= losses(nats, tokens).figures(num_resamples=10, seed=0)
    return {"mode": "sliding", "data_sha256": "d", "rows": [row], **changes}


def test_perplexity_is_weighted_by_tokens() -> None:
    # One document of one token at ln 8 and one of three at ln 2: 8 * 2^3 = 64 = 4th power of 2^1.5.
    found = losses([math.log(8), 3 * math.log(2)], [1, 3], [2, 1]).figures(num_resamples=9, seed=0)
    assert found["perplexity"] == pytest.approx(2**1.5)
    assert found["perplexity_per_word"] == pytest.approx(4)
    assert found["perplexity_per_byte"] == pytest.approx(4)
    assert found["bits_per_byte"] == pytest.approx(2)
    assert found["num_tokens"] == 4
    unknown = losses([1.0], [1]).figures(num_resamples=9, seed=0)
    assert unknown["perplexity_per_word"] is None
    assert unknown["bits_per_byte"] is None
    # exp(800) is beyond float64.
    assert losses([800.0], [1], [1]).figures(num_resamples=9, seed=0)["perplexity"] is None


def test_the_interval_is_one_of_perplexities() -> None:
    nats, tokens = np.array([10.0, 30.0, 20.0]), np.array([10, 10, 10])
    found = perplexity_interval(nats, tokens, num_resamples=500, seed=2)
    # The rarest draws, all three the same document, have chances of 1/27: beyond 2.5 %. They are 1
    # from the mean, 2, and widened by sqrt(3/2) and by 4.302653, the quantile of t, over 1.959964.
    wide = math.sqrt(1.5) * 4.302653 / 1.959964
    assert found == pytest.approx([math.exp(2 - wide), math.exp(2 + wide)], rel=1e-5)
    assert perplexity_interval(nats[:1], tokens[:1], num_resamples=10, seed=0) is None


def test_pairs_see_what_single_intervals_do_not() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, size=30)
    hard = tokens * rng.uniform(1, 5, size=30)
    (found,) = paired_difference(record(hard - 0.01 * tokens, tokens), record(hard, tokens))
    assert found["ratio"] == pytest.approx(math.exp(-0.01))
    assert found["interval"] == pytest.approx([math.exp(-0.01)] * 2)
    assert (found["label"], found["num_documents"]) == ("1K", 30)
    assert found["num_tokens"] == tokens.sum()
    other = hard + tokens * rng.normal(0, 0.1, size=30)
    (found,) = paired_difference(record(hard, tokens), record(other, tokens))
    assert found["interval"][0] < found["ratio"] < found["interval"][1]
    means = (hard - other).sum() / tokens.sum()
    assert found["ratio"] == pytest.approx(math.exp(means))


def test_several_runs_are_one_comparison() -> None:
    rng = np.random.default_rng(0)
    tokens, hard = rng.integers(50, 200, size=30), rng.uniform(50, 500, size=30)
    gains = (-0.02, -0.01, 0.0)
    pairs = [(record(hard + gain * tokens, tokens), record(hard, tokens)) for gain in gains]
    (found,) = pooled_difference(pairs)
    assert found["ratio"] == pytest.approx(math.exp(-0.01))
    # Documents do not differ, and runs drawn anew have means from -0.02 to 0, the ends each with a
    # chance of 1/27: beyond 2.5 %. Widened as above.
    wide = 0.01 * math.sqrt(1.5) * 4.302653 / 1.959964
    expected = [math.exp(-0.01 - wide), math.exp(-0.01 + wide)]
    assert found["interval"] == pytest.approx(expected, rel=1e-6)
    assert pooled_difference(pairs[:1]) == paired_difference(*pairs[0])
    with pytest.raises(ValueError, match="mode differs: sliding and book"):
        pooled_difference([*pairs, (record(hard, tokens), record(hard, tokens, mode="book"))])


def test_records_that_cannot_be_compared() -> None:
    one = record([1.0, 2.0], [3, 4])
    for name in ("mode", "data_sha256"):
        with pytest.raises(ValueError, match=f"{name} differs: .* and other"):
            paired_difference(one, {**one, name: "other"})
    with pytest.raises(ValueError, match=r"no row is in all records: \['1K'\] and \['2K'\]"):
        paired_difference(one, {**one, "rows": [{**one["rows"][0], "label": "2K"}]})
    with pytest.raises(ValueError, match="1K and 1K score other tokens: 7 of 2"):
        paired_difference(one, {**one, "rows": [{**one["rows"][0], "scored_sha256": "t"}]})
