"""A random order of any number of things, a number at a time, with nothing kept in memory."""

from __future__ import annotations

import hashlib

_MASK = (1 << 64) - 1
_ROUNDS = 6


class Permutation:
    """A permutation of 0 to `size - 1` that follows from a key.

    A Feistel network permutes the smallest range of 4^k numbers that holds `size`; a number that
    leaves 0 to `size - 1` goes through it again until it is back, which keeps it a permutation
    (cycle walking). At least every fourth number of the range is inside, so that is soon.

    Args:
        size: how many numbers, 1 or more.
        key: integers that the order follows from, such as a seed and an epoch.

    Raises:
        ValueError: `size` is less than 1.
    """

    def __init__(self, size: int, *key: int) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; it must be 1 or more")
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        data = ",".join(map(str, key)).encode()
        self._keys = [
            int.from_bytes(hashlib.blake2b(data, digest_size=8, salt=bytes([n])).digest(), "big")
            for n in range(_ROUNDS)
        ]

    def __call__(self, index: int) -> int:
        """The number at a place, 0 to `size - 1`; ValueError for any other."""
        if not 0 <= index < self.size:
            raise ValueError(f"index {index} is not in 0 to {self.size - 1}")
        index = self._shuffle(index)
        while index >= self.size:
            index = self._shuffle(index)
        return index

    def _shuffle(self, index: int) -> int:
        mask = (1 << self._half) - 1
        left, right = index >> self._half, index & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return left << self._half | right


def _mix(number: int) -> int:
    """64 bits that all depend on all bits of a number: the finalizer of splitmix64."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & _MASK
    return number ^ (number >> 31)
