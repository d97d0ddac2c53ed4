"""Sparse attentions of flash-linear-attention, where it is installed: NSA and MoBA.

Other operators than ours, at the same number of tokens, chunk size and retrieved chunks. Both
choose for each token, ours for each chunk. NSA is given its choice, as ours is; MoBA chooses
within. They are called by the names and arguments of version 0.5.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from gca_variants import Sizes

NSA_GROUP = 16
"""NSA wants this many query heads, or a multiple, for each key head."""


def nsa(sizes: Sizes, indices: Tensor, *, dtype: torch.dtype) -> Callable[..., Tensor] | str:
    """Its attention to selected blocks, without compression and window, or why there is none.

    Args:
        sizes: as many query as memory tokens.
        indices: (1, C, K) the chunks that are selected, for all tokens and heads of a chunk.
        dtype: of the queries.
    """
    found = _load("fla.ops.nsa.parallel", "parallel_nsa")
    if isinstance(found, str):
        return found
    if sizes.heads % (NSA_GROUP * sizes.kv_heads):
        return f"wants {NSA_GROUP} heads a group"
    chosen = indices.repeat_interleave(sizes.chunk_size, 1)[:, :, None]
    chosen = chosen.expand(-1, -1, sizes.kv_heads, -1).contiguous()
    gate = torch.ones(1, chosen.shape[1], sizes.heads, dtype=dtype, device=indices.device)
    return partial(
        found,
        g_slc=gate,
        block_indices=chosen,
        block_counts=sizes.topk,
        block_size=sizes.chunk_size,
    )


def moba(sizes: Sizes, device: torch.device) -> Callable[..., Tensor] | str:
    """It with K chunks besides the token's own, or why there is none."""
    found = _load("fla.ops.moba.parallel", "parallel_moba")
    if isinstance(found, str):
        return found
    if sizes.heads != sizes.kv_heads:
        return "has no grouped heads"
    tokens = sizes.chunks * sizes.chunk_size
    return partial(
        found,
        cu_seqlens=torch.tensor([0, tokens], dtype=torch.int32, device=device),
        max_seqlen=tokens,
        chunk_size=sizes.chunk_size,
        topk=sizes.topk + 1,
    )


def _load(module: str, name: str) -> Callable[..., Tensor] | str:
    if find_spec("fla") is None:
        return "not installed"
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        return f"this fla has no {module}.{name}: {error}"
