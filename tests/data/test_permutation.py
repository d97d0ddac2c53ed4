"""Orders that need no list of all numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drt.data.permutation import Permutation


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_every_number_comes_once(size: int, seed: int, epoch: int) -> None:
    order = Permutation(size, seed, epoch)
    assert sorted(order(index) for index in range(size)) == list(range(size))


def test_it_follows_from_its_key_alone() -> None:
    orders = {
        key: tuple(map(Permutation(500, *key), range(500))) for key in ((1,), (2,), (1, 2), (12,))
    }
    assert len(set(orders.values())) == 4
    assert orders[1, 2] == tuple(map(Permutation(500, 1, 2), range(500)))


def test_a_place_gets_every_number_alike() -> None:
    """Over 4,000 keys each of 10 numbers should come to place 0 some 400 times."""
    counts = np.bincount([Permutation(10, key)(0) for key in range(4000)], minlength=10)
    # The deviation of a count is 19; five of them happen by chance once in a million.
    assert np.abs(counts - 400).max() < 95


def test_neighbours_do_not_stay_neighbours() -> None:
    order = np.array([Permutation(10**4, 7)(index) for index in range(10**4)])
    # Of uniform orders the correlation has a deviation of 1 / sqrt(10,000) = 0.01.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10**4))[0, 1]) < 0.05


def test_numbers_of_any_size() -> None:
    size = 10**15 + 3
    order = Permutation(size, 0)
    assert len({order(index) for index in range(1000)}) == 1000
    assert all(0 <= order(size - 1 - index) < size for index in range(100))
    for index in (-1, size):
        with pytest.raises(ValueError, match="is not in 0 to"):
            order(index)
    with pytest.raises(ValueError, match="size is 0"):
        Permutation(0)
