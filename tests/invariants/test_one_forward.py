"""Training, prefill in any segments and decoding are one function: the logits say so."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt import DeviceMemory, DRTForCausalLM
from drt.testing import tiny_config

# The bound of the specification: float32 logits of order 1 after a few layers.
TOLERANCE = 1e-4

configs = st.fixed_dictionaries(
    {
        "chunk_size": st.integers(1, 20),
        "sliding_window": st.integers(1, 60),
        "retrieval_topk": st.integers(1, 6),
        "retrieval_groups": st.sampled_from([[], [1], [2], [1, 1], [2, 1], [1, 1, 1]]),
        "retrieval_onset": st.sampled_from(["chunk", "landmark"]),
        "position_embedding": st.sampled_from(["rope", "alibi"]),
        "softmax_plus_one": st.booleans(),
        "exclude_window_chunks": st.booleans(),
        "landmark_size": st.sampled_from([None, 8]),
    }
)


def make(fields: dict[str, Any]) -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(tiny_config(**fields)).eval()


@settings(max_examples=40, deadline=None)
@given(configs, st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 10**6))
@torch.no_grad()
def test_segments_are_invisible(fields: dict[str, Any], pieces: list[int], seed: int) -> None:
    model = make(fields)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (2, sum(pieces)), generator=generator)
    whole = model(ids, output_retrievals=True)
    state = model.new_state(2, memory=DeviceMemory(slab_size=3))
    outs = [
        model(part, past_key_values=state, output_retrievals=True)
        for part in ids.split(pieces, dim=1)
    ]
    logits = torch.cat([out.logits for out in outs], dim=1)
    assert (logits - whole.logits).abs().max() < TOLERANCE if sum(pieces) else True
    assert state.get_seq_length() == sum(pieces)
    for group, retrieval in enumerate(whole.retrievals):
        scores = torch.cat([out.retrievals[group].scores for out in outs], dim=1)
        # Scores and not indices: ties may be broken either way.
        assert torch.allclose(scores, retrieval.scores, atol=TOLERANCE)


@settings(max_examples=12, deadline=None)
@given(configs, st.integers(1, 70))
@torch.no_grad()
def test_token_by_token_is_the_full_forward(fields: dict[str, Any], length: int) -> None:
    model = make(fields)
    ids = torch.randint(0, 61, (1, length))
    state = model.new_state(1)
    steps = [model(token, past_key_values=state).logits for token in ids.split(1, dim=1)]
    assert (torch.cat(steps, dim=1) - model(ids).logits).abs().max() < TOLERANCE


@settings(max_examples=25, deadline=None)
@given(configs, st.integers(0, 300), st.integers(1, 40), st.integers(1, 90))
@torch.no_grad()
def test_reading_without_upper_layers_is_exact(
    fields: dict[str, Any], context: int, rest: int, segment: int
) -> None:
    model = make(fields)
    ids = torch.randint(0, 61, (2, context + rest))
    state = model.new_state(2)
    model.read(ids[:, :context], state, segment_size=segment)
    out = model(ids[:, context:], past_key_values=state).logits
    assert (out - model(ids).logits[:, context:]).abs().max() < TOLERANCE


@pytest.mark.parametrize("onset", ["chunk", "landmark"])
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(onset: str) -> None:
    model = make({"retrieval_onset": onset})
    ids = torch.randint(0, 61, (3, 130))
    together = model(ids).logits
    for row in range(3):
        alone = model(ids[row : row + 1]).logits
        assert (together[row] - alone[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_fork_goes_its_own_way() -> None:
    model = make({})
    ids, left, right = (torch.randint(0, 61, (1, n)) for n in (100, 60, 60))
    state = model.new_state(1, memory=DeviceMemory(slab_size=4))
    model(ids, past_key_values=state)
    fork = state.fork()
    for tokens, branch in ((left, fork), (right, state)):
        out = model(tokens, past_key_values=branch).logits
        whole = model(torch.cat([ids, tokens], dim=1)).logits[:, 100:]
        assert (out - whole).abs().max() < TOLERANCE


@torch.no_grad()
def test_the_window_cache_is_bounded() -> None:
    model = make({})
    state = model.new_state(1)
    for _ in range(5):
        model(torch.randint(0, 61, (1, 50)), past_key_values=state)
        for window in state.windows:
            assert window.keys is not None
            assert window.keys.shape[2] == model.config.sliding_window - 1
