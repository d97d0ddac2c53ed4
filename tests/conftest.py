"""Shared by all tests: one torch thread, no deadlines on shared machines, optional real data."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

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
