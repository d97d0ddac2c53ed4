"""The memory of a training step: plain tensors inside the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from drt.memory.interface import Chunks
from drt.retrieval import Retrieval, retrieve_chunks


class TrainingMemory:
    """Holds the chunks of whole rows, written once, and lets gradients through.

    Scores are computed a tile at a time, see `drt.retrieval`.
    """

    def __init__(self, *, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        self.noise = noise
        self.generator = generator
        self._landmarks: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._lengths: Tensor | None = None

    @property
    def counts(self) -> tuple[int, ...]:
        """As `ChunkMemory.counts`."""
        if self._landmarks is None:
            return ()
        batch, most = self._landmarks.shape[:2]
        if self._lengths is None:
            return (most,) * batch
        return tuple((self._lengths > 0).sum(-1).tolist())

    def __len__(self) -> int:
        return sum(self.counts)

    def append(
        self, landmarks: Tensor, keys: Tensor, values: Tensor, lengths: Tensor | None = None
    ) -> None:
        """Set the chunks of the rows; a second call is refused."""
        if self._landmarks is not None:
            raise ValueError("a TrainingMemory is written once, with all chunks of its rows")
        self._landmarks, self._keys, self._values = landmarks, keys, values
        self._lengths = lengths

    def search(
        self, queries: Tensor, limits: Tensor, *, topk: int, firsts: Tensor | None = None
    ) -> Retrieval:
        """As `ChunkMemory.search`, with noise on the choice and gradients through the scores."""
        assert self._landmarks is not None
        return retrieve_chunks(
            queries,
            self._landmarks,
            limits,
            topk=topk,
            firsts=firsts,
            noise=self.noise,
            generator=self.generator,
        )

    def gather(self, indices: Tensor) -> Chunks:
        """All chunks of all rows as one pool: nothing is copied."""
        assert self._keys is not None
        assert self._values is not None
        batch, most = self._keys.shape[:2]
        row = torch.arange(batch, device=indices.device)[:, None, None]
        pooled = torch.where(indices < 0, -1, indices + row * most)
        lengths = None
        if self._lengths is not None:
            lengths = self._lengths.to(indices.device, non_blocking=True).flatten()
        return Chunks(self._keys.flatten(0, 1), self._values.flatten(0, 1), lengths, pooled)

    def select_rows(self, rows: Sequence[int]) -> TrainingMemory:
        """Refused: a training step's memory ends with the step."""
        raise ValueError("rows of a TrainingMemory cannot be selected")

    def fork(self) -> TrainingMemory:
        """Refused: a training step's memory ends with the step."""
        raise ValueError("a TrainingMemory cannot be forked")
