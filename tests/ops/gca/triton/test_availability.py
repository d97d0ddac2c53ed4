"""When the backend says no, and what it says."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from drt.ops.gca import grouped_cross_attention
from drt.ops.gca.api import default_backend
from drt.ops.gca.triton import backend

REFUSED = {
    "float64": ({}, torch.float64, "query is torch.float64"),
    "chunk": ({"S": 257}, torch.float32, "up to 256 tokens, S is 257"),
    "width": ({"D": 257}, torch.float32, "up to 256, D is 257"),
}


@pytest.mark.parametrize(("sizes", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_sizes_and_dtypes(
    make_case: Callable, device: str, sizes: dict[str, int], dtype: torch.dtype, message: str
) -> None:
    case = make_case(**sizes).to(dtype, device)
    with pytest.raises(RuntimeError, match=f"'triton' is unavailable: .*{message}"):
        case.run(grouped_cross_attention, backend="triton")


def test_a_cpu_without_the_interpreter(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "_has_changed", lambda: False)
    monkeypatch.setattr(backend, "_is_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="runs on CUDA tensors and query is on cpu"):
        make_case().to(torch.float32).run(grouped_cross_attention, backend="triton")


@pytest.mark.parametrize("was_set", [False, True])
def test_a_change_of_the_interpreter_takes_a_new_process(was_set: bool) -> None:
    """Some functions would be compiled and others interpreted."""
    script = """
import os, sys, torch, triton
os.environ["TRITON_INTERPRET"] = sys.argv[1]
from drt.ops.gca.triton import backend
print(backend.unavailable(torch.zeros(1), torch.zeros(1, 1, 1, 1, 1)))
"""
    command = [sys.executable, "-c", script, str(int(not was_set))]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(was_set))}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert "TRITON_INTERPRET has changed since Triton was imported" in done.stdout


def test_a_gpu_older_than_triton_supports(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [(7, 5)]
    monkeypatch.setattr(backend, "_has_changed", lambda: False)
    monkeypatch.setattr(backend, "_is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability[0])
    with FakeTensorMode():
        tensor = torch.empty(1, 2, 16, 4, 64, dtype=torch.float16, device="cuda")
    reason = backend.unavailable(tensor, tensor)
    assert reason is not None
    assert "compute capability 8.0" in reason
    assert default_backend(tensor, tensor) == "reference"
    capability[0] = (8, 0)
    assert default_backend(tensor, tensor) == "triton"


def test_bfloat16_in_the_interpreter(make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_has_changed", lambda: False)
    monkeypatch.setattr(backend, "_is_interpreted", lambda: True)
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        make_case().to(torch.bfloat16).run(grouped_cross_attention, backend="triton")


def test_without_triton(make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"pip install 'drt-lm\[kernels\]'"):
        make_case().to(torch.float32).run(grouped_cross_attention, backend="triton")


def test_an_inverse_of_another_call_is_refused(make_case: Callable, device: str) -> None:
    from drt.ops.gca import invert_indices

    case = make_case().to(torch.float32, device)
    inverse = invert_indices(case.indices[:, :2], case.key.shape[1])
    with pytest.raises(ValueError, match="of 12 slots and 10 chunks, the call has 18 and 10"):
        case.run(grouped_cross_attention, backend="triton", inverse=inverse)
