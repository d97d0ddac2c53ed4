"""Which backend serves a call, and what one that cannot says."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drt.ops.window import BACKENDS, flex, sliding_window_attention, varlen
from drt.ops.window.call import Call
from drt.ops.window.choice import choose, preferred


def call_on(device: str, **changes: Any) -> Call:
    """A call of 2 rows, 40 queries of width 64, bfloat16; on CUDA its tensors have no numbers."""
    options: dict[str, Any] = {"rows": 2, "queries": 40, "width": 64, "dtype": torch.bfloat16}
    options |= {"alibi": False, "first_keys": False, "grad": False} | changes
    dtype, count = options["dtype"], options["queries"]
    with FakeTensorMode():
        query, key, value = (
            torch.empty(options["rows"], length, 4, options["width"], dtype=dtype, device=device)
            for length in (count, count + 60, count + 60)
        )
        query.requires_grad_(options["grad"])
        slopes = torch.ones(4, device=device) if options["alibi"] else None
        firsts = torch.zeros(2, count, dtype=torch.int64, device=device)
    return Call(query, key, value, 32, firsts if options["first_keys"] else None, slopes, 1.0)


@pytest.fixture
def _gpu_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_runs_on", lambda device_index: True)
    monkeypatch.setattr(flex, "has_triton", lambda: True)


@pytest.mark.usefixtures("_gpu_with_everything")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "varlen"),
        ({"dtype": torch.float16}, "varlen"),
        ({"dtype": torch.float32}, "banded"),
        ({"alibi": True}, "banded"),
        ({"first_keys": True}, "banded"),
        ({"queries": 4}, "banded"),
        ({"queries": 5}, "varlen"),
        ({"queries": 0}, "banded"),
        ({"grad": True}, "varlen"),
        ({"grad": True, "queries": 4}, "varlen"),
        ({"grad": True, "queries": 0}, "banded"),
        ({"grad": True, "rows": 0}, "banded"),
        ({"grad": True, "dtype": torch.float32}, "flex"),
        ({"grad": True, "alibi": True}, "flex"),
        ({"grad": True, "first_keys": True}, "flex"),
        ({"grad": True, "width": 12}, "banded"),
        ({"grad": True, "width": 20}, "flex"),
        ({"grad": True, "width": 320}, "banded"),
        ({"grad": True, "dtype": torch.float64}, "banded"),
    ],
    ids=str,
)
def test_the_default_on_cuda(changes: dict[str, Any], expected: str) -> None:
    assert choose(None, call_on("cuda", **changes)) is BACKENDS[expected]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_default_elsewhere_is_banded(device: str, grad: bool) -> None:
    assert choose(None, call_on(device, grad=grad)) is BACKENDS["banded"]


def test_no_gradient_is_wanted_where_autograd_is_off() -> None:
    call = call_on("cuda", grad=True)
    assert call.wants_grad
    with torch.no_grad():
        assert not call.wants_grad
        assert "flex" not in preferred(call)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("queries", [0, 1, 4, 40])
def test_the_last_preference_serves_every_call(device: str, grad: bool, queries: int) -> None:
    call = call_on(device, grad=grad, queries=queries, alibi=True, first_keys=True, width=7)
    assert preferred(call)[-1] == "banded"
    assert BACKENDS["banded"].unavailable(call) is None


@pytest.mark.usefixtures("_gpu_with_everything")
@pytest.mark.parametrize(
    ("name", "device", "changes", "message"),
    [
        ("flex", "cpu", {"grad": True}, "no backward on CPU; use backend='banded'"),
        ("flex", "cpu", {"queries": 0}, "no query; use backend='banded'"),
        ("flex", "meta", {}, "query is on meta"),
        ("flex", "cuda", {"dtype": torch.float64}, "float64; use backend='banded'"),
        ("flex", "cuda", {"width": 8}, "D is 8, .* 16 to 256"),
        ("flex", "cuda", {"width": 264}, "D is 264, .* 16 to 256"),
        ("varlen", "cpu", {}, "query is on cpu; use backend='banded'"),
        ("varlen", "cuda", {"rows": 0}, "no query; use backend='banded'"),
        ("varlen", "cuda", {"dtype": torch.float32}, "query is torch.float32"),
        ("varlen", "cuda", {"alibi": True}, "no ALiBi; use backend='flex'"),
        ("varlen", "cuda", {"first_keys": True}, "first_keys; use backend='flex'"),
        ("varlen", "cuda", {"width": 20}, "D is 20, .* multiples of 8 up to 256"),
        ("varlen", "cuda", {"width": 264}, "D is 264"),
    ],
    ids=str,
)
def test_a_backend_that_cannot_says_why(
    name: str, device: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=f"{name!r} is unavailable: .*{message}"):
        choose(name, call_on(device, **changes))


def test_missing_software_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "has_triton", lambda: False)
    monkeypatch.setattr(varlen, "_runs_on", lambda device_index: False)
    with pytest.raises(RuntimeError, match="pip install triton"):
        choose("flex", call_on("cuda"))
    with pytest.raises(RuntimeError, match=r"FlashAttention and a GPU .* 8\.0"):
        choose("varlen", call_on("cuda"))


def test_the_operator_refuses_what_its_backend_cannot() -> None:
    tensors: list[Tensor] = [torch.ones(1, 3, 2, 4, requires_grad=True) for _ in range(3)]
    for name, message in (("flex", "no backward on CPU"), ("varlen", "CUDA")):
        with pytest.raises(RuntimeError, match=message):
            sliding_window_attention(*tensors, window=2, backend=name)
