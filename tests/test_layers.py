"""Parts of the model on their own."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from drt import layers
from drt.testing import tiny_config

CPU = torch.device("cpu")


def test_tensors_without_numbers_are_not_kept() -> None:
    """As tools that only count memory, or trace, make them."""
    config = tiny_config(rope_theta=123.0)
    with FakeTensorMode():
        layers.rotary_factors(0, 4, config=config, device=CPU)
    cos, _ = layers.rotary_factors(0, 4, config=config, device=CPU)
    # Position 1 turns the first pair by 1 radian.
    assert float(cos[1, 0, 0]) == pytest.approx(0.5403023)


def test_what_inference_mode_made_can_be_trained_with() -> None:
    """Attention may save the slopes for its backward, which refuses tensors of inference mode."""
    # No other test has so many heads, for which slopes may be kept already.
    with torch.inference_mode():
        layers.alibi_slopes(29, CPU)
    slopes = layers.alibi_slopes(29, CPU)
    assert not slopes.is_inference()
    assert torch.equal(slopes, 2.0 ** (-8.0 * torch.arange(1, 30) / 29))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    norm = layers.DRTRMSNorm(96, 1e-6).to(dtype)
    with torch.no_grad():
        norm.weight.normal_(1.0, 0.1)
    x = (3 * torch.randn(64, 96)).to(dtype)
    wide = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    expected = wide * norm.weight.double()
    # Half a unit in the last place of the result, and a few roundings of float32.
    error = (norm(x).double() - expected).abs() / expected.abs()
    assert error.max() <= torch.finfo(dtype).eps / 2 + 8 * torch.finfo(torch.float32).eps
