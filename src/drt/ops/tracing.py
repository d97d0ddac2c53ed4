"""Whether an operator runs where there are shapes but no numbers to look at."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_traced(tensor: Tensor) -> bool:
    """Inside a graph that is being compiled, or on a fake tensor, which has no numbers."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)
