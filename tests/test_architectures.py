"""From fields to models: what a model that goes on from another takes over."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from drt.architectures import make_config, make_model
from drt.configuration import DRTConfig
from drt.data import byte_tokenizer


def test_a_model_that_goes_on_from_a_trained_one_generates(small_model: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer()
    trained = DRTConfig(vocab_size=len(tokenizer), **small_model)
    # As the Trainer of transformers leaves it.
    trained.use_cache = False
    config = make_config({"retrieval_topk": 1}, tokenizer, initial=trained)
    assert config.use_cache
    model = make_model(config, seed=0).eval()
    assert model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=2).shape[1] <= 5


def test_fields_of_the_first_are_kept_and_given_ones_win() -> None:
    first = LlamaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, use_cache=False
    )
    config = make_config({"max_position_embeddings": 99}, byte_tokenizer(), initial=first)
    kept = (config.vocab_size, config.hidden_size, config.num_hidden_layers)
    assert (*kept, config.max_position_embeddings) == (300, 32, 3, 99)
    assert not make_config({"use_cache": False}, byte_tokenizer(), initial=first).use_cache


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        # As YAML reads 0, 10000, 2e-2 and 1e-6.
        ({"retrieval_noise": 0, "rope_theta": 10000}, {"retrieval_noise": 0.0, "rope_theta": 1e4}),
        ({"initializer_range": "2e-2", "rms_norm_eps": "1e-6"}, {"initializer_range": 0.02}),
        ({"model_type": "drt_ablation", "retriever_scale": 10}, {"retriever_scale": 10.0}),
        (
            {"model_type": "llama", "rms_norm_eps": "1e-6", "initializer_range": 1},
            {"rms_norm_eps": 1e-6, "initializer_range": 1.0},
        ),
    ],
)
def test_what_yaml_reads_as_whole_or_as_text_is_a_float(
    model: dict[str, Any], wanted: dict[str, float]
) -> None:
    config = make_config(model, byte_tokenizer())
    for name, value in wanted.items():
        assert getattr(config, name) == value
        assert type(getattr(config, name)) is float


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rms_norm_eps": "small"}, "model.rms_norm_eps must be a number, got 'small'"),
        ({"retrieval_noise": True}, r"model.retrieval_noise must be int \| float, got True"),
        ({"retrieval_groups": 2}, r"model.retrieval_groups must be list\[int\].*, got 2"),
        ({"retrieval_topk": "many"}, "model.retrieval_topk must be int, got 'many'"),
        ({"retrieval_onset": "tokens"}, r"must be Literal\['chunk', 'landmark'\], got 'tokens'"),
        (
            {"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7},
            r"^model: .*not a multiple.* got .*hidden_size=100, model\.num_attention_heads=7$",
        ),
        (
            {"model_type": "llama", "num_attention_heads": 0, "hidden_size": 64},
            r"^model: .*division.* by zero, got model\.num_attention_heads=0$",
        ),
    ],
)
def test_what_a_configuration_refuses_is_one_line(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        make_config(model, byte_tokenizer())
    assert "\n" not in str(refused.value)
