"""The memory of a training step: plain tensors inside the autograd graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drt.memory.interface import Chunks
from drt.retrieval import Retrieval, select_chunks


class TrainingMemory:
    """Holds the chunks of whole rows, written once, and lets gradients through.

    Scores are materialized, (B, C, C) numbers: right for rows of training length.
    """

    def __init__(self, *, noise: float = 0.0, generator: torch.Generator | None = None) -> None:
        self.noise = noise
        self.generator = generator
        self._landmarks: Tensor | None = None
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self._landmarks is None else self._landmarks.shape[1]

    def append(self, landmarks: Tensor, keys: Tensor, values: Tensor) -> None:
        """Set the chunks of the rows; a second call is refused."""
        if self._landmarks is not None:
            raise ValueError("a TrainingMemory is written once, with all chunks of its rows")
        self._landmarks, self._keys, self._values = landmarks, keys, values

    def search(self, queries: Tensor, limits: Tensor, *, topk: int) -> Retrieval:
        """As `ChunkMemory.search`, with noise on the choice and gradients through the scores."""
        assert self._landmarks is not None
        landmarks = self._landmarks.float()
        scores = queries.float() @ landmarks.transpose(1, 2) / math.sqrt(landmarks.shape[-1])
        return select_chunks(scores, limits, topk=topk, noise=self.noise, generator=self.generator)

    def gather(self, indices: Tensor) -> Chunks:
        """All chunks and the indices as they are: nothing is copied."""
        assert self._keys is not None
        assert self._values is not None
        return Chunks(self._keys, self._values, indices)

    def fork(self) -> TrainingMemory:
        """Refused: a training step's memory ends with the step."""
        raise ValueError("a TrainingMemory cannot be forked")
