"""The backend: what it can serve, and the call of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

from drt.ops.gca.inverse import InverseIndex
from drt.ops.gca.reference import reference
from drt.ops.gpu import CAPABILITY, has_triton, is_capable

MAX_CHUNK_SIZE = 256
"""Tokens of a chunk that the kernels take."""
MAX_WIDTH = 256
"""Head width that the kernels take."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unavailable(query: Tensor, key: Tensor) -> str | None:
    """Why the kernels cannot serve these tensors and what would help, or None if they can."""
    if not has_triton():
        return "Triton is not installed; pip install 'drt-lm[kernels]'"
    if _has_changed():
        return "TRITON_INTERPRET has changed since Triton was imported; set it before Python starts"
    interpreted = _is_interpreted()
    if query.device.type != "cuda" and not interpreted:
        return (
            f"it runs on CUDA tensors and query is on {query.device}; on a CPU use "
            "backend='blocked', or set TRITON_INTERPRET=1 before Python starts to test the kernels"
        )
    if not interpreted and not is_capable(query.device.index):
        return (
            "it needs a GPU of compute capability "
            f"{CAPABILITY[0]}.{CAPABILITY[1]}; use backend='reference'"
        )
    if query.dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, query is {query.dtype}"
    if interpreted and query.dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly; test in float32 or float16"
    size, width = key.shape[-3], key.shape[-1]
    if size > MAX_CHUNK_SIZE:
        return f"it takes chunks of up to {MAX_CHUNK_SIZE} tokens, S is {size}"
    if width > MAX_WIDTH:
        return f"it takes heads of width up to {MAX_WIDTH}, D is {width}"
    return None


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    import triton

    # As its own functions were made when it was imported.
    return not isinstance(triton.language.sum, triton.JITFunction)


@torch.compiler.assume_constant_result
def _has_changed() -> bool:
    from triton import knobs

    return knobs.runtime.interpret != _is_interpreted()


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    *,
    key_lengths: Tensor | None,
    scale: float,
    softmax_plus_one: bool,
    inverse: InverseIndex | None = None,
) -> Tensor:
    """Same contract as `grouped_cross_attention`, arguments already validated.

    Scores, softmax and sums are float32; probabilities, and in the backward the gradients of
    scores, are rounded to query's dtype for the next product.
    """
    if 0 in (*query.shape, *key.shape, *weights.shape):
        # Nothing to launch.
        return reference(
            query, key, value, indices, weights,
            key_lengths=key_lengths, scale=scale, softmax_plus_one=softmax_plus_one,
        )  # fmt: skip
    # Imported here, because Triton is optional and its import takes a while.
    from drt.ops.gca.triton.operator import attend

    return attend(
        query,
        key,
        value,
        None if indices is None else indices.contiguous(),
        weights.float().contiguous(),
        None if key_lengths is None else key_lengths.contiguous(),
        [] if inverse is None else list(inverse),
        scale,
        softmax_plus_one,
    )
