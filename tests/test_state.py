"""A state that is forked, whose rows change their places, and that an error leaves unfinished."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from drt import DeviceMemory, DiskMemory, DRTForCausalLM
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


def assert_as_before(state: DRTState, before: dict[str, Any]) -> None:
    """Nothing of what a state says of itself has changed."""
    for name, value in seen(state).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, before[name]), name
        elif name in ("keys", "current"):
            assert all(map(torch.equal, value, before[name])), name
        else:
            assert value == before[name], name


@pytest.mark.parametrize("change", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.tensor([0, 2]), r"rows must be 0 to 1, got \[0, 2\]"),
        (torch.tensor([-1, 0]), r"rows must be 0 to 1, got \[-1, 0\]"),
        (torch.tensor([True, False]), r"by their numbers.*got shape \(2,\) torch.bool"),
        (torch.tensor([1.0]), r"by their numbers.*torch.float32"),
        (torch.tensor([[1]]), r"got shape \(1, 1\) torch.int64"),
        (torch.tensor([], dtype=torch.int64), r"at least one, got shape \(0,\)"),
    ],
)
def test_rows_that_there_are_not_change_nothing(
    change: str, rows: torch.Tensor, message: str
) -> None:
    state = read(make(), torch.randint(0, 61, (2, 37)))
    before = seen(state)
    with pytest.raises(ValueError, match=message):
        getattr(state, change)(rows)
    assert_as_before(state, before)
    # As beams of transformers are given.
    state.reorder_cache(torch.tensor([1, 0], dtype=torch.int32))


def test_a_new_state_wants_an_empty_memory() -> None:
    model, ids, memory = make(), torch.randint(0, 61, (2, 37)), DeviceMemory()
    model(ids, past_key_values=model.new_state(2, memory=memory))
    with pytest.raises(ValueError, match=r"an empty memory, this one holds 4 chunks: load_state"):
        model.new_state(2, memory=memory)


@torch.no_grad()
def test_a_deep_copy_is_a_fork(tmp_path: Path) -> None:
    model, ids, rest = make(), torch.randint(0, 61, (1, 37)), torch.randint(0, 61, (1, 20))
    state = model.new_state(memory=DiskMemory.create(tmp_path / "memory", fingerprint={}))
    model(ids, past_key_values=state)
    other = copy.deepcopy(state)
    wanted = model(rest, past_key_values=state.fork()).logits
    assert torch.equal(model(rest, past_key_values=other).logits, wanted)
    assert state.num_tokens == [37]
    assert len(state.memory) == 2


class Stopped(BaseException):
    """As a Ctrl-C."""


class FullMemory(DeviceMemory):
    """Fails at an append, as a full disk does."""

    fails = False

    def append(self, *args: Any, **kwargs: Any) -> None:
        """As the parent, until it fails."""
        if self.fails:
            raise OSError("No space left on device")
        super().append(*args, **kwargs)


def fail_after(monkeypatch: pytest.MonkeyPatch, module: torch.nn.Module, calls: int) -> None:
    """Have a module stop at its call of this number, as a Ctrl-C that comes then."""
    ordinary, left = module.forward, [calls]

    def forward(*args: Any) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return ordinary(*args)

    monkeypatch.setattr(module, "forward", forward)


def assert_refused(model: DRTForCausalLM, state: DRTState, folder: Path) -> None:
    ids = torch.zeros(1, 1, dtype=torch.int64)
    uses: list[Callable[[DRTState], Any]] = [
        lambda each: model(ids, past_key_values=each),
        lambda each: model.read(ids, each),
        lambda each: model.generate(ids, past_key_values=each, max_new_tokens=1),
        lambda each: model.save_state(each, folder),
    ]
    for use in uses:
        for each in (state, state.fork()):
            with pytest.raises(ValueError, match=r"the state is unfinished.*Go on from a fork"):
                use(each)
    assert not folder.exists()


@pytest.mark.parametrize("way", ["ids", "embeddings", "read"])
@torch.no_grad()
def test_a_state_that_an_error_left_unfinished_is_refused(way: str, tmp_path: Path) -> None:
    model, ids, more = make(), torch.randint(0, 61, (1, 37)), torch.randint(0, 61, (1, 20))
    memory = FullMemory()
    state = model.new_state(memory=memory)
    model(ids, past_key_values=state)
    fork = state.fork()
    memory.fails = True
    ways: dict[str, Callable[[], Any]] = {
        "ids": lambda: model(more, past_key_values=state),
        "embeddings": lambda: model(
            inputs_embeds=model.get_input_embeddings()(more), past_key_values=state
        ),
        "read": lambda: model.read(more, state),
    }
    with pytest.raises(OSError, match="No space left"):
        ways[way]()
    assert_refused(model, state, tmp_path / "saved")
    wanted = model(torch.cat([ids, more], dim=1)).logits[:, 37:]
    # The bound of the specification for one function in segments.
    assert (model(more, past_key_values=fork).logits - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_a_stop_anywhere_leaves_the_state_unfinished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, ids = make(), torch.randint(0, 61, (1, 90))
    state = model.new_state()
    # All has been read, and the logits are not known.
    with monkeypatch.context() as patch:
        fail_after(patch, model.lm_head, 0)
        with pytest.raises(Stopped):
            model(ids, past_key_values=state)
    assert_refused(model, state, tmp_path / "saved")
    state = model.new_state()
    # Between the second segment and the third.
    with monkeypatch.context() as patch:
        fail_after(patch, model.model.embed_tokens, 2)
        with pytest.raises(Stopped):
            model.read(ids, state, segment_size=20)
    assert state.num_tokens == [40]
    assert_refused(model, state, tmp_path / "saved")


@torch.no_grad()
def test_what_is_refused_leaves_the_state_as_it_was() -> None:
    model, ids, more = make(), torch.randint(0, 61, (2, 37)), torch.randint(0, 61, (2, 20))
    state, beyond = read(model, ids), more.clone()
    before = seen(state)
    beyond[1, 7] = 61
    wrong: list[tuple[str, dict[str, Any]]] = [
        (r"labels must be \(B, T\) = \(2, 20\), got \(2, 19\)", {"labels": more[:, 1:]}),
        ("input_ids must be 0 to 60, got .* to 61", {"input_ids": beyond}),
        ("input_ids must be 0 to 60, got -[0-9]+ to -1", {"input_ids": -more.clamp_min(1)}),
        ("40 columns, the input has 20, and 57 with", {"attention_mask": torch.ones(2, 40)}),
        ("document_ids must be integers", {"document_ids": torch.zeros(2, 20)}),
    ]
    for message, kwargs in wrong:
        with pytest.raises(ValueError, match=message):
            model(**{"input_ids": more, **kwargs}, past_key_values=state)
    with pytest.raises(ValueError, match="input_ids must be 0 to 60"):
        model.read(beyond, state)
    with pytest.raises(ValueError, match="21 columns, the input has 20, and 57 with"):
        model.read(more, state, attention_mask=torch.ones(2, 21))
    with pytest.raises(ValueError, match="segment_size must be at least 1"):
        model.read(more, state, segment_size=0)
    assert_as_before(state, before)
    wanted = model(torch.cat([ids, more], dim=1)).logits[:, 37:]
    # The bound of the specification for one function in segments.
    assert (model(more, past_key_values=state).logits - wanted).abs().max() < 1e-4


@torch.no_grad()
def test_a_mask_may_be_of_all_columns_that_were_read() -> None:
    model, ids = make(), torch.randint(0, 61, (2, 60))
    mask = (torch.rand(2, 60) < 0.8).long()
    embeddings, state, wide = model.get_input_embeddings()(ids), model.new_state(2), []
    for number, (begin, end) in enumerate([(0, 25), (25, 40), (40, 60)]):
        # Embeddings are columns as ids are.
        given = {"input_ids": ids} if number != 1 else {"inputs_embeds": embeddings}
        part = {name: value[:, begin:end] for name, value in given.items()}
        wide.append(model(**part, attention_mask=mask[:, :end], past_key_values=state).logits)
    wanted = model(ids, attention_mask=mask).logits
    # The bound of the specification for one function in segments.
    assert (torch.cat(wide, dim=1) - wanted)[mask > 0].abs().max() < 1e-4
