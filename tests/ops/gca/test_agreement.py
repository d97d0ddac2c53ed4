"""The backends against the definition: float64 to rounding, lower precisions within a budget."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.ops.gca import blocked, blocks, grouped_cross_attention
from drt.testing import assert_within_budget

both_backends = pytest.mark.parametrize("backend", ["reference", "blocked"])

# Forward and backward are chains of a few hundred float64 operations at most, on numbers whose sums
# stay below 100: an error above 1e-11 is not rounding.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}

SIZES = {
    "one-token-chunks": {"S": 1, "K": 8, "D": 16, "Q": 1},
    "odd": {"S": 7, "K": 3, "D": 16, "Q": 33, "H": 6, "G": 2},
    "paper": {"S": 64, "K": 8, "D": 64, "Q": 64, "H": 2, "G": 2, "M": 9, "B": 1},
    "landmark": {"S": 63, "K": 3, "D": 80, "Q": 64, "H": 3, "G": 1, "B": 1},
    "self": {"S": 33, "K": 1, "D": 24, "Q": 33, "H": 4, "G": 4},
    "decoding": {"S": 64, "K": 8, "D": 64, "Q": 1, "C": 1, "H": 4, "G": 2},
}


@both_backends
@pytest.mark.parametrize("softmax_plus_one", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
def test_float64_agrees_with_the_definition(
    make_case: Callable,
    plain_operator: Callable,
    backend: str,
    softmax_plus_one: bool,
    ragged: bool,
) -> None:
    case = make_case(ragged=ragged)
    expected = case.results(plain_operator, softmax_plus_one=softmax_plus_one)
    actual = case.results(
        grouped_cross_attention, softmax_plus_one=softmax_plus_one, backend=backend
    )
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softmax_plus_one", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_lower_precisions_stay_within_budget(
    make_case: Callable,
    plain_operator: Callable,
    dtype: torch.dtype,
    softmax_plus_one: bool,
    ragged: bool,
    sizes: dict[str, int],
) -> None:
    options = {"softmax_plus_one": softmax_plus_one}
    # Three draws are pooled: the few weights of one draw may come out exact by luck.
    cases = [make_case(**sizes, ragged=ragged, seed=seed).to(dtype) for seed in range(3)]

    def pooled(operator: Callable, to: torch.dtype, **backend: str) -> dict[str, torch.Tensor]:
        draws = [case.to(to).results(operator, **options, **backend) for case in cases]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    # The truth starts from the same rounded inputs, so that only the computation differs.
    truth, baseline = pooled(plain_operator, torch.float64), pooled(plain_operator, dtype)
    for backend in ("reference", "blocked"):
        actual = pooled(grouped_cross_attention, dtype, backend=backend)
        for name, expected in truth.items():
            assert actual[name].dtype == baseline[name].dtype
            assert_within_budget(actual[name], expected, baseline=baseline[name], name=name)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_backends_agree_on_any_shape(make_case: Callable, data: st.DataObject) -> None:
    size = st.integers(1, 5)
    kv_heads = data.draw(st.integers(1, 3))
    case = make_case(
        *(data.draw(size) for _ in "BCQ"),
        kv_heads * data.draw(st.integers(1, 3)),
        data.draw(size),
        *(data.draw(size) for _ in "MS"),
        kv_heads,
        data.draw(size),
        ragged=data.draw(st.booleans()),
        full=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 99)),
    )
    options = {"softmax_plus_one": data.draw(st.booleans())}
    expected = case.results(grouped_cross_attention, backend="reference", **options)
    actual = case.results(grouped_cross_attention, backend="blocked", **options)
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("tile_bytes", [1, 4000, 1 << 30])
def test_block_size_does_not_matter(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    """From one chunk a block to one block that spans all rows."""
    monkeypatch.setattr(blocks, "_TILE_BYTES", tile_bytes)
    case = make_case(3, 7, S=5, ragged=True)
    expected = case.results(grouped_cross_attention, backend="reference")
    actual = case.results(grouped_cross_attention, backend="blocked")
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("short", [0, 2])
def test_one_short_chunk_in_a_block(make_case: Callable, short: int) -> None:
    case = make_case(1, 3, M=3, K=1, full=True)
    lengths = torch.full((1, 3), 6)
    lengths[0, short] = 2
    case = case._replace(indices=torch.tensor([[[2], [1], [0]]]), key_lengths=lengths)
    expected = case.results(grouped_cross_attention, backend="reference")
    actual = case.results(grouped_cross_attention, backend="blocked")
    torch.testing.assert_close(actual, expected, **FLOAT64)


@pytest.mark.parametrize("accumulator_bytes", [1, 5000, 1 << 30])
def test_stripes_of_heads_do_not_matter(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch, accumulator_bytes: int
) -> None:
    case = make_case(H=8, G=4, ragged=True).to(torch.bfloat16)
    expected = case.results(grouped_cross_attention, backend="blocked")
    monkeypatch.setattr(blocked, "_ACCUMULATOR_BYTES", accumulator_bytes)
    actual = case.results(grouped_cross_attention, backend="blocked")
    for name in ("output", "query", "key", "value"):
        # Heads are independent: the same operations on the same numbers.
        assert torch.equal(actual[name], expected[name]), name
    # Summed over heads in float32, in another order.
    torch.testing.assert_close(actual["weights"], expected["weights"], rtol=1e-5, atol=1e-5)


@both_backends
def test_autocast_does_not_reach_inside(make_case: Callable, backend: str) -> None:
    case = make_case().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = case.run(grouped_cross_attention, backend=backend)
    assert torch.equal(output, case.run(grouped_cross_attention, backend=backend))


def test_autocast_does_not_reach_inside_the_blocked_backward(make_case: Callable) -> None:
    case = make_case().to(torch.float32)
    expected = case.results(grouped_cross_attention, backend="blocked")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = case.results(grouped_cross_attention, backend="blocked")
    for name, result in expected.items():
        assert torch.equal(actual[name], result), name
