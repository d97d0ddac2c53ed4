"""Plain steps in fixed buffers against the ordinary forward, and what a GPU may capture of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drt import DecodingGraph, DiskMemory, DRTForCausalLM, DRTState, HostMemory
from drt.testing import relative_error, tiny_config

# Sums of some hundred terms in another order, each rounded to 24 bits, through a few layers.
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


def assert_alike(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert relative_error(got, wanted.double()) < TOLERANCE


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
            going = [cursor for row, cursor in enumerate(state.cursors) if number < stops[row]]
            plain += size is None or max(cursor.opened for cursor in going) + 1 < size
            got = model(token, attention_mask=mask, past_key_values=state).logits
            wanted = model(token, attention_mask=mask, past_key_values=ordinary).logits
            assert_alike(got[mask[:, 0]], wanted[mask[:, 0]])
    assert stands(state) == stands(ordinary)
    assert graph.taken == plain
    rest = torch.randint(0, 61, (rows, 40))
    wanted = model(rest, past_key_values=ordinary).logits
    assert_alike(model(rest, past_key_values=state).logits, wanted)


@pytest.fixture
def model() -> DRTForCausalLM:
    return make({})


def one_by_one(model: DRTForCausalLM, state: DRTState, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits of tokens read in steps."""
    steps = [model(token, past_key_values=state).logits for token in tokens.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def assert_goes_on(model: DRTForCausalLM, state: DRTState, before: torch.Tensor) -> None:
    """A state goes on as one that has read its text by the ordinary forward."""
    fresh = model.new_state(before.shape[0])
    model(before, past_key_values=fresh)
    rest = torch.randint(0, 61, (before.shape[0], 40))
    wanted = model(rest, past_key_values=fresh).logits
    assert_alike(model(rest, past_key_values=state).logits, wanted)


@torch.no_grad()
def test_forks_and_what_was_read_from_a_state_see_no_later_step(model: DRTForCausalLM) -> None:
    ids, graph = torch.randint(0, 61, (1, 75)), Watched(model)
    state = model.new_state()
    model(ids[:, :50], past_key_values=state)
    forks, held = [state.fork()], []
    with graph.attached(state):
        for number in range(50, 62):
            model(ids[:, number : number + 1], past_key_values=state)
            if number in (50, 55):
                forks.append(state.fork())
                keys = state.windows[0].keys
                assert keys is not None
                held.append((keys, keys.clone()))
    assert all(fork.decoding_graph is None for fork in forks)
    assert graph.taken == 12
    assert all(torch.equal(kept, copy) for kept, copy in held)
    for fork, length in zip(forks, (50, 51, 56), strict=True):
        assert_goes_on(model, fork, ids[:, :length])
    assert_goes_on(model, state, ids[:, :62])


@torch.no_grad()
def test_one_graph_serves_states_in_turn(model: DRTForCausalLM) -> None:
    graph, ids = Watched(model), torch.randint(0, 61, (2, 60))
    states = [model.new_state(), model.new_state()]
    for begin, end in ((0, 10), (10, 27), (27, 60)):
        for row, state in enumerate(states):
            with graph.attached(state):
                one_by_one(model, state, ids[row : row + 1, begin:end])
    # All but the tokens 16, 32 and 48, which close chunks.
    assert graph.taken == 2 * 57
    for row, state in enumerate(states):
        assert_goes_on(model, state, ids[row : row + 1])


def test_a_graph_made_in_inference_mode_serves_outside(model: DRTForCausalLM) -> None:
    ids = torch.randint(0, 61, (1, 20))
    with torch.inference_mode():
        graph = Watched(model)
    state = model.new_state()
    for mode in (torch.inference_mode(), torch.no_grad()):
        with mode, graph.attached(state):
            one_by_one(model, state, ids[:, :6])
    assert graph.taken == 12


@torch.no_grad()
def test_a_row_that_has_ended_may_have_a_chunk_to_close(model: DRTForCausalLM) -> None:
    state = read_unequal(model, [50, 55], seed=0)
    ordinary, mask = state.fork(), torch.tensor([[True], [False]])
    with Watched(model, 2).attached(state):
        for each in (state, ordinary):
            each.close_chunk([1])
            model(torch.tensor([[7], [0]]), attention_mask=mask, past_key_values=each)
    assert stands(state) == stands(ordinary)
    assert tuple(state.memory.counts) == tuple(ordinary.memory.counts)


@torch.no_grad()
def test_other_steps_are_the_ordinary_forward(model: DRTForCausalLM) -> None:
    graph, ids = Watched(model, 2), torch.randint(0, 61, (2, 3))
    ends, ones = torch.tensor([[False], [True]]), torch.ones(2, 1, dtype=torch.int64)
    state, ordinary = model.new_state(2), model.new_state(2)
    steps: list[dict[str, Any]] = [
        {"input_ids": ids},
        {"input_ids": ids[:, :1], "chunk_ends": ends},
        {"input_ids": ids[:, :1], "document_ids": ones},
        {"input_ids": ids[:, :1], "document_ids": 2 * ones},
        # Inside a second document
        {"input_ids": ids[:, :1]},
        {"inputs_embeds": model.get_input_embeddings()(ids[:, :1])},
        {"input_ids": ids[:, :1], "output_retrievals": True},
    ]
    for step in steps:
        with graph.attached(state):
            got = model(past_key_values=state, **step).logits
        assert torch.equal(got, model(past_key_values=ordinary, **step).logits)
    assert graph.taken == 0


def test_steps_with_gradient_autocast_or_a_closed_chunk_are_ordinary(model: DRTForCausalLM) -> None:
    graph, token = Watched(model), torch.randint(0, 61, (1, 1))
    state = model.new_state()
    with graph.attached(state):
        assert model(token, past_key_values=state).logits.requires_grad
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            model(token, past_key_values=state)
        state.close_chunk()
        with torch.no_grad():
            model(token, past_key_values=state)
            assert graph.taken == 0
            assert list(state.memory.counts) == [1]
            model(token, past_key_values=state)
    assert graph.taken == 1
    assert state.num_tokens == [4]


@torch.no_grad()
def test_windows_of_two_lengths_are_left_to_the_ordinary_forward() -> None:
    model = make({"sliding_window": 8})
    ids = torch.randint(0, 61, (1, 80))
    state, ordinary = model.new_state(), model.new_state()
    graph = Watched(model)
    for reading in (state, ordinary):
        model.read(ids[:, :60], reading, complete=False)
    wanted = one_by_one(model, ordinary, ids[:, 60:])
    with graph.attached(state):
        got = one_by_one(model, state, ids[:, 60:])
    assert_alike(got, wanted)
    # Tokens 64 and 80 close chunks, and it is 7 positions until the upper windows are full.
    assert graph.taken == 20 - 6 - 1


@pytest.mark.parametrize("tier", ["host", "disk"])
@torch.no_grad()
def test_memory_may_be_anywhere(model: DRTForCausalLM, tier: str, tmp_path: Path) -> None:
    ids, folder = torch.randint(0, 61, (1, 150)), tmp_path / "memory"
    marks = {"model": model.fingerprint()}
    memory = HostMemory() if tier == "host" else DiskMemory.create(folder, fingerprint=marks)
    state, graph = model.new_state(memory=memory), Watched(model)
    wanted = one_by_one(model, model.new_state(), ids)
    with graph.attached(state):
        got = one_by_one(model, state, ids[:, :100])
        if tier == "disk":
            model.save_state(state, folder)
            continued, _ = model.load_state(folder)
            rest = model(ids[:, 100:], past_key_values=continued).logits
            assert_alike(rest, wanted[:, 100:])
        got = torch.cat([got, one_by_one(model, state, ids[:, 100:])], dim=1)
    assert_alike(got, wanted)
    assert graph.taken == 150 - 150 // 16


@torch.no_grad()
def test_rows_may_be_reordered_between_steps(model: DRTForCausalLM) -> None:
    state = read_unequal(model, [70, 9, 33], seed=3)
    ordinary, graph = state.fork(), Watched(model, 3)
    order, token = torch.tensor([2, 0, 0]), torch.randint(0, 61, (3, 1))
    with graph.attached(state):
        for _ in range(12):
            got = model(token, past_key_values=state).logits
            wanted = model(token, past_key_values=ordinary).logits
            assert_alike(got, wanted)
            state.reorder_cache(order)
            ordinary.reorder_cache(order)
            order = torch.tensor([1, 2, 0])
        state.batch_select_indices(torch.tensor([0]))
        taken = graph.taken
        model(token[:1], past_key_values=state)
        # It is for three rows.
        assert graph.taken == taken > 0


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
@pytest.mark.parametrize("onset", ["chunk", "landmark"])
def test_generate_gives_the_same_text(onset: str, position_embedding: str) -> None:
    model = make({"retrieval_onset": onset, "position_embedding": position_embedding})
    ids, more = torch.randint(1, 61, (3, 40)), torch.randint(1, 61, (3, 5))
    mask = torch.ones_like(ids)
    mask[0, :33] = mask[2, 10:] = 0
    options = {"max_new_tokens": 35, "attention_mask": mask, **GREEDY}
    free = model.generate(ids, **options)
    graph = Watched(model, 3)
    # Without an end, and with one that comes to the rows at different times.
    for end in (None, int(free[1, 48])):
        options["eos_token_id"] = end
        state, ordinary = model.new_state(3), model.new_state(3)
        wanted = model.generate(ids, past_key_values=ordinary, **options)
        made = model.generate(ids, past_key_values=state, decoding_graph=graph, **options)
        assert torch.equal(made, wanted)
        assert torch.equal(model.generate(ids, decoding_graph=True, **options), wanted)
        assert state.decoding_graph is None
        assert stands(state) == stands(ordinary)
        wanted = model.generate(more, past_key_values=ordinary, max_new_tokens=20, **GREEDY)
        made = model.generate(
            more, past_key_values=state, max_new_tokens=20, decoding_graph=graph, **GREEDY
        )
        assert torch.equal(made, wanted)
    assert graph.taken > 80


def test_generate_samples_several_returns_from_one_prompt(model: DRTForCausalLM) -> None:
    ids, graph = torch.randint(1, 61, (2, 20)), Watched(model, 4)
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 12}
    torch.manual_seed(7)
    wanted = model.generate(ids, **options, eos_token_id=None)
    torch.manual_seed(7)
    made = model.generate(ids, decoding_graph=graph, **options, eos_token_id=None)
    assert torch.equal(made, wanted)
    assert graph.taken == 11


