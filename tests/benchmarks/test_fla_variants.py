"""Where flash-linear-attention is not installed, its operators are called as it documents them."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fla_variants
from gca_variants import Sizes

SIZES = Sizes(chunks=3, chunk_size=4, topk=2, heads=32, kv_heads=2, width=8)

# Names and order of the arguments in fla 0.5; the bodies tell what they were given.
NSA = """
def parallel_nsa(q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16,
                 block_size=64, window_size=0, scale=None, cu_seqlens=None):
    return g_cmp, g_slc, block_indices, block_counts, block_size, window_size
"""
MOBA = """
def parallel_moba(q, k, v, cu_seqlens, max_seqlen, chunk_size, topk):
    return cu_seqlens, max_seqlen, chunk_size, topk
"""


@pytest.fixture
def fake_fla(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in {"nsa": NSA, "moba": MOBA}.items():
        folder = tmp_path / "fla" / "ops" / name
        folder.mkdir(parents=True)
        for package in (tmp_path / "fla", tmp_path / "fla" / "ops", folder):
            (package / "__init__.py").touch()
        (folder / "parallel.py").write_text(text)
    real = {name: sys.modules.pop(name) for name in modules_of_fla()}
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in modules_of_fla():
        del sys.modules[name]
    sys.modules.update(real)


def modules_of_fla() -> list[str]:
    return [name for name in sys.modules if name.split(".")[0] == "fla"]


def inputs() -> tuple[torch.Tensor, ...]:
    query = torch.randn(1, 12, SIZES.heads, 8)
    return query, torch.randn(1, 12, SIZES.kv_heads, 8), torch.randn(1, 12, SIZES.kv_heads, 8)


@pytest.mark.usefixtures("fake_fla")
def test_nsa_gets_the_chunks_of_each_token() -> None:
    indices = torch.tensor([[[0, 0], [0, 0], [1, 0]]])
    attend = fla_variants.nsa(SIZES, indices, dtype=torch.float16)
    assert not isinstance(attend, str)
    compression, gate, chosen, *rest = attend(*inputs())
    assert compression is None
    assert (gate.shape, gate.dtype) == ((1, 12, 32), torch.float16)
    assert chosen.shape == (1, 12, 2, 2)
    assert chosen[0, 8, 1].tolist() == [1, 0]
    assert chosen[0, 7, 0].tolist() == [0, 0]
    assert rest == [2, 4, 0]


@pytest.mark.usefixtures("fake_fla")
def test_moba_gets_one_row_and_the_own_chunk_besides() -> None:
    attend = fla_variants.moba(SIZES._replace(kv_heads=32), torch.device("cpu"))
    assert not isinstance(attend, str)
    lengths, *rest = attend(*inputs())
    assert (lengths.tolist(), lengths.dtype) == ([0, 12], torch.int32)
    assert rest == [12, 4, 3]


@pytest.mark.usefixtures("fake_fla")
def test_shapes_they_do_not_take_are_named() -> None:
    narrow = SIZES._replace(heads=12, kv_heads=4)
    indices = torch.zeros(1, 3, 2, dtype=torch.int64)
    assert fla_variants.nsa(narrow, indices, dtype=torch.float16) == "wants 16 heads a group"
    assert fla_variants.moba(narrow, torch.device("cpu")) == "has no grouped heads"


def test_without_the_library_they_say_so() -> None:
    if fla_variants.find_spec("fla") is not None:
        pytest.skip("flash-linear-attention is installed")
    assert fla_variants.moba(SIZES, torch.device("cpu")) == "not installed"
