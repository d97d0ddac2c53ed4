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
        layers._slopes(29, CPU)
    slopes = layers._slopes(29, CPU)
    assert not slopes.is_inference()
    assert torch.equal(slopes, layers.alibi_slopes(29))
