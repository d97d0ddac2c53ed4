"""How the keys and values of a chunk become one record of bytes, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
"""What keys and values can be stored as."""

ALIGNMENT = 64
"""Bytes: the length of a record is a multiple of it."""

_SCALE_BYTES = 4
_INT8_MAX = 127


class Parts(NamedTuple):
    """What n records hold, as stored."""

    keys: Tensor
    """(n, G, S, D) in the storage dtype."""
    values: Tensor
    """(n, G, S, D) in the storage dtype."""
    scales: Tensor | None
    """(n, 2, G) float32, of keys and values; None unless the storage dtype is int8."""


@dataclass(frozen=True)
class RecordFormat:
    """The layout of a record: keys (G, S, D) | values (G, S, D) | scales (2, G) | zeros.

    int8 is symmetric: one float32 scale for each chunk, head, and tensor, x ~ scale * integer, so
    an element is off by at most scale / 2 = max|x| / 254.

    Args:
        chunk_size: token places of a chunk S.
        kv_heads: heads of keys and values G.
        head_dim: their width D.
        dtype: storage dtype, one of `STORAGE_DTYPES`.

    Raises:
        ValueError: a size below 1, or another dtype.
    """

    chunk_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        for name in ("chunk_size", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in STORAGE_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES)
            raise ValueError(f"keys and values are stored as one of {names}; got {self.dtype}")

    @cached_property
    def part_bytes(self) -> int:
        """Bytes of the keys, and as many of the values."""
        return self.chunk_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    @cached_property
    def scales_at(self) -> int:
        """Byte at which the scales of int8 begin, aligned for float32."""
        return -(-2 * self.part_bytes // _SCALE_BYTES) * _SCALE_BYTES

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of a record R."""
        scales = 2 * self.kv_heads * _SCALE_BYTES if self.dtype == torch.int8 else 0
        return -(-(self.scales_at + scales) // ALIGNMENT) * ALIGNMENT

    def encode(self, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Records of n chunks.

        Args:
            keys: (n, S, G, D) floating point.
            values: (n, S, G, D).
            lengths: (n,) int64 content tokens; zeros are stored for the places beyond. None = S.

        Returns:
            (n, R) uint8 on the device of the keys.
        """
        stored = [self._quantized(_content(x, lengths).transpose(1, 2)) for x in (keys, values)]
        (keys, key_scales), (values, value_scales) = stored
        scales = None
        if key_scales is not None and value_scales is not None:
            scales = torch.stack([key_scales, value_scales], dim=1)
        return self.pack(Parts(keys, values, scales))

    def pack(self, parts: Parts) -> Tensor:
        """(n, R) uint8 records of what is to be stored, converted to the storage dtype."""
        count = parts.keys.shape[0]
        records = parts.keys.new_empty(count, self.record_bytes, dtype=torch.uint8)
        # Bytes that no view below covers must not differ between two writings of one chunk.
        records[:, 2 * self.part_bytes :] = 0
        target = self.parts(records)
        target.keys.copy_(parts.keys)
        target.values.copy_(parts.values)
        if target.scales is not None:
            assert parts.scales is not None
            target.scales.copy_(parts.scales)
        return records

    def parts(self, records: Tensor) -> Parts:
        """Views into (n, R) uint8 records."""
        shape = (self.kv_heads, self.chunk_size, self.head_dim)
        size = self.part_bytes
        keys = records[:, :size].view(self.dtype).unflatten(1, shape)
        values = records[:, size : 2 * size].view(self.dtype).unflatten(1, shape)
        if self.dtype != torch.int8:
            return Parts(keys, values, None)
        scales = records[:, self.scales_at : self.scales_at + 2 * self.kv_heads * _SCALE_BYTES]
        return Parts(keys, values, scales.view(torch.float32).unflatten(1, (2, self.kv_heads)))

    def decode(self, records: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (n, S, G, D) in `dtype`; their `transpose(1, 2)` is contiguous."""
        keys, values, scales = self.parts(records)
        if scales is not None:
            keys = keys * scales[:, 0, :, None, None]
            values = values * scales[:, 1, :, None, None]
        keys, values = keys.to(dtype).contiguous(), values.to(dtype).contiguous()
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _quantized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, G, S, D) as it is to be stored, and its (n, G) scales."""
        if self.dtype != torch.int8:
            return x, None
        x = x.float()
        scales = x.abs().amax((2, 3)) / _INT8_MAX
        # A chunk of zeros has no scale, and any will do.
        scales = scales.masked_fill(scales == 0, 1.0)
        integers = (x / scales[:, :, None, None]).round().clamp(-_INT8_MAX, _INT8_MAX)
        return integers.to(torch.int8), scales


def _content(x: Tensor, lengths: Tensor | None) -> Tensor:
    """(n, S, G, D) with zeros beyond the lengths, whatever stood there."""
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[1]) >= lengths[:, None]
    return x.masked_fill(beyond[:, :, None, None].to(x.device), 0.0)