def test_what_cannot_be_replayed_is_refused(model: DRTForCausalLM) -> None:
    ids, options = torch.randint(1, 61, (1, 5)), {"max_new_tokens": 3, **GREEDY}
    with pytest.raises(ValueError, match="must be a DecodingGraph, True or False, got 'yes'"):
        model.generate(ids, decoding_graph="yes", **options)
    with pytest.raises(ValueError, match="num_beams=2 cannot have a decoding_graph"):
        model.generate(ids, num_beams=2, decoding_graph=True, **options)
    graph, state = DecodingGraph(model, 2), model.new_state(2)
    with pytest.raises(ValueError, match="is for 2 rows, the state has 1"):
        model.generate(ids, decoding_graph=graph, **options)
    with pytest.raises(ValueError, match="made for another model"):
        make({}).generate(ids, decoding_graph=graph, **options)
    with graph.attached(state), pytest.raises(ValueError, match="attached already"):
        DecodingGraph(model, 2).attach(state)
    hook = model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"module 'model.norm' has forward hooks"):
        model.generate(ids, decoding_graph=True, **options)
    hook.remove()
    model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight.detach().clone())
    with pytest.raises(ValueError, match="parameters were moved or replaced"):
        graph.attach(state)


@torch.no_grad()
def test_a_step_that_fails_leaves_the_state_unfinished_and_the_graph_as_good_as_new(
    model: DRTForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, graph = torch.randint(0, 61, (1, 70)), Watched(model)
    state = model.new_state()
    model(ids[:, :40], past_key_values=state)
    fork = state.fork()

    def stop(*_: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with graph.attached(state):
        with pytest.raises(ValueError, match="input_ids must be 0 to 60, got 61 to 61"):
            model(torch.tensor([[61]]), past_key_values=state)
        model(ids[:, 40:41], past_key_values=state)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[-1].mlp, "forward", stop)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 41:42], past_key_values=state)
        with pytest.raises(ValueError, match="the state is unfinished"):
            model(ids[:, 41:42], past_key_values=state)
    assert graph.taken == 2
    with pytest.raises(ValueError, match="the state is unfinished"):
        model(ids[:, 41:42], past_key_values=state)
    with graph.attached(fork):
        one_by_one(model, fork, ids[:, 40:60])
    assert graph.taken == 2 + 19
    assert_goes_on(model, fork, ids[:, :60])


