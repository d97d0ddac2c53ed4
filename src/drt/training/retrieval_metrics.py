"""What retrievals look like while a model trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from drt.retrieval import Retrieval

MEASURES = ("entropy", "top_weight", "distance", "dead_chunks")


class RetrievalMetrics:
    """Means over the retrievals of some forwards, by retrieval group.

    Only landmarks that had a choice count: those with more candidates than they may retrieve. A
    forward counts as one, whatever its rows.

    Args:
        num_groups: retrieval groups of the model; 0 where nothing is retrieved.
    """

    def __init__(self, num_groups: int) -> None:
        self._sums = torch.zeros(num_groups, len(MEASURES) + 1, dtype=torch.float64)

    def add(self, retrievals: tuple[Retrieval, ...]) -> None:
        """Take in what the groups of one forward retrieved."""
        for sums, retrieval in zip(self._sums, retrievals, strict=True):
            measured = _measure(retrieval)
            if measured is not None:
                sums += torch.tensor([*measured, 1.0], dtype=torch.float64)

    def take(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means since the last call, `retrieval_<what>_<group>`; nothing if there were none.

        Args:
            over_processes: adds up a tensor over the processes; all of them call this together.
        """
        if not len(self._sums):
            return {}
        totals = over_processes(self._sums)
        self._sums = torch.zeros_like(self._sums)
        return {
            f"retrieval_{name}_{group}": round(total / count, 4)
            for group, (*sums, count) in enumerate(totals.tolist())
            for name, total in zip(MEASURES, sums, strict=True)
            if count
        }


@torch.no_grad()
def _measure(retrieval: Retrieval) -> tuple[float, ...] | None:
    """`MEASURES` of (B, n, K) retrievals of n chunks a row; None where no landmark had a choice.

    entropy: of the weights, nats, up to ln K; top_weight: the largest weight; distance: chunks
    back, weighted; dead_chunks: of the chunks that a landmark with a choice might have retrieved,
    the share that none did.
    """
    choosing = _choosing(retrieval.indices)
    if not choosing.any():
        return None
    indices, weights = retrieval.indices[choosing], retrieval.weights[choosing].float()
    numbers = torch.arange(choosing.shape[1], device=choosing.device).expand(choosing.shape)
    distance = ((numbers[choosing][:, None] - indices) * weights).sum(-1)
    return (
        float(torch.special.entr(weights).sum(-1).mean()),
        float(weights.amax(-1).mean()),
        float(distance.mean()),
        _dead(retrieval.indices, choosing),
    )


def _choosing(indices: Tensor) -> Tensor:
    """(B, n) bool: landmarks with more candidates than they may retrieve.

    In a document each landmark has one candidate more than the one before it: the first that
    retrieves K chunks had no other.
    """
    full = (indices >= 0).all(-1)
    return full & torch.nn.functional.pad(full, (1, 0))[:, :-1]


def _dead(indices: Tensor, choosing: Tensor) -> float:
    """Share of the candidates of the choosing landmarks that none of them retrieved."""
    count, topk = indices.shape[1:]
    numbers = torch.arange(count, device=indices.device)
    begins = choosing & ~torch.nn.functional.pad(choosing, (1, 0))[:, :-1]
    # The first landmark with a choice in a document has K + 1 candidates.
    first = torch.where(begins, numbers - topk - 1, -1).cummax(-1).values
    candidates = (numbers >= first[..., None]) & (numbers < numbers[:, None])
    candidates = (candidates & choosing[..., None]).any(1)
    used = torch.zeros_like(candidates)
    row, _ = torch.where(choosing)
    used[row[:, None], indices[choosing]] = True
    return float((candidates & ~used).sum() / candidates.sum())
