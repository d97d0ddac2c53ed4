"""Operations of a row by an independent count."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drt import DRTForCausalLM
from drt.architectures import known_fields
from drt.baselines import AblationConfig, AblationForCausalLM
from drt.flops import flops_if_known, flops_of_row
from drt.testing import tiny_config

VOCAB, E, INNER, HEADS, WIDTH, LENGTH = 61, 32, 48, 4, 8, 96
# A multiplication and an addition; weights are multiplied in forward, and twice in backward.
LINEAR = 2 * 3
# Attention multiplies twice in forward; four times in backward, and once to have its scores again.
ATTENTION = 2 * 7


def test_operations_of_a_llama() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=E,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    weights = 3 * (4 * E * E + 3 * E * INNER) + VOCAB * E
    attention = 3 * LENGTH * LENGTH * E
    wanted = LINEAR * LENGTH * weights + ATTENTION * attention
    assert flops_of_row(LlamaForCausalLM(config), LENGTH) == wanted


def drt(**changes: Any) -> DRTForCausalLM:
    given = {
        "vocab_size": VOCAB,
        "hidden_size": E,
        "intermediate_size": INNER,
        "num_hidden_layers": 5,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH,
        "num_encoder_layers": 2,
        "retrieval_groups": [1, 2],
        "retrieval_topk": 3,
        "chunk_size": 8,
        "sliding_window": 16,
        "landmark_size": None,
    }
    return DRTForCausalLM(tiny_config(**{**given, **changes}))


def test_operations_of_a_drt() -> None:
    chunks = LENGTH // 8
    positions = LENGTH + chunks
    layer = 4 * E * E + 3 * E * INNER
    # The blocks of an upper layer begin a landmark late: one more holds the rest.
    blocks = positions + 9
    linear = 5 * positions * layer + 3 * blocks * 2 * E * E
    # The encoder reads chunks with their landmarks, and makes keys and values of their content.
    linear += 2 * positions * layer + LENGTH * 2 * E * E
    linear += LENGTH * VOCAB * E
    # Each landmark is scored with all, for each of the two groups.
    linear += 2 * chunks * chunks * E
    window, retrieved, inside = 5 * positions * 16, 3 * blocks * 3 * 8, 2 * positions * 9
    wanted = LINEAR * linear + ATTENTION * (window + retrieved + inside) * E
    assert flops_of_row(drt(retrieval_onset="landmark"), LENGTH) == wanted


def test_what_saves_memory_is_not_counted() -> None:
    plain = drt(loss_chunk_size=None)
    chunked = drt(loss_chunk_size=16)
    chunked.gradient_checkpointing_enable()
    before = torch.get_rng_state()
    assert flops_of_row(chunked, LENGTH) == flops_of_row(plain, LENGTH)
    assert torch.equal(torch.get_rng_state(), before)


def test_operations_of_a_retriever_that_reads_text_are_not_the_models() -> None:
    known, given = known_fields("drt"), drt().config.to_dict()
    fields = {key: value for key, value in given.items() if key in known} | {"retriever": "fixed"}
    reads_ids, reads_text = (
        AblationForCausalLM(AblationConfig(**fields, retriever_name=name))
        for name in ("hashed-ngrams", "wordllama")
    )
    assert flops_of_row(reads_text, LENGTH) == flops_of_row(reads_ids, LENGTH) > 0


def test_operations_of_a_model_that_looks_at_numbers_are_not_known(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = DRTForCausalLM.forward

    def looks(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        int(input_ids.sum())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(DRTForCausalLM, "forward", looks)
    model = drt()
    assert flops_if_known(model, LENGTH) is None
    assert "operations of a DRTForCausalLM cannot be counted" in caplog.text
