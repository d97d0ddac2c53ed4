"""A state that is forked, and rows that change their places: what follows them and what stays."""

from typing import Any

import pytest
import torch

from drt import DRTForCausalLM
from drt.state import DRTState
from drt.testing import tiny_config


def make() -> DRTForCausalLM:
    return DRTForCausalLM(tiny_config()).eval()


def read(model: DRTForCausalLM, ids: torch.Tensor) -> DRTState:
    state = model.new_state(len(ids))
    with torch.no_grad():
        model(ids, past_key_values=state)
    return state


def seen(state: DRTState) -> dict[str, Any]:
    """All that a state says of itself, as it is now."""
    return {
        "cursors": list(state.cursors),
        "lengths": [list(window.lengths) for window in state.windows],
        "keys": [window.keys for window in state.windows],
        "opened": state.opened,
        "current": [held and held.numbers for held in state.current],
        "recent_ids": state.recent_ids,
        "num_columns": state.num_columns,
        "chunks": list(state.memory.counts),
    }


@torch.no_grad()
def test_what_a_fork_does_stays_its_own() -> None:
    model, ids, rest = make(), torch.randint(0, 61, (2, 37)), torch.randint(0, 61, (2, 9))
    state = read(model, ids)
    before = seen(state)
    fork = state.fork()
    fork.close_chunk(rows=[1])
    assert [cursor.closing for cursor in fork.cursors] == [False, True]
    assert [cursor.closing for cursor in state.cursors] == [False, False]
    model(rest, past_key_values=fork)
    fork.close_chunk()
    after = seen(state)
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[name], value), name
        elif name in ("keys", "current"):
            assert all(map(torch.equal, after[name], value)), name
        else:
            assert after[name] == value, name
    # Row 1 has closed the chunk that was open, at 37 tokens.
    assert fork.memory.counts == (2, 3)
    assert state.memory.counts == (2, 2)
    alone = model(torch.cat([ids, rest], 1)).logits[:, 37:]
    out = model(rest, past_key_values=state).logits
    # The bound of the specification for one function in segments.
    assert (out - alone).abs().max() < 1e-4


def test_what_a_state_does_after_a_fork_leaves_the_fork_as_it_was() -> None:
    model, ids = make(), torch.randint(0, 61, (1, 21))
    state = read(model, ids)
    fork = state.fork()
    state.close_chunk()
    state.note_ids(torch.tensor([[7]]))
    assert not fork.cursors[0].closing
    assert fork.recent_ids is not None
    assert torch.equal(fork.recent_ids, ids)


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("order", [[1, 0], [1], [1, 1, 0]])
def test_rows_take_along_by_which_ids_they_are_recognized(change: str, order: list[int]) -> None:
    model, ids = make(), torch.randint(0, 61, (2, 70))
    assert not torch.equal(ids[0], ids[1])
    state = read(model, ids)
    getattr(state, change)(torch.tensor(order))
    assert state.recent_ids is not None
    # Of what was read, the last 64.
    assert torch.equal(state.recent_ids, ids[order, -64:])
    again = torch.cat([ids[order], torch.zeros(len(order), 3, dtype=torch.int64)], 1)
    with pytest.raises(ValueError, match="begin with the 70 tokens that the state has read"):
        model.generate(again, past_key_values=state, max_new_tokens=2, pad_token_id=0)
    # Another text of the same length is none that was read.
    other = again.clone()
    other[0] = (other[0] + 1) % 61
    state.check_new(other)


def test_repeated_rows_are_recognized_too() -> None:
    model, ids = make(), torch.randint(0, 61, (2, 20))
    state = read(model, ids)
    state.batch_repeat_interleave(2)
    assert state.recent_ids is not None
    assert torch.equal(state.recent_ids, ids[[0, 0, 1, 1]])
    assert [cursor.tokens for cursor in state.cursors] == [20] * 4
