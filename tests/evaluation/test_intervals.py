import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drt.evaluation.intervals import wilson_interval

Z_95 = 1.959963984540054


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
