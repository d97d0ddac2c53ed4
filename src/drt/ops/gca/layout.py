"""How the gradient of a memory lies in storage."""

from torch import Tensor


def new_memory_gradient(memory: Tensor) -> Tensor:
    """Uninitialized (B, M, S, G, D): contiguous if the memory is, else head-major."""
    if memory.is_contiguous():
        return memory.new_empty(memory.shape)
    return memory.new_empty(memory.transpose(2, 3).shape).transpose(2, 3)
