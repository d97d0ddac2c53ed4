"""ROUGE against values worked out by hand, the lead baseline, and bootstrap intervals."""

import math
import sys

import numpy as np
import pytest

from drt.evaluation.rouge import Estimate, Rouge, estimate_means, lead

pytest.importorskip("rouge_score", reason="the extra `eval` is not installed")


@pytest.mark.parametrize(
    ("text", "reference", "wanted"),
    [
        # 3 of 4 words in common, precision 3/4, recall 3/6; pairs: `the cat` of 3 and 5; longest
        # common subsequence `the cat mat`. F = 2 / (1/p + 1/r) = 2 * common / (4 + 6).
        ("the cat mat dog", "the cat sat on a mat", (100 * 6 / 10, 100 * 2 / 8, 100 * 6 / 10)),
        # The same words in another order: no pair, and a subsequence of one.
        ("red blue", "blue red", (100, 0, 50)),
        # A word counts as often as the other text has it: 1 of 3 and 1 of 1.
        ("go go go", "go", (50, 0, 50)),
        # Case and punctuation do not count, and words are stemmed.
        ("Running, DOGS!", "runs dog", (100, 100, 100)),
        ("", "a word", (0, 0, 0)),
    ],
)
def test_pairs_by_hand(text: str, reference: str, wanted: tuple[float, ...]) -> None:
    assert Rouge().score(text, [reference]) == pytest.approx(wanted)


def test_of_several_references_the_best_or_the_mean() -> None:
    references = ["red blue", "blue red", "green"]
    rouge = Rouge()
    assert rouge.score("red blue", references).tolist() == [100, 100, 100]
    # ROUGE-1 of 100, 100 and 0, ROUGE-2 of 100, 0 and 0, ROUGE-L of 100, 50 and 0.
    wanted = [200 / 3, 100 / 3, 50]
    assert rouge.score("red blue", references, "mean") == pytest.approx(wanted)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=r"pip install 'drt-lm\[eval\]'"):
        Rouge()


def test_the_first_sentences() -> None:
    text = "\n It is 3.5 m. Is it?\nYes! It is, at last"
    assert lead(text, 1) == "It is 3.5 m."
    assert lead(text, 3) == "It is 3.5 m. Is it? Yes!"
    assert lead(text, 9) == "It is 3.5 m. Is it? Yes! It is, at last"
    assert lead("", 3) == ""


def test_intervals_are_of_whole_documents() -> None:
    # Documents of 1 and 3 examples: a resample holds the first twice, both, or the second twice,
    # with chances 1/4, 1/2, 1/4; the ends of 95 % are therefore the extremes, 40 and 42, as far
    # from the mean as sqrt(2) and 12.7062, the quantile of t, over 1.959964 put them.
    wide = math.sqrt(2) * 12.7062 / 1.959964
    scores = np.array([[40.0], [42.0], [42.0], [42.0]])
    (found,) = estimate_means(scores, ["a", "b", "b", "b"], seed=0)
    assert found == pytest.approx((41.5, 41.5 - 1.5 * wide, 41.5 + 0.5 * wide), rel=1e-5)
    assert estimate_means(scores, ["a"] * 4, seed=0) == [Estimate(41.5, None, None)]
    # No score is below 0 or above 100.
    (found,) = estimate_means(np.array([[0.0], [100.0]]), ["a", "b"], seed=0)
    assert found == (50.0, 0.0, 100.0)


def test_intervals_of_many_documents_are_those_of_the_normal_law() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal([50, 20], [10, 5], size=(400, 2))
    found = estimate_means(scores, [str(number) for number in range(400)], seed=1)
    assert found == estimate_means(scores, [str(number) for number in range(400)], seed=1)
    for column, each in zip(scores.T, found, strict=True):
        error = 1.96 * column.std() / 20
        assert each.mean == pytest.approx(column.mean())
        assert each.low is not None
        assert each.high is not None
        # 1000 resamples place an end of 95 % to about 0.06 standard errors; twice 1.96 of them
        # are the interval, of which 15 % are five times that.
        assert each.low == pytest.approx(column.mean() - error, abs=0.15 * error)
        assert each.high == pytest.approx(column.mean() + error, abs=0.15 * error)
