"""Where the kernels run: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(
    params=[
        torch.float32,
        torch.float16,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter gets bfloat16 wrong"),
        ),
    ],
    ids=str,
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param
