"""What is read and scored is spread evenly, and every length gets the same targets."""

import numpy as np
import pytest

from drt.evaluation.windows import (
    Excerpt,
    Window,
    choose_excerpts,
    choose_targets,
    cut_windows,
    shares,
    shorten,
    spread,
)

from .conftest import Prepare


def test_even_spacing() -> None:
    assert spread(10, 1).tolist() == [5]
    assert spread(10, 2).tolist() == [2, 7]
    assert spread(3, 9).tolist() == [0, 1, 2]
    assert spread(0, 4).tolist() == []
    assert spread(4, 0).tolist() == []
    for count, chosen in ((17, 5), (1000, 999), (7, 7)):
        assert len(set(spread(count, chosen).tolist())) == chosen


@pytest.mark.parametrize(
    ("sizes", "total", "wanted"),
    [
        ([5, 5], 20, [5, 5]),
        ([9, 9, 9], 12, [4, 4, 4]),
        # The first leaves four, which the others share.
        ([1, 9, 9], 15, [1, 7, 7]),
        ([9, 9, 9, 9], 2, [0, 1, 0, 1]),
        ([2, 0, 9], 4, [2, 0, 2]),
        ([3], 0, [0]),
    ],
)
def test_shares(sizes: list[int], total: int, wanted: list[int]) -> None:
    assert shares(np.array(sizes), total).tolist() == wanted


def test_windows_of_a_length() -> None:
    excerpts = [Excerpt(3, 10), Excerpt(5, 9), Excerpt(8, 2)]
    assert cut_windows(excerpts, 4) == [
        Window(3, 0, 1, 4),
        Window(3, 4, 5, 8),
        Window(3, 8, 9, 10),
        Window(5, 0, 1, 4),
        # A ninth token by itself is predicted by nothing.
        Window(5, 4, 5, 8),
        Window(8, 0, 1, 2),
    ]


def test_targets_are_the_same_for_every_length() -> None:
    excerpts = [Excerpt(0, 15), Excerpt(1, 40), Excerpt(2, 16), Excerpt(4, 64)]
    targets = choose_targets(excerpts, longest=16, stride=4, max_targets=100)
    # Stretches of four begin at 12, 16, ...: none fits in 15 tokens.
    assert [x.first for x in targets if x.document == 1] == [12, 16, 20, 24, 28, 32, 36]
    assert [x.first for x in targets if x.document == 2] == [12]
    assert len([x for x in targets if x.document == 4]) == 13
    assert {x.document for x in targets} == {1, 2, 4}
    assert {x.num_tokens for x in targets} == {16}
    assert {x.num_scored for x in targets} == {4}
    shorter = shorten(targets, 8)
    assert [(x.document, x.first, x.stop) for x in shorter] == [
        (x.document, x.first, x.stop) for x in targets
    ]
    assert {x.num_tokens for x in shorter} == {8}
    few = choose_targets(excerpts, longest=16, stride=4, max_targets=6)
    assert [x.document for x in few] == [1, 1, 2, 4, 4, 4]
    assert set(few) <= set(targets)


def test_excerpts(make_split: Prepare) -> None:
    split = make_split(["x" * size for size in (5, 30, 1, 20, 8)])

    def choose(**limits: int) -> list[tuple[int, int]]:
        limits = {"min_tokens": 2, "longest": 2, **limits}
        return [tuple(each) for each in choose_excerpts(split, **limits)]

    assert choose() == [(0, 5), (1, 30), (3, 20), (4, 8)]
    assert choose(min_tokens=8) == [(1, 30), (3, 20), (4, 8)]
    assert choose(max_documents=2) == [(1, 30), (4, 8)]
    assert choose(max_document_tokens=9) == [(0, 5), (1, 9), (3, 9), (4, 8)]
    assert choose(max_tokens=23) == [(0, 5), (1, 6), (3, 6), (4, 6)]
    # One token by itself is predicted by nothing.
    assert choose(max_tokens=5) == [(3, 2)]
    with pytest.raises(ValueError, match=r"31 tokens of one document .* has 30 within"):
        choose(longest=31)
    with pytest.raises(ValueError, match=r"10 tokens of one document .* has 6 within"):
        choose(longest=10, max_tokens=23)
    with pytest.raises(ValueError, match=r"25 tokens of one document .* has 20 within"):
        choose(longest=25, max_documents=1)
    with pytest.raises(ValueError, match=r"40 tokens of one document .* has 30 within"):
        choose(min_tokens=40, longest=40, max_tokens=23)
