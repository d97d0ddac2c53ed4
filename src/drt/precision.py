"""In which precision to multiply: float32, bfloat16 under autocast, or what is native here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16"]


def uses_bfloat16(precision: Precision) -> bool:
    """Whether a choice means bfloat16 here.

    "auto" does where a GPU or the processor multiplies bfloat16 natively; elsewhere bfloat16 is
    emulated and slower than float32. Weights, norms, softmax and sums are float32 in any case.
    """
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager:
    """The context in which to run a model."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(precision))


def uses_autocast(device_type: str) -> bool:
    """Whether autocast is on for a kind of device; some kinds, as "meta", have none."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """The context of a function with a precision policy of its own, in forward and backward."""
    return (
        torch.autocast(device_type, enabled=False) if uses_autocast(device_type) else nullcontext()
    )


def sum_dtype(like: Tensor) -> torch.dtype:
    """Dtype of sums over many terms: float32, or float64 for float64 tensors."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32
