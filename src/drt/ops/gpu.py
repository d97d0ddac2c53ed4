"""What the operators ask of a GPU and of the installation; constants of a compiled graph."""

from importlib.util import find_spec

import torch

CAPABILITY = (8, 0)
"""The oldest compute capability that the GPU kernels run on, ours and FlashAttention's. Older GPUs
are beyond what Triton supports: no matrix instructions, and too little shared memory."""


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


@torch.compiler.assume_constant_result
def is_capable(device_index: int | None) -> bool:
    """Whether a CUDA device, None for the current one, has `CAPABILITY`."""
    return torch.cuda.get_device_capability(device_index) >= CAPABILITY
