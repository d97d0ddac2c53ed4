import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drt.evaluation import intervals
from drt.evaluation.intervals import bootstrap_interval, effective_number, wilson_interval

Z_95 = 1.959963984540054


def test_the_bootstrap_of_known_data() -> None:
    counts = np.full(400, 10)
    rng = np.random.default_rng(1)
    sums = 10 * (2 + 0.3 * rng.standard_normal(400))
    found = bootstrap_interval(sums, counts, num_resamples=4000, seed=2)
    mean, error = sums.mean() / 10, sums.std() / 10 / math.sqrt(400)
    # A quantile of 4,000 draws varies by some 4 % of the error; 0.15 is more than three of those.
    assert found == pytest.approx((mean - Z_95 * error, mean + Z_95 * error), abs=0.15 * error)
    assert bootstrap_interval(sums, counts, num_resamples=4000, seed=2) == found
    assert bootstrap_interval(sums[:1], counts[:1], num_resamples=10, seed=0) is None
    alike = bootstrap_interval(2.0 * counts, counts, num_resamples=50, seed=0)
    assert alike == pytest.approx((2, 2))


def test_the_bootstrap_of_several_runs() -> None:
    rng = np.random.default_rng(1)
    counts = np.full(200, 10)
    documents, runs = 0.3 * rng.standard_normal(200), 0.02 * rng.standard_normal(40)
    sums = 10 * (runs[:, None] + documents)
    found = bootstrap_interval(sums, counts, num_resamples=4000, seed=2)
    error = math.hypot(documents.std() / math.sqrt(200), runs.std() / math.sqrt(40))
    mean = sums.mean() / 10
    assert found == pytest.approx((mean - Z_95 * error, mean + Z_95 * error), abs=0.15 * error)
    # What runs add is seen where documents are alike.
    alike = bootstrap_interval(
        10 * (runs[:, None] + 0 * documents), counts, num_resamples=4000, seed=2
    )
    error = runs.std() / math.sqrt(40)
    expected = (runs.mean() - Z_95 * error, runs.mean() + Z_95 * error)
    assert alike == pytest.approx(expected, abs=0.15 * error)
    # One run is as good as a row of its own.
    one = bootstrap_interval(sums[:1], counts, num_resamples=100, seed=2)
    assert one == bootstrap_interval(sums[0], counts, num_resamples=100, seed=2)


@pytest.mark.parametrize(("documents", "runs"), [(8, 1), (40, 1), (8, 3), (24, 2), (24, 4)])
def test_the_bootstrap_of_few_holds_the_truth(documents: int, runs: int) -> None:
    """In 400 samples of documents and runs that differ; unwidened, down to 0.66 of them would."""
    rng, held = np.random.default_rng(0), 0
    counts = np.full(documents, 1000)
    for _ in range(400):
        of_runs = rng.standard_normal((runs, 1)) * (runs > 1)
        sums = 1000 * (5 + of_runs + rng.standard_normal(documents))
        found = bootstrap_interval(sums, counts, num_resamples=1000, seed=1)
        assert found is not None
        held += found.low <= 5 <= found.high
    assert held / 400 > 0.91


def test_how_much_few_widen() -> None:
    # Quantiles of Student's t at 97.5 % from a table, for 1, 2, 3, 4, 7 and 29 degrees of freedom.
    table = {2: 12.7062, 3: 4.30265, 4: 3.18245, 5: 2.77645, 8: 2.36462, 30: 2.04523}
    for count, quantile in table.items():
        exact = math.sqrt(count / (count - 1)) * quantile / Z_95
        assert intervals._widening(count) == pytest.approx(exact, rel=0.01)
    assert intervals._widening(1) == 1


def test_draws_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = np.arange(1.0, 8.0), np.arange(7, 0, -1)
    whole = bootstrap_interval(sums, counts, num_resamples=100, seed=3)
    monkeypatch.setattr(intervals, "_BLOCK", 20)
    assert bootstrap_interval(sums, counts, num_resamples=100, seed=3) == whole


