"""The parts of a DRT: norm, feed-forward, the three attentions, the decoder and encoder layers.

Weights are named as transformers names those of Llama, so that its checkpoints map onto them.
Shapes use the letters of docs/method.md: B rows, P positions, E width, H and G heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from drt.chunking import SegmentLayout
from drt.configuration import DecoderConfig, DRTConfig
from drt.ops.gca import grouped_cross_attention
from drt.ops.window import sliding_window_attention
from drt.retrieval import RetrievedChunks
from drt.state import WindowCache


def _kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Keep what a function makes for its arguments, on the device, for all who ask later."""

    @cache
    def keep(*arguments: Any) -> Tensor:
        # Tensors made in inference mode could not be used in training.
        with torch.inference_mode(False):
            return make(*arguments)

    @wraps(make)
    def kept(*arguments: Any) -> Tensor:
        # What is made inside a graph, or without numbers, belongs to nobody else.
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:
            return make(*arguments)
        return keep(*arguments)

    return kept


class Rotary(NamedTuple):
    """Rotary factors of P positions: (P, 1, D) or (B, P, 1, D) each, float32, D/2 angles twice."""

    cos: Tensor
    sin: Tensor
    """Negative in its first half."""


def rotary_factors(
    first: int | list[int] | Tensor, count: int, *, config: DecoderConfig, device: torch.device
) -> Rotary:
    """Rotary factors of the positions first .. first + count - 1; `first` may be one number a row.

    Angles are computed in float64: at position 1,000,000 float32 is off by a thirtieth of a radian.
    """
    assert config.head_dim is not None
    if isinstance(first, list) and min(first) == max(first):
        first = first[0]
    if isinstance(first, int):
        position = torch.arange(first, first + count, dtype=torch.float64, device=device)
    else:
        start = torch.as_tensor(first, dtype=torch.float64).to(device, non_blocking=True)[:, None]
        position = start + torch.arange(count, dtype=torch.float64, device=device)
    frequency = _frequencies(config.rope_theta, config.head_dim, device)
    angle = position[..., None, None] * frequency
    return Rotary(angle.cos().float(), angle.sin().float())


@_kept
def _frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """(D,) float64, D/2 rotary frequencies negated and once more as they are."""
    half = torch.arange(head_dim // 2, dtype=torch.float64, device=device)
    frequency = theta ** (-2.0 * half / head_dim)
    return torch.cat([-frequency, frequency])


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Apply rotary positions to (B, P, heads, D); the halves of D are the pairs, as in Llama."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * rotary.cos, swapped, rotary.sin).to(x.dtype)


@_kept
def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """(H,) float32 slopes 2^(-8 i / H), i = 1 .. H, of ALiBi (arXiv 2108.12409)."""
    return 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, device=device) / num_heads)


class DRTRMSNorm(nn.Module):
    """Root-mean-square norm with a learned gain, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E) of the same dtype."""
        # One operation, rounded once: PyTorch computes lower precisions in float32 by itself.
        if x.dtype == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class DRTMLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DRTAttention(nn.Module):
    """Query, key, value and output projections of self-attention; subclasses say who sees whom."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * self.head_dim
        keys = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def project(self, hidden: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """(..., P, E) -> query (..., P, H, D), key and value (..., P, G, D), rotated."""
        heads = (-1, self.head_dim)
        query = self.q_proj(hidden).unflatten(-1, heads)
        key = self.k_proj(hidden).unflatten(-1, heads)
        value = self.v_proj(hidden).unflatten(-1, heads)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value


class SlidingWindowAttention(DRTAttention):
    """Causal self-attention to the last W positions, with rotary positions or ALiBi."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        self.window = config.sliding_window
        self.num_heads = config.num_attention_heads
        self.uses_alibi = config.position_embedding == "alibi"

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        layout: SegmentLayout,
        cache: WindowCache | None,
    ) -> Tensor:
        """(B, P, E) -> (B, P, E); reads and extends `cache` if there is one."""
        query, key, value = self.project(hidden, rotary)
        first_keys = layout.document_starts
        if cache is not None:
            key, value, first_keys = cache.extend(key, value, window=self.window, layout=layout)
        slopes = alibi_slopes(self.num_heads, hidden.device) if self.uses_alibi else None
        out = sliding_window_attention(
            query, key, value, window=self.window, alibi_slopes=slopes, first_keys=first_keys
        )
        return self.o_proj(out.flatten(-2))


