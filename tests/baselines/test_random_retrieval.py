"""Random chunks: among the candidates, all sets alike likely, the same wherever a row is cut."""

from itertools import combinations

import pytest
import torch

from drt.baselines.random_retrieval import (
    draw_by_count,
    draw_freely,
    retrieve_at_random,
    weigh_uniformly,
)


@pytest.mark.parametrize("source", ["freely", "by_count"])
def test_every_set_of_candidates_is_as_likely(source: str) -> None:
    runs, topk, count = 6000, 2, torch.tensor([[4]])
    if source == "freely":
        generator = torch.Generator().manual_seed(0)
        draws = draw_freely(count.expand(1, runs), topk=topk, generator=generator)
    else:
        parts = [draw_by_count(count, topk=topk, seed=seed, group=1) for seed in range(runs)]
        draws = torch.cat(parts, dim=1)
    chosen = retrieve_at_random(draws, count.expand(1, runs), None)[0].sort(-1).values.tolist()
    for pair in combinations(range(4), 2):
        found = sum(each == list(pair) for each in chosen)
        # Binomial(6000, 1/6): standard deviation 29, so this is five of them.
        assert abs(found - runs / 6) < 145


def test_only_candidates_and_none_twice() -> None:
    count = torch.arange(-1, 40).view(1, -1)
    firsts = torch.arange(41).view(1, -1) * 3
    draws = draw_by_count(count, topk=6, seed=3, group=0)
    chosen = retrieve_at_random(draws, count, firsts)[0]
    for n, (first, row) in enumerate(zip(firsts[0].tolist(), chosen.tolist(), strict=True), -1):
        found = [number for number in row if number >= 0]
        assert len(found) == len(set(found)) == min(max(n, 0), 6)
        assert all(first <= number < first + n for number in found)
        # What is missing is missing at the right.
        assert row[len(found) :] == [-1] * (6 - len(found))


def test_draws_depend_on_seed_group_and_count_alone() -> None:
    count = torch.tensor([[9, 30], [30, 9]])
    draws = draw_by_count(count, topk=3, seed=1, group=0)
    assert torch.equal(draws[0, 0], draws[1, 1])
    assert torch.equal(draws[0, 1], draws[1, 0])
    assert torch.equal(draws[:1, :1], draw_by_count(count[:1, :1], topk=3, seed=1, group=0))
    # Of 62 bits, so that any two agree only by a mistake.
    others = [draw_by_count(count, topk=3, seed=s, group=g) for s, g in ((2, 0), (1, 1), (-1, 0))]
    assert len(set(torch.stack([draws, *others]).flatten().tolist())) == 4 * 6
    assert draws.min() >= 0


def test_weights_are_equal_over_what_was_found() -> None:
    retrieval = weigh_uniformly(torch.tensor([[[4, 1, -1], [-1, -1, -1]]]))
    assert torch.equal(retrieval.weights, torch.tensor([[[0.5, 0.5, 0], [0, 0, 0]]]))
