"""Decoding token by token, several models in turn: what `length.py` and `model.py` measure."""

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import mean, median
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from devices import seconds
from length_models import Step, random_bytes


@dataclass
class Decoding:
    """Milliseconds a token, one sample a repeat."""

    mean: list[float] = field(default_factory=list)
    """Of all tokens of whole chunks."""
    plain: list[float] = field(default_factory=list)
    """Median of the tokens that close no chunk of ours."""
    landmark: list[float] = field(default_factory=list)
    """Mean of the tokens that close a chunk of ours."""

    def add(self, milliseconds: list[float], closes: list[bool]) -> None:
        """Take in a repeat, token by token."""
        pairs = list(zip(milliseconds, closes, strict=True))
        self.mean.append(mean(milliseconds))
        self.plain.append(median(time for time, closing in pairs if not closing))
        self.landmark.append(mean(time for time, closing in pairs if closing))


class Decoder(Protocol):
    """What goes on from where it stands."""

    @property
    def name(self) -> str:
        """For the table."""
        ...

    def branch(self) -> Step:
        """A way to go on."""
        ...


class Steps(NamedTuple):
    """The tokens of a repeat."""

    closes: list[bool]
    """For each, whether it closes a chunk of ours."""
    num_chunks: int
    """Parts in which they are decoded, a part of each contestant in turn."""
    device: torch.device
    """Where the ids are, and whose clock counts."""


def closing_tokens(length: int, chunk_size: int, *, num_chunks: int) -> list[bool]:
    """Which of the tokens after `length` close a chunk; they are as many as chunks hold."""
    # Chunks close at multiples of their size, and a text need not end at one.
    return [(length + n + 1) % chunk_size == 0 for n in range(num_chunks * chunk_size)]


def time_decoding(
    contestants: Sequence[Decoder], steps: Steps, *, repeats: int, budget: float
) -> dict[str, Decoding]:
    """Decode token by token from where each stands, a chunk in turn.

    Args:
        contestants: who.
        steps: which tokens.
        repeats: repeats.
        budget: seconds after which no repeat begins.
    """
    found = {x.name: Decoding() for x in contestants}
    ids = random_bytes(len(steps.closes), seed=2).to(steps.device)
    start = time.perf_counter()
    for number in range(-1, repeats):
        branches = {x.name: x.branch() for x in contestants}
        times: dict[str, list[float]] = {name: [] for name in branches}
        # The first repeat is a warm-up of one chunk.
        parts = ids.chunk(steps.num_chunks, dim=1)[: 1 if number < 0 else None]
        gc.disable()
        for part in parts:
            for name, step in branches.items():
                times[name] += _step_times(step, part, steps.device)
        gc.enable()
        if number >= 0:
            for name, milliseconds in times.items():
                found[name].add(milliseconds, steps.closes)
            if time.perf_counter() - start > budget:
                break
    return found


def _step_times(step: Step, ids: Tensor, device: torch.device) -> list[float]:
    """Milliseconds of each of the (1, n) tokens."""
    return [1e3 * seconds(partial(step, token), device) for token in ids.split(1, dim=1)]