class ChunkAttention(DRTAttention):
    """Bidirectional self-attention inside each chunk.

    It is grouped cross-attention in which every chunk retrieves itself with weight 1.
    """

    def forward(self, hidden: Tensor, rotary: Rotary | None, lengths: Tensor | None) -> Tensor:
        """(B, C, S + 1, E) -> (B, C, S + 1, E); chunks have (B, C) `lengths` positions."""
        query, key, value = self.project(hidden, rotary)
        batch, count = hidden.shape[:2]
        weight = torch.ones(batch, count, 1, device=hidden.device)
        out = grouped_cross_attention(query, key, value, None, weight, key_lengths=lengths)
        return self.o_proj(out.flatten(-2))


class GroupedCrossAttention(nn.Module):
    """Attention to retrieved chunks; their keys and values come projected from the memory."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self.softmax_plus_one = config.softmax_plus_one
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, blocks: Tensor, chunks: RetrievedChunks) -> Tensor:
        """(B, num_blocks, Q, E) -> (B, num_blocks, Q, E)."""
        query = self.q_proj(blocks).unflatten(-1, (-1, self.head_dim))
        # The pool is one row's memory for the operator, and the blocks of all rows are its chunks.
        # It may come from a run of another precision.
        out = grouped_cross_attention(
            query.flatten(0, 1)[None],
            chunks.keys[None].to(query.dtype),
            chunks.values[None].to(query.dtype),
            None if chunks.in_order else chunks.indices.flatten(0, 1)[None],
            chunks.weights.flatten(0, 1)[None],
            key_lengths=None if chunks.lengths is None else chunks.lengths[None],
            softmax_plus_one=self.softmax_plus_one,
            inverse=chunks.inverse,
        )
        return self.o_proj(out.flatten(-2)).view(blocks.shape)


class DRTDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer; an upper one also attends to retrieved chunks.

    What an upper layer retrieves feeds its feed-forward part only and bypasses the residual
    stream: a = h + SWA(norm(h)); o = GCA(norm(a)); h' = a + FFN(norm(a + o)).
    """

    def __init__(self, config: DRTConfig, *, upper: bool) -> None:
        super().__init__()
        self.input_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SlidingWindowAttention(config)
        self.post_attention_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DRTMLP(config)
        self.cross_attn = GroupedCrossAttention(config) if upper else None
        if upper:
            self.cross_attn_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        layout: SegmentLayout,
        cache: WindowCache | None = None,
        chunks: RetrievedChunks | None = None,
    ) -> Any:
        """`forward` with its hooks; after `compile`, compiled in training without a cache only.

        A graph that extends a cache would hold the lengths of its rows as constants, and a new one
        would be compiled for each step of decoding.
        """
        if self.training and cache is None:
            return super().__call__(hidden, rotary, layout, cache, chunks)
        return self._call_impl(hidden, rotary, layout, cache, chunks)

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        layout: SegmentLayout,
        cache: WindowCache | None = None,
        chunks: RetrievedChunks | None = None,
    ) -> Tensor:
        """(B, P, E) -> (B, P, E); without `chunks` nothing is retrieved and o = 0."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, layout, cache)
        mixed = self.with_retrieved(hidden, layout, chunks)
        return hidden + self.mlp(self.post_attention_layernorm(mixed))

    def with_retrieved(
        self, hidden: Tensor, layout: SegmentLayout, chunks: RetrievedChunks | None
    ) -> Tensor:
        """a + o: (B, P, E) -> (B, P, E)."""
        if self.cross_attn is None or chunks is None:
            return hidden
        blocks = layout.to_blocks(self.cross_attn_layernorm(hidden))
        return hidden + layout.from_blocks(self.cross_attn(blocks, chunks))


class DRTEncoderLayer(GradientCheckpointingLayer):
    """A layer of the chunk encoder: bidirectional inside each chunk."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__()
        self.input_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ChunkAttention(config)
        self.post_attention_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DRTMLP(config)

    def __call__(self, hidden: Tensor, rotary: Rotary | None, lengths: Tensor | None) -> Any:
        """`forward` with its hooks; after `compile`, compiled in training only."""
        if self.training:
            return super().__call__(hidden, rotary, lengths)
        return self._call_impl(hidden, rotary, lengths)

    def forward(self, hidden: Tensor, rotary: Rotary | None, lengths: Tensor | None) -> Tensor:
        """(B, C, S + 1, E) -> (B, C, S + 1, E); chunks have (B, C) `lengths` positions."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, lengths)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EncodedChunks(NamedTuple):
    """What the memory keeps of C closed chunks."""

    landmarks: Tensor
    """(B, C, L)."""
    keys: Tensor
    """(B, C, S, G, D), head-major in storage."""
    values: Tensor
    """(B, C, S, G, D), head-major in storage."""


class ChunkEncoder(nn.Module):
    """Turns closed chunks into a landmark embedding each, and keys and values for attention."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__()
        assert config.num_key_value_heads is not None
        assert config.head_dim is not None
        self.config = config
        width = config.num_key_value_heads * config.head_dim
        self.input_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DRTEncoderLayer(config) for _ in range(config.num_encoder_layers)
        )
        self.norm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.landmark_proj = landmark_projection(config)

    def forward(self, closed: Tensor, lengths: Tensor | None = None) -> EncodedChunks:
        """Encode chunks.

        Args:
            closed: (B, C, S + 1, E) lower-layer outputs, each landmark right after its content.
            lengths: (B, C) int64 content tokens of each chunk; None = all have S.
        """
        encoded = self.input_layernorm(closed)
        rotary = rotary_factors(0, closed.shape[2], config=self.config, device=closed.device)
        filled = None if lengths is None else lengths + 1
        for layer in self.layers:
            encoded = layer(encoded, rotary, filled)
        encoded = self.norm(encoded)
        content = encoded[:, :, :-1]
        keys = self._head_major(self.k_proj(content))
        values = self._head_major(self.v_proj(content))
        return EncodedChunks(self.landmark_proj(_landmarks(encoded, lengths)), keys, values)

    def _head_major(self, projected: Tensor) -> Tensor:
        """(B, C, S, G * D) -> (B, C, S, G, D) stored as (B, C, G, S, D), as attention reads it."""
        split = projected.unflatten(-1, (-1, self.config.head_dim))  # type: ignore[arg-type]
        return split.transpose(2, 3).contiguous().transpose(2, 3)


class LandmarkProjection(nn.Linear):
    """From the model's width to that of landmarks and retrieval queries."""

    def __init__(self, config: DRTConfig) -> None:
        assert config.landmark_size is not None
        super().__init__(config.hidden_size, config.landmark_size, bias=False)


def landmark_projection(config: DRTConfig) -> nn.Module:
    """A `LandmarkProjection`; nothing where landmarks are as wide as the model."""
    return nn.Identity() if config.landmark_size is None else LandmarkProjection(config)


def _landmarks(encoded: Tensor, lengths: Tensor | None) -> Tensor:
    """(B, C, S + 1, E) -> (B, C, E): the position after the content."""
    if lengths is None:
        return encoded[:, :, -1]
    place = lengths[..., None, None].expand(-1, -1, 1, encoded.shape[-1])
    return encoded.gather(2, place).squeeze(2)