class OneDevice(TorchDispatchMode):
    """Refuses what a capture refuses: copies between devices, and numbers read by the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation."""
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor) and x.dim()]
        assert len({x.device.type for x in tensors}) <= 1, f"{func} between devices"
        assert func is not torch.ops.aten._local_scalar_dense.default
        return out


def move_to_meta(state: DRTState) -> None:
    """Move the tensors of a state to where there are no numbers to read."""

    def moved(value: Any) -> Any:
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    state.opened = moved(state.opened)
    for window in state.windows:
        window.keys, window.values = moved(window.keys), moved(window.values)
    for group, current in enumerate(state.current):
        assert current is not None
        chunks = type(current.chunks)(*map(moved, current.chunks))
        state.current[group] = current._replace(chunks=chunks)


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
@pytest.mark.parametrize("lengths", [[70, 50], [17, 50]], ids=["full", "short"])
@torch.no_grad()
def test_nothing_in_a_step_makes_the_host_wait(position_embedding: str, lengths: list[int]) -> None:
    # On the meta device the operators choose as on a GPU, and nothing can be read.
    model = make({"position_embedding": position_embedding}).bfloat16()
    state = read_unequal(model, lengths, seed=1)
    model = model.to("meta")
    move_to_meta(state)
    taken: list[bool] = []

    class Refusing(DecodingGraph):
        def _run(self) -> torch.Tensor:
            taken.append(True)
            if len(taken) == 1:
                # A warm-up, in which constants come to the device.
                return super()._run()
            with OneDevice():
                return super()._run()

    with Refusing(model, 2).attached(state):
        one_by_one(model, state, torch.zeros(2, 2, dtype=torch.int64, device="meta"))
    assert len(taken) == 2


