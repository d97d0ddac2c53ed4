"""Shared by all tests: one torch thread, no deadlines on shared machines, optional real data."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

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
