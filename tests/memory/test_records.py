"""Records: sizes, rounding bounds of every storage dtype, and what is beyond a chunk's content."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from drt.memory import DeviceMemory, HostMemory
from drt.memory.records import STORAGE_DTYPES, RecordFormat

sizes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 7))


def rounding_bound(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The most by which elements of float32 (n, S, G, D) may differ after storage."""
    if dtype == torch.int8:
        scale = x.abs().amax((1, 3), keepdim=True) / 127
        # Half a step, and float32 rounding of a quotient and a product of up to 127 steps.
        return (scale * (0.5 + 127 * 2**-22)).expand_as(x)
    info = torch.finfo(dtype)
    # Half a unit in the last place; below the normal numbers half the smallest step.
    return x.abs() * info.eps / 2 + info.tiny * info.eps / 2


def random(sizes: tuple[int, int, int], seed: int, count: int = 5) -> Tensor:
    """Magnitudes over eight orders, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *sizes, generator=generator)
    powers = torch.randint(-4, 5, (count, 1, sizes[1], 1), generator=generator)
    return (x * 10.0**powers).masked_fill(torch.rand(x.shape, generator=generator) < 0.1, 0.0)


@settings(max_examples=100)
@given(sizes, st.sampled_from(STORAGE_DTYPES), st.integers(0, 10**6))
def test_what_comes_back_is_within_half_a_step(
    sizes: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    form = RecordFormat(*sizes, dtype)
    keys, values = random(sizes, seed), random(sizes, seed + 1)
    records = form.encode(keys, values)
    assert records.shape == (5, form.record_bytes)
    assert records.dtype == torch.uint8
    assert form.record_bytes % 64 == 0
    for x, back in zip((keys, values), form.decode(records, torch.float32), strict=True):
        assert back.shape == x.shape
        assert back.transpose(1, 2).is_contiguous()
        assert ((back - x).abs() <= rounding_bound(x, dtype)).all()


@settings(max_examples=50)
@given(sizes, st.sampled_from(STORAGE_DTYPES), st.integers(0, 10**6))
def test_what_is_beyond_the_content_never_matters(
    sizes: tuple[int, int, int], dtype: torch.dtype, seed: int
) -> None:
    form = RecordFormat(*sizes, dtype)
    keys, values = random(sizes, seed), random(sizes, seed + 1)
    lengths = torch.randint(1, sizes[0] + 1, (5,), generator=torch.Generator().manual_seed(seed))
    beyond = (torch.arange(sizes[0]) >= lengths[:, None])[..., None, None]
    nan = float("nan")
    poisoned = form.encode(keys.masked_fill(beyond, nan), values.masked_fill(beyond, nan), lengths)
    clean = form.encode(keys.masked_fill(beyond, 0.0), values.masked_fill(beyond, 0.0))
    assert torch.equal(poisoned, clean)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
def test_packing_parts_gives_the_same_bytes(dtype: torch.dtype) -> None:
    form = RecordFormat(3, 3, 5, dtype)
    records = form.encode(random((3, 3, 5), 0), random((3, 3, 5), 1))
    assert torch.equal(form.pack(form.parts(records)), records)


def test_sizes_of_records() -> None:
    assert RecordFormat(64, 12, 64, torch.bfloat16).record_bytes == 196608
    # 2 x 30 bytes, 2 x 2 scales of 4 bytes, in whole 64 bytes.
    assert RecordFormat(3, 2, 5, torch.int8).record_bytes == 128
    with pytest.raises(ValueError, match="head_dim must be at least 1, got 0"):
        RecordFormat(3, 2, 0, torch.int8)
    with pytest.raises(ValueError, match=r"stored as one of .*; got torch.float64"):
        RecordFormat(3, 2, 5, torch.float64)


@pytest.mark.parametrize("kind", [DeviceMemory, HostMemory])
@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_memories_compute_in_what_was_appended(
    kind: type[DeviceMemory], dtype: torch.dtype, compute: torch.dtype
) -> None:
    keys, values = (random((4, 2, 8), seed).to(compute) for seed in (0, 1))
    memory = kind(dtype=dtype)
    memory.append(torch.randn(1, 5, 6), keys[None], values[None])
    found = memory.gather(torch.arange(5)[None, None])
    for x, back in ((keys, found.keys), (values, found.values)):
        assert back.dtype == compute
        # Stored with one rounding, and rounded once more to the compute dtype.
        bound = rounding_bound(x.float(), dtype)
        bound = bound + (x.float().abs() + bound) * torch.finfo(compute).eps / 2
        assert ((back.float() - x.float()).abs() <= bound).all()
