"""The public operator: validation and the choice of a backend."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from drt.ops.gca.blocked import blocked
from drt.ops.gca.inverse import InverseIndex
from drt.ops.gca.reference import reference
from drt.ops.gca.triton import backend as triton
from drt.precision import without_autocast


class Backend(NamedTuple):
    """One implementation of the operator."""

    run: Callable[..., Tensor]
    """Called with the arguments of `grouped_cross_attention` but `backend`, validated."""
    unavailable: Callable[[Tensor, Tensor], str | None]
    """Why it cannot serve this query and key and what would help, or None if it can."""
    takes_inverse: bool = False
    """Whether it reads `inverse`."""


def _blocked_unavailable(query: Tensor, key: Tensor) -> str | None:
    if query.device.type == "cpu":
        return None
    return f"it runs on CPU tensors and query is on {query.device}; use 'triton' or 'reference'"


BACKENDS: dict[str, Backend] = {
    "reference": Backend(reference, lambda query, key: None),
    "blocked": Backend(blocked, _blocked_unavailable),
    "triton": Backend(triton.run, triton.unavailable, takes_inverse=True),
}


def grouped_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor | None,
    weights: Tensor,
    *,
    key_lengths: Tensor | None = None,
    scale: float | None = None,
    softmax_plus_one: bool = False,
    inverse: InverseIndex | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attend from each chunk of queries to its retrieved chunks, one softmax per chunk.

    For a query q of a chunk that retrieved the slots k with indices i_k and weights w_k (GCA,
    arXiv 2410.01651):

        output = sum_k w_k * softmax_t(scale * <q, key[i_k, t]>) @ value[i_k]

    A slot of index -1 and a chunk of length 0 contribute exactly nothing, in value and in gradient,
    whatever the unused keys, values and weights hold. Differentiable once, in query, key, value and
    weights.

    Args:
        query: (B, C, Q, H, D) floating; the Q positions of a chunk share one retrieval.
        key: (B, M, S, G, D), query's dtype: a memory of M chunks of S tokens; H is a multiple of
            the G key/value heads, and query head h reads head h // (H // G). Fastest, and without
            a copy, when `key.transpose(2, 3)` is contiguous. Its gradient is contiguous where
            key is, and head-major in the same sense where it is not.
        value: (B, M, S, G, D), as key.
        indices: (B, C, K) int64 in [-1, M): the retrieved chunks, -1 for none. None says that the
            memory holds what is retrieved and nothing else, in order: M is C * K, and chunk c of
            queries retrieved c * K, c * K + 1, ...; the fastest for a few queries without gradient.
        weights: (B, C, K) floating, of any precision, non-negative: the weight of each slot.
        key_lengths: (B, M) int64 in [0, S]: valid tokens of each chunk; None when all S are.
        scale: factor of the scores; None for D ** -0.5.
        softmax_plus_one: add 1 to each softmax denominator (an implicit key of score 0, value 0).
        inverse: `invert_indices(indices, M)`, where several calls share their indices: the "triton"
            backward then need not work it out for each. The others have no use for it.
        backend: "blocked" (CPU), "triton" (CUDA from compute capability 8.0; float16, bfloat16,
            float32; S and D up to 256) or "reference" (everywhere). None for "blocked" on CPU, and
            elsewhere "triton" where it can serve these tensors, else "reference".

    Returns:
        (B, C, Q, H, D) in query's dtype.

    Raises:
        ValueError: for shapes, dtypes, devices or an unknown backend that do not fit the above,
            and on CPU for indices or lengths out of range. On other devices, where reading them
            would make the host wait, such values fail a device-side assertion instead.
        RuntimeError: if the backend that was asked for cannot serve these tensors.
    """
    _check_tensors(query, key, value, weights)
    if indices is None:
        _check_order(key, weights)
    else:
        _check_indices(indices, key, weights)
    if key_lengths is not None:
        _check_lengths(key_lengths, key)
    if inverse is not None:
        _check_inverse(inverse, key, weights)
    chosen = _choose(backend, query, key)
    options = {"inverse": inverse} if chosen.takes_inverse else {}
    # One precision policy; autocast would change it half-way.
    with without_autocast(query.device.type):
        return chosen.run(
            query,
            key,
            value,
            indices,
            weights,
            key_lengths=key_lengths,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            softmax_plus_one=softmax_plus_one,
            **options,
        )


def default_backend(query: Tensor, key: Tensor) -> str:
    """The backend that serves these tensors when none is asked for."""
    if query.device.type == "cpu":
        return "blocked"
    return "reference" if triton.unavailable(query, key) else "triton"


