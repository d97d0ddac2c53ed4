"""What retrievals look like while a model trains."""

from __future__ import annotations

import torch
from torch import Tensor

from drt.retrieval import Retrieval


class RetrievalMetrics:
    """Means over the retrievals of some forwards, by retrieval group.

    Only landmarks that had a choice count: those with more candidates than they may retrieve.
    Numbers are those of this process.
    """

    def __init__(self) -> None:
        self._sums: list[dict[str, float]] = []
        self._count = 0

    def add(self, retrievals: tuple[Retrieval, ...]) -> None:
        """Take in what the groups of one forward retrieved."""
        measured = [_measure(retrieval) for retrieval in retrievals]
        if any(not each for each in measured):
            return
        if not self._sums:
            self._sums = [dict.fromkeys(each, 0.0) for each in measured]
        for sums, each in zip(self._sums, measured, strict=True):
            for name, value in each.items():
                sums[name] += value
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means since the last call, `retrieval_<what>_<group>`; nothing if there were none."""
        means = {
            f"retrieval_{name}_{group}": round(value / self._count, 4)
            for group, sums in enumerate(self._sums)
            for name, value in sums.items()
        }
        self._sums, self._count = [], 0
        return means


@torch.no_grad()
def _measure(retrieval: Retrieval) -> dict[str, float]:
    """Of (B, n, K) retrievals of n chunks a row.

    entropy: of the weights, nats, up to ln K; top_weight: the largest weight; distance: chunks
    back, weighted; dead_chunks: share of the chunks that no landmark of the row retrieved.
    """
    count, topk = retrieval.indices.shape[1:]
    if count <= topk + 1:
        return {}
    # Landmark c has c candidates.
    chosen = slice(topk + 1, None)
    indices, weights = retrieval.indices[:, chosen], retrieval.weights[:, chosen].float()
    numbers = torch.arange(topk + 1, count, device=indices.device)
    found = indices >= 0
    entropy = torch.special.entr(weights).sum(-1)
    distance = ((numbers[:, None] - indices) * found * weights).sum(-1)
    return {
        "entropy": float(entropy.mean()),
        "top_weight": float(weights.amax(-1).mean()),
        "distance": float(distance.mean()),
        "dead_chunks": _dead(indices, count),
    }


def _dead(indices: Tensor, count: int) -> float:
    """Share of the chunks but the last, which nobody can retrieve, that no landmark retrieved."""
    used = torch.zeros(len(indices), count + 1, device=indices.device)
    used.scatter_(1, indices.flatten(1).clamp_min(-1) + 1, 1.0)
    return float(1 - used[:, 1:count].mean())
