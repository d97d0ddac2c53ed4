"""What retrievals look like while a model trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from drt.retrieval import Retrieval

OF_LANDMARKS = ("entropy", "top_weight", "distance")


class RetrievalMetrics:
    """What the landmarks of some forwards retrieved, by retrieval group.

    Only landmarks that had a choice count: those with more candidates than they may retrieve. Their
    means are

    - entropy: of the weights, nats, up to ln K;
    - top_weight: the largest weight;
    - distance: chunks back, weighted;
    - dead_chunks: of the chunks that some of them might have retrieved, the share that none did;
      only where all earlier chunks may be retrieved.

    Args:
        num_groups: retrieval groups of the model; 0 where nothing is retrieved.
        retrieves_all: whether chunks inside the window may be retrieved too.
    """

    def __init__(self, num_groups: int, *, retrieves_all: bool = True) -> None:
        self.retrieves_all = retrieves_all
        # Sums over landmarks and their number; dead chunks and the number of candidates.
        self._sums = torch.zeros(num_groups, len(OF_LANDMARKS) + 3, dtype=torch.float64)

    def add(self, retrievals: tuple[Retrieval, ...]) -> None:
        """Take in what the groups of one forward retrieved."""
        for sums, retrieval in zip(self._sums, retrievals, strict=True):
            sums += _sums(retrieval).cpu()

    def take(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, `retrieval_<what>_<group>`; nothing if there were none.

        Args:
            over_processes: adds up a tensor over the processes; all of them call this together.
        """
        if not len(self._sums):
            return {}
        totals = over_processes(self._sums).tolist()
        self._sums = torch.zeros_like(self._sums)
        means: dict[str, float] = {}
        for group, (*sums, landmarks, dead, candidates) in enumerate(totals):
            if landmarks:
                for name, total in zip(OF_LANDMARKS, sums, strict=True):
                    means[f"retrieval_{name}_{group}"] = round(total / landmarks, 4)
                if self.retrieves_all:
                    means[f"retrieval_dead_chunks_{group}"] = round(dead / candidates, 4)
        return means


@torch.no_grad()
def _sums(retrieval: Retrieval) -> Tensor:
    """What `RetrievalMetrics` adds up, of (B, n, K) retrievals of n chunks a row."""
    choosing = _choosing(retrieval.indices)
    indices, weights = retrieval.indices[choosing], retrieval.weights[choosing].double()
    numbers = torch.arange(choosing.shape[1], device=choosing.device).expand(choosing.shape)
    distances = (numbers[choosing][:, None] - indices) * weights
    return torch.stack(
        [
            torch.special.entr(weights).sum(),
            weights.amax(-1).sum(),
            distances.sum(),
            choosing.sum().double(),
            *_dead(retrieval.indices, choosing),
        ]
    )


def _choosing(indices: Tensor) -> Tensor:
    """(B, n) bool: landmarks with more candidates than they may retrieve.

    In a document each landmark has one candidate more than the one before it: the first that
    retrieves K chunks had no other.
    """
    full = (indices >= 0).all(-1)
    return full & F.pad(full, (1, 0))[:, :-1]


def _dead(indices: Tensor, choosing: Tensor) -> tuple[Tensor, Tensor]:
    """How many candidates of the choosing landmarks none of them retrieved, and of how many."""
    count, topk = indices.shape[1:]
    numbers = torch.arange(count, device=indices.device)
    begins = choosing & ~F.pad(choosing, (1, 0))[:, :-1]
    # The first landmark with a choice in a document has K + 1 candidates.
    first = torch.where(begins, numbers - topk - 1, -1).cummax(-1).values
    candidates = (numbers >= first[..., None]) & (numbers < numbers[:, None])
    candidates = (candidates & choosing[..., None]).any(1)
    used = torch.zeros_like(candidates)
    row, _ = torch.where(choosing)
    used[row[:, None], indices[choosing]] = True
    return (candidates & ~used).sum().double(), candidates.sum().double()
