"""Cases small enough to work out by hand."""

import math

import pytest
import torch

from drt.ops.gca import grouped_cross_attention

both_backends = pytest.mark.parametrize("backend", ["reference", "blocked"])

# Exact up to the rounding of a few float64 operations on numbers of order 1.
EXACT = {"rtol": 1e-14, "atol": 1e-14}


def tensor(values: object, *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(shape)


@both_backends
def test_one_token_chunks_add_their_weighted_values(backend: str) -> None:
    # The softmax over one token is 1 whatever the score.
    output = grouped_cross_attention(
        tensor([3.0], 1, 1, 1, 1, 1),
        tensor([7.0, -2.0], 1, 2, 1, 1, 1),
        tensor([10.0, 100.0], 1, 2, 1, 1, 1),
        torch.tensor([[[1, 0]]]),
        tensor([0.5, 0.25], 1, 1, 2),
        backend=backend,
    )
    torch.testing.assert_close(output, tensor([52.5], 1, 1, 1, 1, 1), **EXACT)


@both_backends
def test_softmax_is_taken_inside_each_chunk(backend: str) -> None:
    # Scores ln 1, ln 3 | ln 1, ln 1: probabilities 1/4, 3/4 | 1/2, 1/2, not shared between chunks.
    output = grouped_cross_attention(
        tensor([1.0], 1, 1, 1, 1, 1),
        tensor([0.0, math.log(3.0), 0.0, 0.0], 1, 2, 2, 1, 1),
        tensor([4.0, 8.0, 10.0, 20.0], 1, 2, 2, 1, 1),
        torch.tensor([[[0, 1]]]),
        tensor([1.0, 2.0], 1, 1, 2),
        backend=backend,
    )
    torch.testing.assert_close(output, tensor([7.0 + 2.0 * 15.0], 1, 1, 1, 1, 1), **EXACT)


@both_backends
def test_plus_one_adds_a_key_of_score_zero(backend: str) -> None:
    # Scores ln 2, ln 5: probabilities 2/8 and 5/8, the last 1/8 goes nowhere.
    output = grouped_cross_attention(
        tensor([1.0], 1, 1, 1, 1, 1),
        tensor([math.log(2.0), math.log(5.0)], 1, 1, 2, 1, 1),
        tensor([8.0, 16.0], 1, 1, 2, 1, 1),
        torch.tensor([[[0]]]),
        tensor([1.0], 1, 1, 1),
        softmax_plus_one=True,
        backend=backend,
    )
    torch.testing.assert_close(output, tensor([2.0 + 10.0], 1, 1, 1, 1, 1), **EXACT)


@both_backends
@pytest.mark.parametrize(("score", "share"), [(-800.0, 0.0), (0.0, 0.5), (800.0, 1.0)])
def test_plus_one_does_not_overflow(backend: str, score: float, share: float) -> None:
    # exp(800) is not a float64; the share of the only token is 1 / (1 + exp(-score)).
    output = grouped_cross_attention(
        tensor([score], 1, 1, 1, 1, 1),
        tensor([1.0], 1, 1, 1, 1, 1),
        tensor([2.0], 1, 1, 1, 1, 1),
        torch.tensor([[[0]]]),
        tensor([1.0], 1, 1, 1),
        softmax_plus_one=True,
        backend=backend,
    )
    torch.testing.assert_close(output, tensor([2.0 * share], 1, 1, 1, 1, 1), **EXACT)


@both_backends
def test_scale_defaults_to_the_inverse_root_of_the_width(backend: str) -> None:
    # <q, k> = 2 ln 3 over a width of 4: the score is ln 3.
    query = tensor([2.0, 0.0, 0.0, 0.0], 1, 1, 1, 1, 4)
    key = torch.zeros(1, 1, 2, 1, 4, dtype=torch.float64)
    key[0, 0, 1, 0, 0] = math.log(3.0)
    value = torch.zeros_like(key)
    value[0, 0, 1, 0, 2] = 4.0
    arguments = (query, key, value, torch.tensor([[[0]]]), tensor([1.0], 1, 1, 1))
    default = grouped_cross_attention(*arguments, backend=backend)
    torch.testing.assert_close(default.flatten(), tensor([0.0, 0.0, 3.0, 0.0], 4), **EXACT)
    # A scale of 1 makes the score 2 ln 3: probabilities 1/10 and 9/10.
    doubled = grouped_cross_attention(*arguments, scale=1.0, backend=backend)
    torch.testing.assert_close(doubled.flatten(), tensor([0.0, 0.0, 3.6, 0.0], 4), **EXACT)


@both_backends
def test_query_heads_share_key_heads_in_order(backend: str) -> None:
    # H = 4 and G = 2: heads 0, 1 read key head 0, heads 2, 3 read key head 1.
    output = grouped_cross_attention(
        torch.ones(1, 1, 1, 4, 1, dtype=torch.float64),
        torch.ones(1, 1, 1, 2, 1, dtype=torch.float64),
        tensor([5.0, 7.0], 1, 1, 1, 2, 1),
        torch.tensor([[[0]]]),
        tensor([1.0], 1, 1, 1),
        backend=backend,
    )
    torch.testing.assert_close(output.flatten(), tensor([5.0, 5.0, 7.0, 7.0], 4), **EXACT)


@both_backends
def test_lengths_and_rows_select_what_is_read(backend: str) -> None:
    # Row 0 reads the first token of a chunk of 3; row 1 the two tokens of its own chunk 0, equally.
    output = grouped_cross_attention(
        torch.zeros(2, 1, 1, 1, 1, dtype=torch.float64),
        torch.zeros(2, 1, 3, 1, 1, dtype=torch.float64),
        tensor([1.0, 2.0, 4.0, 10.0, 20.0, 40.0], 2, 1, 3, 1, 1),
        torch.tensor([[[0]], [[0]]]),
        tensor([1.0, 1.0], 2, 1, 1),
        key_lengths=torch.tensor([[1], [2]]),
        backend=backend,
    )
    torch.testing.assert_close(output.flatten(), tensor([1.0, 15.0], 2), **EXACT)


@both_backends
def test_gradients_of_a_two_token_chunk(backend: str) -> None:
    # One query q = 1, keys 0 and ln 3, values 0 and 4, weight 2: p = (1/4, 3/4), output 6.
    # d/dw = 3; d/dv = w p = (1/2, 3/2); d/ds_1 = w p_1 (v_1 - 3) = 3/2 = -d/ds_0;
    # d/dk = q d/ds; d/dq = k_1 d/ds_1.
    query = tensor([1.0], 1, 1, 1, 1, 1).requires_grad_()
    key = tensor([0.0, math.log(3.0)], 1, 1, 2, 1, 1).requires_grad_()
    value = tensor([0.0, 4.0], 1, 1, 2, 1, 1).requires_grad_()
    weights = tensor([2.0], 1, 1, 1).requires_grad_()
    output = grouped_cross_attention(
        query, key, value, torch.tensor([[[0]]]), weights, backend=backend
    )
    output.sum().backward()
    for leaf, expected in (
        (query, [1.5 * math.log(3.0)]),
        (key, [-1.5, 1.5]),
        (value, [0.5, 1.5]),
        (weights, [3.0]),
    ):
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.flatten(), tensor(expected, -1), **EXACT)