def wants_inverse(key: Tensor) -> bool:
    """Whether the backward of calls with this key, of no backend by name, reads `inverse`."""
    return BACKENDS[default_backend(key, key)].takes_inverse


def _choose(name: str | None, query: Tensor, key: Tensor) -> Backend:
    if name is None:
        name = default_backend(query, key)
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(sorted(BACKENDS))}")
    reason = BACKENDS[name].unavailable(query, key)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is unavailable: {reason}")
    return BACKENDS[name]


def _check_tensors(query: Tensor, key: Tensor, value: Tensor, weights: Tensor) -> None:
    if query.ndim != 5 or key.ndim != 5:
        raise ValueError(
            "query must be (B, C, Q, H, D) and key (B, M, S, G, D), "
            f"got {tuple(query.shape)} and {tuple(key.shape)}"
        )
    batch, count, _, heads, width = query.shape
    kv_heads = key.shape[3]
    if width == 0 or key.shape[0] != batch or key.shape[4] != width:
        raise ValueError(
            f"key must share B = {batch} and D = {width} > 0 with query, got {tuple(key.shape)}"
        )
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(
            f"query heads must be a multiple of key heads, got H = {heads} and G = {kv_heads}"
        )
    if value.shape != key.shape:
        raise ValueError(f"value must be {tuple(key.shape)} like key, got {tuple(value.shape)}")
    if weights.ndim != 3 or weights.shape[:2] != (batch, count):
        raise ValueError(
            f"weights must be (B, C, K) = ({batch}, {count}, K), got {tuple(weights.shape)}"
        )
    if not query.is_floating_point() or not key.dtype == value.dtype == query.dtype:
        raise ValueError(
            "query, key and value must share one floating dtype, "
            f"got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not weights.is_floating_point():
        raise ValueError(f"weights must be floating, got {weights.dtype}")
    _check_device(query, key=key, value=value, weights=weights)


def _check_order(key: Tensor, weights: Tensor) -> None:
    """Refuse a memory that cannot be what was retrieved, in order."""
    count, topk = weights.shape[1:]
    if key.shape[1] != count * topk:
        raise ValueError(
            f"without indices M must be C * K = {count} * {topk}, the memory has {key.shape[1]}"
        )


def _check_indices(indices: Tensor, key: Tensor, weights: Tensor) -> None:
    if indices.shape != weights.shape:
        raise ValueError(
            f"indices must be {tuple(weights.shape)} like weights, got {tuple(indices.shape)}"
        )
    _check_integer("indices", indices)
    _check_device(key, indices=indices)
    _check_values("indices", indices, -1, key.shape[1] - 1)


def _check_lengths(key_lengths: Tensor, key: Tensor) -> None:
    if key_lengths.shape != key.shape[:2]:
        raise ValueError(
            f"key_lengths must be (B, M) = {tuple(key.shape[:2])}, got {tuple(key_lengths.shape)}"
        )
    _check_integer("key_lengths", key_lengths)
    _check_device(key, key_lengths=key_lengths)
    _check_values("key_lengths", key_lengths, 0, key.shape[2])


def _check_inverse(inverse: InverseIndex, key: Tensor, weights: Tensor) -> None:
    slots, chunks = inverse.order.shape[0], inverse.starts.shape[0] - 1
    if (slots, chunks) != (weights.numel(), key.shape[0] * key.shape[1]):
        raise ValueError(
            f"inverse is of {slots} slots and {chunks} chunks, "
            f"the call has {weights.numel()} and {key.shape[0] * key.shape[1]}"
        )
    _check_device(key, inverse=inverse.order)


def _check_integer(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {tensor.dtype}")


def _check_device(query: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on {query.device}, got {tensor.device}")


def _check_values(name: str, tensor: Tensor, low: int, high: int) -> None:
    """Refuse values outside [low, high]."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return
    lowest, highest = torch.aminmax(tensor)
    if tensor.device.type == "cpu" and not torch.compiler.is_compiling():
        if lowest < low or highest > high:
            raise ValueError(
                f"{name} must be in [{low}, {high}], got values in [{lowest}, {highest}]"
            )
    else:
        # With the limits in it, a compiled graph would serve a memory of one size only.
        limits = "range" if torch.compiler.is_compiling() else f"[{low}, {high}]"
        message = f"{name} must be in {limits}"
        torch.ops.aten._assert_async.msg((lowest >= low) & (highest <= high), message)
