"""How sure a mean over documents and a share of successes are."""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
"""Of all intervals, where nothing else is said."""

# Numbers of the bootstrap's draws that are held at once.
_BLOCK = 1 << 22


class Interval(NamedTuple):
    """What a figure may truly be."""

    low: float
    """Its lower end."""
    high: float
    """Its upper end."""


def bootstrap_interval(
    sums: np.ndarray, counts: np.ndarray, *, num_resamples: int, seed: int
) -> Interval | None:
    """The 95 % interval of sum of sums / sum of counts when documents are drawn anew.

    Each resample draws as many documents as there are, with replacement, each with all that was
    counted of it; the interval is that between the 2.5 % and the 97.5 % quantile (Efron 1979). Of
    several runs on the same documents, runs are drawn anew as well, apart from the documents (Owen
    2007, "The pigeonhole bootstrap"), and the mean over the runs drawn is taken.

    Drawing anew from a few shows too little of what others would differ in. How far resamples are
    from the estimate, for other documents and for other runs, is therefore widened, as Student's t
    is for a mean of n: by sqrt(n / (n - 1)) and by its quantile over the normal one.

    Args:
        sums: (n,) float64, one number a document; (R, n) of R runs.
        counts: (n,) int64, at least 1, what a sum is divided by.
        num_resamples: resamples.
        seed: of the draws; with the same seed, n and R they are the same.

    Returns:
        The interval; None of a single document, which says nothing about others.
    """
    runs, count = np.atleast_2d(sums), len(counts)
    if count < 2:
        return None
    rng, even = np.random.default_rng(seed), [1 / count] * count
    # The draws of many documents are made in blocks: all at once may be more than memory holds.
    size = max(_BLOCK // count, 1)
    means = []
    for done in range(0, num_resamples, size):
        drawn = rng.multinomial(count, even, size=min(size, num_resamples - done))
        means.append(drawn @ runs.T / (drawn @ counts)[:, None])
    by_run = np.concatenate(means)
    weights = rng.multinomial(len(runs), [1 / len(runs)] * len(runs), size=num_resamples)
    estimate, of_documents = runs.sum() / (len(runs) * counts.sum()), by_run.mean(axis=1)
    of_runs = (by_run * weights).sum(axis=1) / len(runs) - of_documents
    drawn = _widening(count) * (of_documents - estimate) + _widening(len(runs)) * of_runs
    tail = (1 - CONFIDENCE) / 2
    low, high = estimate + np.quantile(drawn, [tail, 1 - tail])
    return Interval(float(low), float(high))


def _widening(count: int) -> float:
    """How much wider an interval of Student's t is than a bootstrap's quantiles; 1 of one number.

    The quantile of t is exact at 1 and 2 degrees of freedom and an expansion in their inverse from
    3 on (Fisher and Cornish 1960), of which the first four terms err by less than 1 %.
    """
    if count < 2:
        return 1.0
    z, free = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), count - 1
    if free == 1:
        t = math.tan(math.pi * CONFIDENCE / 2)
    elif free == 2:
        t = CONFIDENCE * math.sqrt(2 / (1 - CONFIDENCE**2))
    else:
        t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return math.sqrt(count / free) * t / z


def effective_number(successes: np.ndarray, counts: np.ndarray) -> float:
    """How many trials that know nothing of each other tell as much about their share as these.

    Trials of a group succeed and fail together more often than by chance: their number is divided
    by the design effect (Kish 1965, "Survey Sampling"), the variance of the share between groups
    over the variance that it would have of independent trials. The effect is taken as at least 1
    and at most that of groups whose trials all end alike, which it is too where nothing is known:
    with all trials alike, or one group.

    Args:
        successes: (n,) how many trials of each group succeeded.
        counts: (n,) how many trials each group has, at least 1.
    """
    groups, trials = len(counts), int(counts.sum())
    share = float(successes.sum()) / trials
    most = float((counts**2).sum()) / trials
    alike = share * (1 - share) / trials
    if groups < 2 or alike == 0:
        return trials / most
    off = successes - share * counts
    between = groups / (groups - 1) * float((off**2).sum()) / trials**2
    return trials / min(max(between / alike, 1.0), most)


def wilson_interval(successes: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of a share.

    Unlike the interval of the normal approximation it stays within 0 and 1 and keeps its width when
    all of ``n`` trials succeed or none does (Wilson 1927, "Probable inference, the law of
    succession, and statistical inference"). With z the normal quantile of ``(1 + confidence) / 2``
    and p = successes / n it is (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
        successes: how many trials succeeded, 0 to ``n``.
        n: how many trials there were, 1 or more; of trials in groups, their effective number, with
            as large a share of successes.
        confidence: how often such an interval holds the true share, between 0 and 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be 1 or more")
    if not 0 <= successes <= n:
        raise ValueError(f"successes is {successes}; it must be from 0 to n = {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = successes / n, z * z / n
    centre = share + spread / 2
    half = (spread * (share * (1 - share) + spread / 4)) ** 0.5
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    # Rounding must not lead out of the range of a share.
    return Interval(max(low, 0.0), min(high, 1.0))
