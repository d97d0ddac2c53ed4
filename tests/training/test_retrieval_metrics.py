"""Metrics of retrieval against hand computations, on whole, ragged and packed rows."""

import math

import pytest
import torch

from drt import DRTForCausalLM
from drt.retrieval import Retrieval
from drt.testing import tiny_config
from drt.training.retrieval_metrics import RetrievalMetrics


def retrieval(rows: list[list[list[int]]], weights: list[list[list[float]]]) -> Retrieval:
    made = torch.tensor(weights)
    return Retrieval(torch.tensor(rows), made, made.log())


def alone(sums: torch.Tensor) -> torch.Tensor:
    return sums


NONE = [-1, -1]
# Landmark c of a row has the chunks before it as candidates; K = 2, so 0, 1 and 2 have no choice.
ROW = [NONE, [0, -1], [1, 0], [0, 2], [3, 0]]
WEIGHTS = [[0.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.75, 0.25], [1.0, 0.0]]


def test_means_by_hand() -> None:
    metrics = RetrievalMetrics(1)
    metrics.add((retrieval([ROW], [WEIGHTS]),))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / 2
    # Landmarks 3 and 4: 3 back and 1 back, 1 back; chunk 1 of 0 .. 3 is retrieved by neither.
    assert metrics.take(alone) == {
        "retrieval_entropy_0": round(entropy, 4),
        "retrieval_top_weight_0": (0.75 + 1.0) / 2,
        "retrieval_distance_0": (0.75 * 3 + 0.25 * 1 + 1.0) / 2,
        "retrieval_dead_chunks_0": 1 / 4,
    }
    assert metrics.take(alone) == {}


def test_dead_chunks_are_told_where_all_may_be_retrieved() -> None:
    some, every = RetrievalMetrics(1, retrieves_all=False), RetrievalMetrics(1)
    for metrics in (some, every):
        metrics.add((retrieval([ROW], [WEIGHTS]),))
    assert every.take(alone).keys() - some.take(alone).keys() == {"retrieval_dead_chunks_0"}


def test_ragged_rows_add_nothing_past_their_end() -> None:
    whole, ragged = RetrievalMetrics(1), RetrievalMetrics(1)
    whole.add((retrieval([ROW], [WEIGHTS]),))
    # The second row has two chunks only, and nobody has a choice in it.
    short = [NONE, [0, -1], NONE, NONE, NONE]
    weights = [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    ragged.add((retrieval([ROW, short], [WEIGHTS, weights]),))
    assert ragged.take(alone) == whole.take(alone)


def test_documents_of_a_row_are_counted_each_by_itself() -> None:
    one, packed = RetrievalMetrics(1), RetrievalMetrics(1)
    for _ in range(2):
        one.add((retrieval([ROW], [WEIGHTS]),))
    later = [[each + 5 if each >= 0 else -1 for each in slots] for slots in ROW]
    packed.add((retrieval([ROW + later], [WEIGHTS + WEIGHTS]),))
    assert packed.take(alone) == one.take(alone)


def test_the_parts_of_a_batch_have_its_means() -> None:
    other = [NONE, [0, -1], [0, 1], [1, 0], [2, 3]]
    together, apart = RetrievalMetrics(2), [RetrievalMetrics(2), RetrievalMetrics(2)]
    both = retrieval([ROW, other], [WEIGHTS, WEIGHTS])
    together.add((both, both))
    for metrics, row in zip(apart, (ROW, other), strict=True):
        part = retrieval([row], [WEIGHTS])
        metrics.add((part, part))
    total = sum(metrics._sums for metrics in apart)
    assert isinstance(total, torch.Tensor)
    assert apart[0].take(lambda sums: total) == together.take(alone)


def test_a_model_that_retrieves_nothing_logs_nothing_and_asks_nobody() -> None:
    def fail(sums: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    assert RetrievalMetrics(0).take(fail) == {}


@pytest.mark.parametrize("marks", ["none", "documents", "ends"])
def test_a_models_retrievals_are_in_range(marks: str) -> None:
    config = tiny_config()
    model = DRTForCausalLM(config).train()
    length = 12 * config.chunk_size
    ids = torch.randint(0, 61, (2, length))
    given = {}
    if marks == "documents":
        given["document_ids"] = (torch.arange(length) >= 5 * config.chunk_size + 3).long()
        given["document_ids"] = given["document_ids"].expand(2, -1)
    if marks == "ends":
        given["chunk_ends"] = torch.rand(2, length) < 0.1
    metrics = RetrievalMetrics(len(config.retrieval_groups))
    out = model(ids, output_retrievals=True, **given)
    metrics.add(out.retrievals)
    found = metrics.take(alone)
    assert len(found) == 4 * len(config.retrieval_groups)
    for group in range(len(config.retrieval_groups)):
        assert 0 <= found[f"retrieval_entropy_{group}"] <= math.log(config.retrieval_topk) + 1e-4
        assert 1 / config.retrieval_topk - 1e-4 <= found[f"retrieval_top_weight_{group}"] <= 1
        assert found[f"retrieval_distance_{group}"] > 0
        assert 0 <= found[f"retrieval_dead_chunks_{group}"] < 1
