"""From fields to models: what a model that goes on from another takes over."""

from typing import Any

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
