"""Slots of index -1, chunks of length 0 and tokens past a length contribute exactly nothing."""

from collections.abc import Callable

import pytest
import torch

from drt.ops.gca import grouped_cross_attention

both_backends = pytest.mark.parametrize("backend", ["reference", "blocked"])
both_softmaxes = pytest.mark.parametrize("softmax_plus_one", [False, True])


def unused_slots(case: object) -> torch.Tensor:
    """(B, C, K) bool."""
    lengths = case.key_lengths.gather(1, case.indices.clamp(min=0).flatten(1))
    return (case.indices < 0) | (lengths.view(case.indices.shape) == 0)


def unread_tokens(case: object) -> torch.Tensor:
    """(B, M, S) bool: past the end of a chunk, or in a chunk that nobody retrieves."""
    B, M, S = case.key.shape[:3]
    retrieved = torch.zeros(B, M + 1, dtype=torch.bool).scatter_(
        1, (case.indices % (M + 1)).flatten(1), True
    )[:, :M]
    return (torch.arange(S) >= case.key_lengths[..., None]) | ~retrieved[..., None]


@both_backends
@both_softmaxes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(3))
def test_unused_numbers_may_be_nan(
    make_case: Callable, backend: str, softmax_plus_one: bool, dtype: torch.dtype, seed: int
) -> None:
    case = make_case(3, 4, M=8, S=5, K=4, ragged=True, seed=seed).to(dtype)
    slots, tokens = unused_slots(case), unread_tokens(case)
    assert slots.any()
    assert (~slots).any()
    assert tokens.any()
    options = {"backend": backend, "softmax_plus_one": softmax_plus_one}
    clean = case.results(grouped_cross_attention, **options)
    with torch.no_grad():
        case.key[tokens] = float("nan")
        case.value[tokens] = float("nan")
        case.weights[slots] = float("nan")
    poisoned = case.results(grouped_cross_attention, **options)
    for name, expected in clean.items():
        # The same operations on the same numbers: bit for bit.
        assert torch.equal(poisoned[name], expected), name
    assert not poisoned["weights"][slots].any()
    assert not poisoned["key"][tokens].any()
    assert not poisoned["value"][tokens].any()


@both_backends
@both_softmaxes
def test_slots_may_be_removed_or_moved(
    make_case: Callable, backend: str, softmax_plus_one: bool
) -> None:
    """An unused slot is as good as none, wherever it stands."""
    case = make_case(1, 4, K=2, full=True)
    none = torch.full((1, 4, 2), -1)
    padded = case._replace(
        indices=torch.cat([none, case.indices], -1)[..., [0, 2, 1, 3]],
        weights=torch.cat([none.double(), case.weights.detach()], -1)[..., [0, 2, 1, 3]],
    )
    options = {"backend": backend, "softmax_plus_one": softmax_plus_one}
    expected = case.run(grouped_cross_attention, **options)
    # The sum over slots may be taken in another order: a few roundings of float64.
    torch.testing.assert_close(
        padded.run(grouped_cross_attention, **options), expected, rtol=1e-13, atol=1e-13
    )


@both_backends
@pytest.mark.parametrize(
    "empty", [{"B": 0}, {"C": 0}, {"Q": 0}, {"K": 0}, {"S": 0}], ids=lambda sizes: next(iter(sizes))
)
def test_empty_dimensions(make_case: Callable, backend: str, empty: dict[str, int]) -> None:
    case = make_case(**empty)
    results = case.results(grouped_cross_attention, backend=backend)
    for name, result in results.items():
        assert result.shape == (case.query if name == "output" else getattr(case, name)).shape
        assert not result.any()


@both_backends
@pytest.mark.parametrize("num_chunks", [0, 2])
def test_no_chunk_retrieved(make_case: Callable, backend: str, num_chunks: int) -> None:
    case = make_case(M=2)
    case = case._replace(
        key=case.key.detach()[:, :num_chunks].requires_grad_(),
        value=case.value.detach()[:, :num_chunks].requires_grad_(),
        indices=torch.full_like(case.indices, -1),
    )
    for name, result in case.results(grouped_cross_attention, backend=backend).items():
        assert not result.any(), name
