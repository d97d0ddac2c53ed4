"""A config is what was asked for, or an error that names the value."""

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from drt import DRTConfig
from drt.testing import tiny_config


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    config = tiny_config(retrieval_onset="chunk", position_embedding="alibi", rope_theta=5e5)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, DRTConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert loaded.rope_theta == 5e5
    assert loaded.retrieval_groups == [1, 1]


def test_a_whole_number_is_a_float_where_one_is_wanted(tmp_path: Path) -> None:
    changes = {"retrieval_noise": 0, "rope_theta": 10000, "early_close_rate": 1}
    config = tiny_config(**changes)
    assert all(type(getattr(config, name)) is float for name in changes)
    config.save_pretrained(tmp_path)
    floats = tiny_config(**{name: float(value) for name, value in changes.items()})
    assert (tmp_path / "config.json").read_text() == floats.to_json_string()
    with pytest.raises(StrictDataclassError, match="retrieval_noise"):
        tiny_config(retrieval_noise=True)


def test_layers_are_counted_from_groups() -> None:
    config = tiny_config(num_hidden_layers=7, retrieval_groups=[1, 3])
    assert (config.num_lower_layers, config.num_upper_layers) == (3, 4)
    assert len(config.layer_types) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrieval_topk": 0}, "retrieval_topk must be at least 1, got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"sliding_window": -3}, "sliding_window must be at least 1, got -3"),
        ({"retrieval_noise": -1.0}, r"retrieval_noise must not be negative, got -1\.0"),
        ({"retrieval_noise": math.nan}, "retrieval_noise must not be negative, got nan"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps must not be negative, got -1\.0"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads must be at least 1"),
        ({"num_encoder_layers": -1}, "num_encoder_layers must not be negative, got -1"),
        ({"retrieval_groups": [0]}, r"at least 1 layer, got \[0\]"),
        ({"retrieval_groups": [3, 2]}, "hold 5 layers, the model has num_hidden_layers = 4"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "32 is not a multiple of"),
        ({"rope_theta": 0.0}, r"rope_theta must be positive and finite, got 0\.0"),
        ({"rope_theta": -1.0}, r"rope_theta must be positive and finite, got -1\.0"),
        ({"rope_theta": math.inf}, "rope_theta must be positive and finite, got inf"),
        ({"rope_theta": math.nan}, "rope_theta must be positive and finite, got nan"),
        ({"hidden_size": 33}, "33 is not a multiple of num_attention_heads 4; set head_dim"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        # The chunk encoder has rotary positions whatever self-attention has.
        ({"head_dim": 7, "position_embedding": "alibi"}, "even head_dim, got 7"),
        ({"landmark_size": 0}, "landmark_size must be at least 1, got 0"),
        ({"loss_chunk_size": 0}, "loss_chunk_size must be at least 1, got 0"),
        ({"early_close_rate": -0.5}, r"from 0 to chunk_size = 16, got -0\.5"),
        ({"early_close_rate": 17.0}, r"from 0 to chunk_size = 16, got 17\.0"),
        ({"retrieval_top_k": 8}, "unknown DRTConfig key 'retrieval_top_k'.*retrieval_topk"),
        ({"nonsense": 1}, "unknown DRTConfig key 'nonsense'"),
    ],
)
def test_wrong_sizes_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_head_width_that_is_given_need_not_divide_the_hidden_size() -> None:
    assert tiny_config(hidden_size=33, head_dim=8).head_dim == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"retrieval_onset": "token"},
        {"position_embedding": "none"},
        {"chunk_size": "16"},
        {"loss_chunk_size": 1.5},
    ],
)
def test_wrong_types_raise(changes: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassError, match=next(iter(changes))):
        tiny_config(**changes)


def test_what_quantizing_writes_is_read_again(tmp_path: Path) -> None:
    config = tiny_config(quantization_config={"quant_method": "torchao"})
    config.save_pretrained(tmp_path)
    assert DRTConfig.from_pretrained(tmp_path).quantization_config == config.quantization_config
