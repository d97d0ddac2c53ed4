"""Plain steps in fixed buffers against the ordinary forward, and what a GPU may capture of them."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt import DecodingGraph, DRTForCausalLM, DRTState
from drt.testing import tiny_config

# float32 logits of order 1 after a few layers whose sums run in another order.
TOLERANCE = 1e-5
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

configs = st.fixed_dictionaries(
    {
        "chunk_size": st.integers(1, 20),
        "sliding_window": st.integers(1, 60),
        "retrieval_topk": st.integers(1, 6),
        "retrieval_groups": st.sampled_from([[], [1], [2], [1, 1], [2, 1]]),
        "retrieval_onset": st.sampled_from(["chunk", "landmark"]),
        "position_embedding": st.sampled_from(["rope", "alibi"]),
        "softmax_plus_one": st.booleans(),
        "exclude_window_chunks": st.booleans(),
        "num_key_value_heads": st.sampled_from([1, 2, 4]),
    }
)


def make(fields: dict[str, Any]) -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(tiny_config(**fields)).eval()


class Watched(DecodingGraph):
    """Counts the steps it takes."""

    taken = 0

    def step(self, *args: Any) -> torch.Tensor:
        """As the parent."""
        self.taken += 1
        return super().step(*args)


def read_unequal(model: DRTForCausalLM, lengths: list[int], seed: int) -> DRTState:
    """A state whose rows have read random texts of these lengths, some chunks closed early."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), max(lengths)
    ids = torch.randint(0, 61, shape, generator=generator)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    ends = torch.rand(shape, generator=generator) < 0.05
    state = model.new_state(len(lengths))
    if shape[1]:
        model(ids, attention_mask=mask, past_key_values=state, chunk_ends=ends)
    return state


def stands(state: DRTState) -> list[Any]:
    """Where rows stand, but for chunk starts that only a landmark still looks for."""
    return [cursor._replace(recent_starts=()) for cursor in state.cursors]


@settings(max_examples=30, deadline=None)
@given(
    configs,
    st.lists(st.integers(0, 90), min_size=1, max_size=3),
    st.integers(1, 30),
    st.integers(0, 10**6),
)
@torch.no_grad()
def test_steps_are_those_of_the_ordinary_forward(
    fields: dict[str, Any], lengths: list[int], count: int, seed: int
) -> None:
    model = make(fields)
    state = read_unequal(model, lengths, seed)
    ordinary = state.fork()
    rows = len(lengths)
    tokens = torch.randint(0, 61, (rows, count))
    # Rows end at some time, each at its own, but the first.
    stops = torch.randint(0, 2 * count, (rows,))
    stops[0] = count
    graph, plain, size = Watched(model, rows), 0, model.model.rules.chunk_size
    with graph.attached(state):
        for number, token in enumerate(tokens.split(1, dim=1)):
            mask = (number < stops)[:, None]
            read = [cursor.opened + 1 for cursor, goes in zip(state.cursors, mask) if goes]
            plain += size is None or max(read) < size
            got = model(token, attention_mask=mask, past_key_values=state).logits
            wanted = model(token, attention_mask=mask, past_key_values=ordinary).logits
            assert (got - wanted)[mask[:, 0]].abs().max() < TOLERANCE
    assert stands(state) == stands(ordinary)
    assert graph.taken == plain
    rest = torch.randint(0, 61, (rows, 40))
    got = model(rest, past_key_values=state).logits
    assert (got - model(rest, past_key_values=ordinary).logits).abs().max() < TOLERANCE