class Tape(TorchDispatchMode):
    """Notes operations and the tensors they had, to run them again: a CUDA graph for the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and note it."""
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Run all again, results to where they were."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taped(DecodingGraph):
    """Replays its steps from a tape as on a GPU from a CUDA graph."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.tapes: dict[Any, tuple[Tape, torch.Tensor]] = {}
        self.replays = 0

    def _run(self) -> torch.Tensor:
        variant = self._steps.variant
        if variant in self.tapes:
            self.replays += 1
            self.tapes[variant][0].replay()
        else:
            with Tape() as tape:
                self.tapes[variant] = tape, super()._run()
        return self.tapes[variant][1].clone()


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
@pytest.mark.parametrize("groups", [[1, 1], []])
@torch.no_grad()
def test_operations_of_one_step_are_those_of_every_step_of_its_kind(
    position_embedding: str, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where it would make the host wait.
    monkeypatch.setattr("drt.ops.window.plan.can_read", lambda tensor: False)
    model = make({"position_embedding": position_embedding, "retrieval_groups": groups})
    graph = Taped(model, 2)
    for lengths, seed in (([20, 5], 1), ([64, 90], 2)):
        state = read_unequal(model, lengths, seed)
        ordinary = state.fork()
        with graph.attached(state):
            for number in range(60):
                # The second row ends.
                mask = torch.tensor([[True], [number < 40]])
                token = torch.randint(0, 61, (2, 1))
                got = model(token, attention_mask=mask, past_key_values=state).logits
                wanted = model(token, attention_mask=mask, past_key_values=ordinary).logits
                assert_alike(got[mask[:, 0]], wanted[mask[:, 0]])
    # At most: short rows or not, and nothing, full chunks or short chunks retrieved.
    assert len(graph.tapes) <= 6
    assert graph.replays > 90


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_gpu_replays_what_it_would_compute(position_embedding: str, dtype: torch.dtype) -> None:
    # All chunks are retrieved: no rounding decides between two.
    fields = {"position_embedding": position_embedding, "retrieval_topk": 16}
    model = make(fields).to("cuda", dtype)
    ids = torch.randint(0, 61, (2, 200), device="cuda")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :15] = 0
    state, ordinary = model.new_state(2), model.new_state(2)
    for begun in (state, ordinary):
        model(ids[:, :20], attention_mask=mask, past_key_values=begun)
    graph = DecodingGraph(model, 2)
    with graph.attached(state):
        got = one_by_one(model, state, ids[:, 20:])
    # Of short rows, and of full ones.
    assert len(graph._captures) == 2
    wanted = one_by_one(model, ordinary, ids[:, 20:])
    # A few layers, each of which rounds to 24 or 8 bits, summed in another order.
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(got, wanted.double()) < bound


@pytest.mark.gpu
@needs_gpu
@torch.no_grad()
def test_a_gpu_replays_without_waiting(model: DRTForCausalLM) -> None:
    model = model.to("cuda")
    ids = torch.randint(0, 61, (1, 110), device="cuda")
    state, graph = model.new_state(), DecodingGraph(model)
    model(ids[:, :96], past_key_values=state)
    with graph.attached(state):
        one_by_one(model, state, ids[:, 96:104])
        torch.cuda.set_sync_debug_mode("error")
        try:
            one_by_one(model, state, ids[:, 104:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(graph._captures) == 1