def test_hand_computed_intervals() -> None:
    # p = 1/2, n = 10: centre stays 1/2, half = z sqrt(1/40 + z^2/400) / (1 + z^2/10).
    half = Z_95 * math.sqrt(0.025 + Z_95**2 / 400) / (1 + Z_95**2 / 10)
    # Tolerances: a few roundings of float64 on numbers up to 1.
    assert wilson_interval(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-14)
    # With no success the bounds are 0 and z^2 / (n + z^2).
    assert wilson_interval(0, 20) == pytest.approx((0, Z_95**2 / (20 + Z_95**2)), abs=1e-14)
    # The worked example of 81 in 263 (Newcombe 1998, table I: 0.2553 to 0.3662).
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_other_confidences() -> None:
    # z of 90 % is 1.6449 and of 99 % 2.5758; at n successes of n the low end is n / (n + z^2).
    for confidence, z in ((0.90, 1.6448536269514722), (0.99, 2.5758293035489004)):
        low, high = wilson_interval(8, 8, confidence)
        assert low == pytest.approx(8 / (8 + z * z), abs=1e-14)
        assert high == 1.0


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(0.01, 0.999))
def test_bounds_solve_the_score_equation(n: int, part: float, confidence: float) -> None:
    successes = round(part * n)
    low, high = wilson_interval(successes, n, confidence)
    share = successes / n
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        # |share - bound| = z sqrt(bound (1 - bound) / n): both ends have the same z. The root
        # of a number that rounding leaves at 1e-16 is 1e-8.
        if 1e-6 < bound < 1 - 1e-6:
            z = abs(share - bound) / math.sqrt(bound * (1 - bound) / n)
            assert math.erf(z / math.sqrt(2)) == pytest.approx(confidence, abs=1e-5)


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "message"),
    [
        (0, 0, 0.95, "n is 0"),
        (-1, 3, 0.95, "successes is -1; it must be from 0 to n = 3"),
        (4, 3, 0.95, "successes is 4; it must be from 0 to n = 3"),
        (1, 3, 1.0, "confidence is 1.0; it must be between 0 and 1"),
    ],
)
def test_errors(successes: int, n: int, confidence: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(successes, n, confidence)


def test_the_effective_number_of_trials_in_groups() -> None:
    ones = np.ones(50, dtype=np.int64)
    assert effective_number(np.arange(50) % 3 == 0, ones) == 50
    sixes = np.full(50, 6)
    # Groups whose trials all end alike are one trial each.
    assert effective_number(6 * (np.arange(50) % 2), sixes) == 50
    # Where all end alike nothing tells how much groups have in common.
    assert effective_number(sixes, sixes) == effective_number(0 * sixes, sixes) == 50
    assert effective_number(np.array([4]), np.array([6])) == 1
    # Groups that differ less than by chance are no more than what they are.
    assert effective_number(np.full(50, 3), sixes) == 300


@pytest.mark.parametrize("alike", [0.0, 0.1, 0.5, 1.0])
def test_intervals_of_grouped_trials_hold_the_share(alike: float) -> None:
    """In 2,000 draws of 20 groups of 6 trials, which share their outcome with some probability."""
    rng, share, held = np.random.default_rng(0), 0.8, 0
    for _ in range(2000):
        common = np.repeat(rng.random((20, 1)) < share, 6, axis=1)
        own = rng.random((20, 6)) < share
        hits = np.where(rng.random((20, 1)) < alike, common, own).sum(axis=1)
        n = effective_number(hits, np.full(20, 6))
        low, high = wilson_interval(hits.mean() / 6 * n, n)
        held += low <= share <= high
    # Taken for independent, those that share half of their outcomes would be held in 0.8 of cases.
    assert 0.9 <= held / 2000 <= 0.98
