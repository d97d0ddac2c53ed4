"""The assertions of drt.testing, which the other tests here rely on."""

import pytest
import torch

from drt.testing import assert_within_budget, relative_error

TRUTH = torch.tensor([3.0, 4.0], dtype=torch.float64)


def test_relative_error_is_relative_to_the_truth() -> None:
    # A difference of norm 0.5 on a truth of norm 5; the numbers are exact in binary.
    assert relative_error(torch.tensor([3.5, 4.0]), TRUTH) == 0.1
    assert relative_error(torch.zeros(2), torch.zeros(2, dtype=torch.float64)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2, dtype=torch.float64)) == float("inf")


def test_budget_is_the_baseline_times_the_factor() -> None:
    baseline = torch.tensor([3.5, 4.0])
    assert_within_budget(torch.tensor([3.0, 5.4]), TRUTH, baseline=baseline)
    with pytest.raises(AssertionError, match=r"output: relative error 3\.20e-01 .* 3\.00e-01"):
        assert_within_budget(torch.tensor([3.0, 5.6]), TRUTH, baseline=baseline, name="output")
    with pytest.raises(AssertionError):
        assert_within_budget(torch.tensor([3.0, 5.4]), TRUTH, baseline=baseline, factor=2.0)


def test_one_rounding_is_free() -> None:
    one, eps = torch.ones(1), torch.finfo(torch.float32).eps
    assert_within_budget(one + eps, one.double(), baseline=one)
    with pytest.raises(AssertionError):
        assert_within_budget(one + 2 * eps, one.double(), baseline=one)


def test_nan_exceeds_every_budget() -> None:
    result = torch.tensor([3.0, float("nan")])
    with pytest.raises(AssertionError, match="nan"):
        assert_within_budget(result, TRUTH, baseline=torch.zeros(2))


def test_mismatched_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        relative_error(torch.zeros(3), TRUTH)
    with pytest.raises(ValueError, match="float32"):
        relative_error(torch.zeros(2), TRUTH.float())
