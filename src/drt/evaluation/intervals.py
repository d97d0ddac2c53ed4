"""How sure a share of successes is."""

from statistics import NormalDist
from typing import NamedTuple


class Interval(NamedTuple):
    """The shares that a count of successes is compatible with."""

    low: float
    """Smallest share, 0 or more."""
    high: float
    """Largest share, 1 at most."""


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's score interval of a share.

    Unlike the interval of the normal approximation it stays within 0 and 1 and keeps its width when
    all of ``n`` trials succeed or none does (Wilson 1927, "Probable inference, the law of
    succession, and statistical inference"). With z the normal quantile of ``(1 + confidence) / 2``
    and p = successes / n it is (p + z^2/2n -+ z sqrt(p(1 - p)/n + z^2/4n^2)) / (1 + z^2/n).

    Args:
        successes: how many trials succeeded, 0 to ``n``.
        n: how many trials there were, 1 or more.
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
