"""Shared by all tests: one torch thread, no deadlines on shared machines, optional real data."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not torch.cuda.is_available():
    # Triton's kernels then run in its interpreter; it must know before it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
settings.register_profile("drt", deadline=None)
settings.load_profile("drt")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora that DRT_DATA names."""
    folder = os.environ.get("DRT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DRT_DATA does not name a folder of corpora")
    return Path(folder)


@pytest.fixture
def small_model() -> dict[str, Any]:
    """The `model` part of a run configuration that trains in seconds."""
    return {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_encoder_layers": 1,
        "retrieval_groups": [1],
        "retrieval_topk": 2,
        "chunk_size": 16,
        "sliding_window": 16,
    }


class Medium:
    """What has been forced to the medium: names in order, and what each held at that moment."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.held: dict[str, bytes | set[str]] = {}

    def sync(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self.names.append(path.name)
        self.held[path.name] = set(os.listdir(path)) if path.is_dir() else path.read_bytes()

    def assert_holds(self, folder: Path) -> None:
        """All that makes up the memory in a folder, as it is there now."""
        for path in folder.iterdir():
            if path.name == "manifest.json":
                assert self.held["manifest.json.new"] == path.read_bytes()
            elif path.name != "lock":
                assert self.held[path.name] == path.read_bytes(), path.name
        assert self.held[folder.name] == {path.name for path in folder.iterdir()}


@pytest.fixture
def medium(monkeypatch: pytest.MonkeyPatch) -> Medium:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("there is no /proc/self/fd to tell which file is synced")
    found = Medium()
    monkeypatch.setattr(os, "fsync", found.sync)
    return found


class LargestTensor(TorchDispatchMode):
    """Inside the context, notes the size of the largest tensor that an operator returns.

    Views count as what they show; operators inside operators, forward and backward, are seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
                self.num_bytes = max(self.num_bytes, leaf.numel() * leaf.itemsize)
        return out


@pytest.fixture
def largest_tensor() -> LargestTensor:
    return LargestTensor()
