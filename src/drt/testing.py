"""What tests need, ours and those of users: a tiny model, and error budgets from float64 runs."""

from typing import Any

import torch
from torch import Tensor

from drt.configuration import DRTConfig


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Distance of two tensors of one shape, in the norm of the expected one.

    Args:
        actual: any floating dtype.
        expected: the truth, float64.

    Returns:
        The Frobenius norm of the difference over that of `expected`. Where `expected` is zero, 0
        if `actual` is zero too and infinity otherwise.

    Raises:
        ValueError: if the shapes differ or `expected` is not float64.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    if expected.dtype != torch.float64:
        raise ValueError(f"expected must be float64, got {expected.dtype}")
    difference = torch.linalg.vector_norm(actual.double() - expected).item()
    norm = torch.linalg.vector_norm(expected).item()
    if norm > 0.0:
        return difference / norm
    return 0.0 if difference == 0.0 else float("inf")


def assert_within_budget(
    actual: Tensor, expected: Tensor, *, baseline: Tensor, factor: float = 3.0, name: str = "result"
) -> None:
    """Assert that a result is about as close to the truth as a plain computation of its precision.

    The budget is `factor` times the relative error of `baseline`, plus one rounding of the result
    to its dtype: what an implementation that sums in another order may spend, measured and not
    guessed. It needs no constant that depends on shapes, dtypes or the scale of the inputs.

    Args:
        actual: the result under test.
        expected: the same quantity computed in float64.
        baseline: the same quantity computed with plain operators in the precision of `actual`.
        factor: how much worse than the baseline is still as good.
        name: what the quantity is called in the message.

    Raises:
        AssertionError: if the budget is exceeded or `actual` is not finite where the truth is.
        ValueError: as `relative_error`.
    """
    budget = factor * relative_error(baseline, expected) + torch.finfo(actual.dtype).eps
    error = relative_error(actual, expected)
    # Written so that NaN fails.
    if not error <= budget:
        raise AssertionError(f"{name}: relative error {error:.2e} exceeds the budget {budget:.2e}")


def tiny_config(**changes: Any) -> DRTConfig:
    """A small `DRTConfig` for tests: 257 tokens make several chunks and outgrow the window.

    Two lower and two upper layers in two retrieval groups, chunks of 16 tokens, a window of 24
    positions, 4 chunks per retrieval; weights large enough for a random model to tell inputs apart.

    Args:
        **changes: fields of `DRTConfig` to set otherwise.
    """
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_encoder_layers": 1,
        "retrieval_groups": [1, 1],
        "retrieval_topk": 4,
        "chunk_size": 16,
        "sliding_window": 24,
        "initializer_range": 0.2,
    }
    return DRTConfig(**{**fields, **changes})
