"""From tensors to kernel launches: strides, sizes, tiles, grids."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drt.ops.gca.inverse import SEGMENT, InverseIndex
from drt.ops.gca.triton.kernels.backward import memory_kernel, query_kernel, reduce_kernel
from drt.ops.gca.triton.kernels.forward import forward_kernel
from drt.ops.gca.triton.tiles import (
    FORWARD,
    QUERY,
    Gpu,
    Sizes,
    Tiles,
    memory_tiles,
    query_tiles,
)

# Softmaxes are taken with powers of two.
_LOG2_E = 1.4426950408889634


class Launch(NamedTuple):
    """A kernel, how many programs of it, and its arguments with `num_warps` and `num_stages`."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]

    def run(self) -> None:
        """Launch it on the current device."""
        self.kernel[(self.programs,)](**self.arguments)


class Call(NamedTuple):
    """The arguments of one call of the operator, as `grouped_cross_attention` describes them.

    No dimension has size 0; indices (None = in order), weights (float32) and lengths are
    contiguous; query, key and value have any strides.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    indices: Tensor | None
    weights: Tensor
    key_lengths: Tensor | None
    scale: float
    softmax_plus_one: bool
    gpu: Gpu

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.key.shape[3]

    @property
    def ratio(self) -> int:
        """Query heads that read one key/value head R."""
        return self.query.shape[3] // self.kv_heads

    @property
    def rows(self) -> int:
        """Queries of a chunk that read one key/value head."""
        return self.query.shape[2] * self.ratio

    @property
    def tiled(self) -> Sizes:
        """What tiles depend on."""
        size, width, itemsize = self.key.shape[2], self.key.shape[4], self.key.element_size()
        return Sizes(self.rows, size, width, itemsize, self.gpu)

    def arguments(self, tiles: Tiles) -> dict[str, Any]:
        """What all kernels that read the call's tensors take, those of `tiles` among it."""
        return {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "weights": self.weights,
            "lengths": self.key_lengths,
            **_strides("q", "bcqhd", self.query),
            **_strides("k", "bmsgd", self.key),
            **_strides("v", "bmsgd", self.value),
            "C": self.query.shape[1],
            "Q": self.query.shape[2],
            "G": self.kv_heads,
            "M": self.key.shape[1],
            "K": self.weights.shape[2],
            "scale": self.scale * _LOG2_E,
            "R": self.ratio,
            **_memory_tile(self.key, tiles),
            "RAGGED": self.key_lengths is not None,
            "PLUS_ONE": self.softmax_plus_one,
            "PRECISION": _precision(self.query.dtype),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    def over_queries(self, kernel: Any, tiles: Tiles, arguments: dict[str, Any]) -> Launch:
        """The launch of a kernel with a program per row, chunk of queries, kv head and part."""
        shared = {
            **self.arguments(tiles),
            "indices": self.indices,
            "BLOCKS": tiles.blocks,
            "PARTS": tiles.parts,
            "SPAN": sum(tiles.blocks),
            "IN_ORDER": self.indices is None,
        }
        programs = self.query.shape[0] * self.query.shape[1] * self.kv_heads * tiles.parts
        return Launch(kernel, programs, {**shared, **arguments})


def forward_launch(call: Call, output: Tensor) -> Launch:
    """Write the (B, C, Q, H, D) output."""
    tiles = query_tiles(call.tiled, FORWARD)
    arguments = {"output": output, **_strides("o", "bcqhd", output)}
    return call.over_queries(forward_kernel, tiles, arguments)


def new_weight_parts(call: Call) -> Tensor:
    """(B, C, K, G, parts) float32, which `query_launch` writes: their sum is dw."""
    tiles = query_tiles(call.tiled, QUERY)
    return call.weights.new_empty(*call.weights.shape, call.kv_heads, tiles.parts)


def new_row_sums(call: Call) -> Tensor:
    """What `query_launch` tells `memory_launches` of chunks that do not fit one of its tiles."""
    split = memory_tiles(call.tiled).splits > 1
    shape = (2, call.weights.numel(), call.kv_heads, call.rows)
    return call.weights.new_empty(shape if split else 0)


def query_launch(
    call: Call, grad: Tensor, d_query: Tensor, d_weights: Tensor, row_sums: Tensor
) -> Launch:
    """Write the gradients of query and, in parts, of weights."""
    arguments = {
        "grad": grad,
        "d_query": d_query,
        "d_weights": d_weights,
        "row_sums": row_sums,
        **_strides("o", "bcqhd", grad),
        **_strides("x", "bcqhd", d_query),
        "num_pairs": call.weights.numel(),
        "factor": call.scale,
        "KEEP_SUMS": row_sums.numel() > 0,
    }
    return call.over_queries(query_kernel, query_tiles(call.tiled, QUERY), arguments)


def memory_launches(
    call: Call,
    grad: Tensor,
    row_sums: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    inverse: InverseIndex,
) -> list[Launch]:
    """Write the gradients of key and value, after `query_launch`."""
    tiles = memory_tiles(call.tiled)
    num_segments, num_sources = inverse.sources.shape[0], call.key.shape[0] * call.key.shape[1]
    # Chunks in order are retrieved once each.
    num_partials = 0 if call.indices is None else inverse.num_partials
    d_partial = call.weights.new_empty(
        2, num_partials, call.kv_heads, call.key.shape[2], call.key.shape[4]
    )
    block, last = tiles.blocks
    shared = {
        "d_key": d_key,
        "d_value": d_value,
        "d_partial": d_partial,
        "segments": inverse.segments,
        "partials": inverse.partials,
        **_strides("x", "bmsgd", d_key),
        **_strides("y", "bmsgd", d_value),
        "num_sources": num_sources,
        "num_partials": num_partials,
    }
    arguments = {
        **call.arguments(tiles),
        **shared,
        "grad": grad,
        "row_sums": row_sums,
        "order": inverse.order,
        "starts": inverse.starts,
        "sources": inverse.sources,
        **_strides("o", "bcqhd", grad),
        "num_segments": num_segments,
        "num_pairs": call.weights.numel(),
        "factor": call.scale,
        "SEGMENT": SEGMENT,
        "BLOCK_ROWS": block,
        "FULL": call.rows // block if last else -(-call.rows // block),
        "TAIL_ROWS": last,
    }
    sums = {
        **shared,
        "G": call.kv_heads,
        "M": call.key.shape[1],
        **_memory_tile(call.key, tiles),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
    planes = call.kv_heads * tiles.splits
    found = [Launch(memory_kernel, num_segments * planes, arguments)]
    if num_partials:
        found.append(Launch(reduce_kernel, num_sources * planes, sums))
    return found


def _strides(letter: str, dimensions: str, tensor: Tensor) -> dict[str, int]:
    named = zip(dimensions, tensor.stride(), strict=True)
    return {f"{letter}_{dimension}": stride for dimension, stride in named}


def _memory_tile(key: Tensor, tiles: Tiles) -> dict[str, int]:
    return {
        "S": key.shape[2],
        "D": key.shape[4],
        "BLOCK_S": tiles.block_size,
        "SPLITS": tiles.splits,
        "BLOCK_D": tiles.block_width,
    }


def _precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as torch was told to, exactly by three TF32 products."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def gpu_of(device: torch.device) -> Gpu:
    """The limits of a device; of an H100 where the interpreter runs the kernels."""
    if device.type != "cuda":
        return Gpu()
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.shared_memory_per_block_optin, found.major in (9, 10))
