"""Landmark Attention (Mohtashami and Jaggi, arXiv 2305.16300), top to bottom.

A landmark closes every chunk of S tokens, as in DRT. In every layer but the first each position and
head attends to its window and to the K past chunks whose landmark keys score highest for its query,
with the grouped softmax: one outer softmax over the scores of the window and of the landmarks, and
inside each chunk an inner one over its tokens, multiplied by what the outer one gives the landmark:

    a_i   = q_i . k_i / sqrt(D)                          i in the window
    r_j   = q . k_landmark(j) / sqrt(D)                  j in the K best past chunks
    p     = softmax over [a ; r] together
    out   = sum_i p_i v_i + sum_j p_j sum_t softmax_t(q . k_jt / sqrt(D)) v_jt

Each position and head retrieves for itself, as the original does at inference, and does so in
training too, where the original attends to all chunks: the row "top-k 4" of arXiv 2410.01651.
So training, prefill and decoding compute the same thing. Where the original sees the tokens of the
open chunk alone beside landmarks, here a window of any width takes their place, as in that row (768
positions there). Candidates are all complete chunks that have begun to leave the window: no token
lies between the window and the candidates, and up to S - 1 tokens are in both. A landmark's key is
read as a score only; in the window a landmark is seen by itself alone, in the original not even by
itself.

Positions are rotary and bounded, after the original's stingy mapping: the window has its own, and
the retrieved chunks stand right before it, side by side in the order of the text. The original has
K + 1 places, the last K of which are the latest chunks' own, when landmarks are scored and when
they are retrieved, and the first that of all others; here there are K, and all landmarks are scored
at the first. In the first layer that leaves nothing to choose by, as its landmarks have read
nothing yet and are all the same: it sees its window only.
"""

# No annotations from __future__: `strict` checks the types of fields, and no text is a type.
from typing import NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from drt.baselines.base import (
    BaselineForCausalLM,
    BaselineModel,
    BaselineState,
    KeyValues,
)
from drt.baselines.chunk_attention import attend_to_chunks, search_landmarks
from drt.chunking import ChunkRules, Cursor, Marks, SegmentLayout, plan_segment
from drt.configuration import DecoderConfig
from drt.layers import DRTMLP, DRTAttention, DRTRMSNorm, Rotary, rotary_factors, rotate
from drt.precision import sum_dtype

# Queries of a block that shares its keys in window attention.
_QUERIES = 64
# Numbers that retrieval holds at once; more positions are taken in parts. An accelerator wants
# large parts, each of which costs it a few launches.
_NUMBERS = 1 << 26
_ACCELERATOR_NUMBERS = 1 << 30


@strict
class LandmarkAttentionConfig(DecoderConfig):
    """Configuration of `LandmarkAttentionForCausalLM`.

    Raises:
        ValueError: a size is out of range, there is no second layer or no second position in the
            window, heads do not divide, or a key is unknown.
    """

    model_type = "landmark_attention"

    chunk_size: int = 64
    """Content tokens of a chunk S; a landmark closes every complete chunk."""
    retrieval_topk: int = 4
    """Chunks that each position and head retrieves in each layer K."""

    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "chunk_size", "retrieval_topk")

    def _check(self) -> None:
        super()._check()
        if self.num_hidden_layers < 2:
            raise ValueError(
                "num_hidden_layers must be at least 2, as the first layer retrieves nothing, "
                f"got {self.num_hidden_layers}"
            )
        if self.sliding_window < 2:
            raise ValueError(
                "sliding_window must be at least 2, for landmarks to see any content, "
                f"got {self.sliding_window}"
            )


class Chunks(NamedTuple):
    """Keys and values of C complete chunks in one layer."""

    keys: Tensor
    """(B, G, C, S, D), rotated by the place in the chunk."""
    values: Tensor
    """(B, G, C, S, D)."""
    landmarks: Tensor
    """(B, G, C, D) landmark keys, rotated by S."""

    def extended(self, new: "Chunks") -> "Chunks":
        """These and new ones after them, in the precision of the new."""
        if new.keys.shape[2] == 0:
            return self
        joined = (torch.cat([a.to(b.dtype), b], dim=2) for a, b in zip(self, new, strict=True))
        return Chunks(*joined)


class Held(NamedTuple):
    """What a layer carries from one forward to the next."""

    recent_keys: Tensor
    """(B, n, G, D) of the last positions, without rotary positions: window and open chunk."""
    recent_values: Tensor
    """(B, n, G, D)."""
    chunk_keys: Tensor
    """`Chunks.keys`, and so on."""
    chunk_values: Tensor
    chunk_landmarks: Tensor


class Places(NamedTuple):
    """Where the P positions of a segment stand: the same in every layer."""

    first: int
    """Position of the first one, landmarks counted."""
    num_closed: int
    """Chunks that the segment closes."""
    window_rotary: Rotary
    """Of the positions that a state keeps, and of the segment's."""
    chunk_rotary: Rotary
    """Of the S + 1 positions of a chunk, (S + 1, D)."""
    slot_rotary: Rotary
    """Of a query, counted from where each of the K places before its window begins, (K, D)."""
    num_candidates: Tensor
    """(P,) int64: a position may retrieve the chunks below this number."""
    visible: Tensor
    """(NQ, Q, N) bool: whom each query of a block sees of the N keys in the block's reach."""


def make_places(
    config: LandmarkAttentionConfig, first: int, count: int, device: torch.device
) -> Places:
    """Places of the positions first .. first + count - 1."""
    width, window, topk = config.chunk_size + 1, config.sliding_window, config.retrieval_topk
    kept = min(first, _num_kept(config))

    def rotary(start: int, number: int) -> Rotary:
        return rotary_factors(start, number, config=config, device=device)

    # The last place ends right before the window.
    begins = [rotary(window - 1 + number * width, 1) for number in range(topk, 0, -1)]
    position = torch.arange(first, first + count, device=device)
    outside = torch.div(position - window, width, rounding_mode="floor") + 1
    return Places(
        first=first,
        num_closed=(first + count) // width - first // width,
        window_rotary=rotary(first - kept, kept + count),
        chunk_rotary=_without_heads(rotary(0, width)),
        slot_rotary=_without_heads(Rotary(*map(torch.cat, zip(*begins, strict=True)))),
        num_candidates=torch.minimum(outside, position // width).clamp_min(0),
        visible=_visible(config, first, count, device),
    )


def _without_heads(rotary: Rotary) -> Rotary:
    return Rotary(rotary.cos.squeeze(1), rotary.sin.squeeze(1))


def _num_kept(config: LandmarkAttentionConfig) -> int:
    """Last positions that a state keeps: the window's and the open chunk's."""
    return max(config.sliding_window - 1, config.chunk_size)


def _blocks(window: int, count: int) -> tuple[int, int, int]:
    """How `count` queries are cut up: queries of a block, blocks, and keys before a block."""
    size = min(count, _QUERIES)
    return size, -(-count // size), -(-(window - 1) // size) * size


def _visible(
    config: LandmarkAttentionConfig, first: int, count: int, device: torch.device
) -> Tensor:
    """`Places.visible`."""
    size, num_blocks, before = _blocks(config.sliding_window, count)
    start = first + size * torch.arange(num_blocks, device=device)[:, None]
    query = (start + torch.arange(size, device=device))[:, :, None]
    key = (start + torch.arange(-before, size, device=device))[:, None, :]
    distance = query - key
    inside = (distance >= 0) & (distance < config.sliding_window) & (key >= 0)
    is_content = key % (config.chunk_size + 1) != config.chunk_size
    return inside & (is_content | (distance == 0))


class LandmarkAttention(DRTAttention):
    """Self-attention to the window and, where the layer keeps chunks, to retrieved ones."""

    def __init__(self, config: LandmarkAttentionConfig, *, keeps_chunks: bool) -> None:
        super().__init__(config)
        self.keeps_chunks = keeps_chunks
        self.chunk_size = config.chunk_size
        self.topk = config.retrieval_topk
        self.window = config.sliding_window
        self.num_kept = _num_kept(config)

    def forward(
        self, hidden: Tensor, places: Places, held: Held | None
    ) -> tuple[Tensor, Held | None]:
        """(B, P, E) -> (B, P, E); and what to hold now, where anything is held."""
        query, key, value = self.project(hidden, None)
        recent = KeyValues(key, value)
        if held is not None:
            recent = KeyValues(held.recent_keys, held.recent_values).extended(key, value)
        chunks = self._close_chunks(recent, places, hidden.shape[1])
        if held is not None:
            before = Chunks(held.chunk_keys, held.chunk_values, held.chunk_landmarks)
            chunks = before.extended(chunks)
            held = Held(*recent.last(self.num_kept), *chunks)
        scores, found = self._retrieve(query, chunks, places)
        out, weights = self._see_window(query, recent, scores, places)
        out = out + (weights[..., None, :].to(found.dtype) @ found).squeeze(-2)
        return self.o_proj(out.flatten(-2)), held

    def nothing_held(self, like: Tensor) -> Held:
        """What is held before anything was read by (B, P, E) inputs."""
        heads = self.k_proj.out_features // self.head_dim
        recent = like.new_empty(like.shape[0], 0, heads, self.head_dim)
        chunk = like.new_empty(like.shape[0], heads, 0, self.chunk_size, self.head_dim)
        return Held(recent, recent, chunk, chunk, chunk[..., 0, :])

    def _close_chunks(self, recent: KeyValues, places: Places, count: int) -> Chunks:
        """The chunks that `count` new positions close, the last of the (B, n, G, D) recent ones."""
        width, closed = self.chunk_size + 1, places.num_closed if self.keeps_chunks else 0
        begin = recent.keys.shape[1] - count - places.first % width
        cut = (x[:, begin : begin + closed * width].unflatten(1, (closed, width)) for x in recent)
        # (B, C, S + 1, G, D) to (B, G, C, S + 1, D)
        keys, values = (x.permute(0, 3, 1, 2, 4) for x in cut)
        keys = rotate(keys, places.chunk_rotary)
        content = keys[..., :-1, :].contiguous(), values[..., :-1, :].contiguous()
        return Chunks(*content, landmarks=keys[..., -1, :])

    def _retrieve(self, query: Tensor, chunks: Chunks, places: Places) -> tuple[Tensor, Tensor]:
        """What each query finds in its k chunks: (B, P, H, k) scores, (B, P, H, k, D) outputs."""
        batch, count, heads, width = query.shape
        number = chunks.landmarks.shape[2]
        if number == 0:
            none = query.new_empty(batch, count, heads, 0)
            return none.to(sum_dtype(query)), none[..., None].expand(-1, -1, -1, -1, width)
        # The most that one position may need: its scores, or all chunks for itself alone.
        each = batch * heads * max(number, self.topk * self.chunk_size * width)
        limit = _NUMBERS if query.device.type == "cpu" else _ACCELERATOR_NUMBERS
        parts = [
            self._retrieve_part(part, chunks, limits, places.slot_rotary)
            for part, limits in zip(
                query.split(max(limit // each, 1), dim=1),
                places.num_candidates.split(max(limit // each, 1)),
                strict=True,
            )
        ]
        scores, found = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        return scores, found

    def _retrieve_part(
        self, query: Tensor, chunks: Chunks, limits: Tensor, slots: Rotary
    ) -> tuple[Tensor, Tensor]:
        """`_retrieve` for some of the positions."""
        first = Rotary(slots.cos[0], slots.sin[0])
        scores, indices = search_landmarks(
            rotate(query, first), chunks.landmarks, limits, topk=self.topk
        )
        # Fewer chunks than places stand in the last ones, right before the window.
        last = Rotary(*(x[self.topk - indices.shape[-1] :] for x in slots))
        turned = rotate(query.unsqueeze(-2), last)
        return scores, attend_to_chunks(turned, indices, chunks.keys, chunks.values)

    def _see_window(
        self, query: Tensor, recent: KeyValues, scores: Tensor, places: Places
    ) -> tuple[Tensor, Tensor]:
        """The outer softmax.

        Args:
            query: (B, P, H, D), not rotated.
            recent: (B, n, G, D) keys, not rotated, and values; the last P are those of the queries.
            scores: (B, P, H, k) of retrieved landmarks.
            places: of the segment.

        Returns:
            (B, P, H, D) what the window adds, and (B, P, H, k) weights of the retrieved chunks.
        """
        count, kv_heads = query.shape[1], recent.keys.shape[2]
        own = Rotary(*(x[-count:] for x in places.window_rotary))
        queries = self._query_blocks(rotate(query, own), kv_heads)
        keys = self._key_blocks(rotate(recent.keys, places.window_rotary), count)
        values = self._key_blocks(recent.values, count)
        # (B, NQ, G, R, Q, N)
        products = (queries.flatten(3, 4) @ keys.mT * self.head_dim**-0.5).view(
            *queries.shape[:-1], keys.shape[-2]
        )
        products = products.to(scores.dtype)
        seen = products.masked_fill(~places.visible[:, None, None], float("-inf"))
        landmarks = self._query_blocks(scores, kv_heads)
        probs = torch.cat([seen, landmarks], dim=-1).softmax(-1)
        inner, weights = probs.split([seen.shape[-1], landmarks.shape[-1]], dim=-1)
        out = inner.flatten(3, 4).to(values.dtype) @ values
        out = out.view(*queries.shape[:-1], self.head_dim)
        return _from_blocks(out, count), _from_blocks(weights, count)

    def _query_blocks(self, x: Tensor, kv_heads: int) -> Tensor:
        """(B, P, H, d) to (B, NQ, G, R, Q, d), zeros where the last block is not filled."""
        size, num_blocks, _ = _blocks(self.window, x.shape[1])
        padded = F.pad(x, (0, 0, 0, 0, 0, num_blocks * size - x.shape[1]))
        split = padded.unflatten(2, (kv_heads, -1)).unflatten(1, (num_blocks, size))
        return split.permute(0, 1, 3, 4, 2, 5)

    def _key_blocks(self, x: Tensor, count: int) -> Tensor:
        """(B, n, G, D) to (B, NQ, G, N, D): what each block of the last `count` may see."""
        size, num_blocks, before = _blocks(self.window, count)
        reached = x[:, max(x.shape[1] - count - before, 0) :]
        left = before + count - reached.shape[1]
        padded = F.pad(reached, (0, 0, 0, 0, left, num_blocks * size - count))
        if num_blocks == 1:
            return padded[:, None].transpose(2, 3)
        cut = padded.unflatten(1, (-1, size)).transpose(2, 3)
        shifts = range(before // size + 1)
        return torch.cat([cut[:, shift : shift + num_blocks] for shift in shifts], dim=3)


def _from_blocks(x: Tensor, count: int) -> Tensor:
    """(B, NQ, G, R, Q, d) to (B, P, H, d)."""
    return x.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :count]


class LandmarkLayer(GradientCheckpointingLayer):
    """A decoder layer."""

    def __init__(self, config: LandmarkAttentionConfig, number: int) -> None:
        super().__init__()
        self.input_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LandmarkAttention(config, keeps_chunks=number > 0)
        self.post_attention_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DRTMLP(config)

    def forward(
        self, hidden: Tensor, places: Places, held: Held | None
    ) -> tuple[Tensor, Held | None]:
        """(B, P, E) -> (B, P, E); and what to hold now, where anything is held."""
        out, held = self.self_attn(self.input_layernorm(hidden), places, held)
        hidden = hidden + out
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), held


class LandmarkAttentionModel(BaselineModel):
    """Layers of landmark attention over content and landmarks."""

    config: LandmarkAttentionConfig
    config_class = LandmarkAttentionConfig
    _no_split_modules = ["LandmarkLayer"]  # noqa: RUF012

    def __init__(self, config: LandmarkAttentionConfig) -> None:
        super().__init__(config)
        self.landmark = nn.Parameter(torch.empty(config.hidden_size))
        self.layers.extend(
            LandmarkLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.rules = ChunkRules(chunk_size=config.chunk_size, landmark_starts_block=True)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LandmarkAttentionModel):
            init.normal_(module.landmark, mean=0.0, std=self.config.initializer_range)

    def forward(self, input_ids: Tensor, state: BaselineState | None) -> Tensor:
        """See `BaselineModel`; the last token of a chunk leaves its prediction to the landmark."""
        embeddings = self.embed_tokens(input_ids)
        read = 0 if state is None else state.num_tokens
        layout = self._layout(read, embeddings)
        hidden = layout.to_positions(embeddings, self.landmark.to(embeddings.dtype))
        first = layout.first_positions[0]
        places = make_places(self.config, first, layout.num_positions, hidden.device)
        for number, layer in enumerate(self.layers):
            held = None if state is None else state.held[number]
            if state is not None and held is None:
                held = layer.self_attn.nothing_held(hidden)  # type: ignore[union-attr, operator]
            hidden, held = layer(hidden, places, held)
            if state is not None:
                state.held[number] = held
        if state is not None:
            state.num_tokens += input_ids.shape[1]
        return layout.take_predictions(hidden, slice(None))

    def _layout(self, read: int, embeddings: Tensor) -> SegmentLayout:
        """Where landmarks go among (B, T, E) tokens, after `read` of them."""
        size = self.config.chunk_size
        cursor = Cursor(tokens=read, chunks=read // size, opened=read % size)
        batch, length = embeddings.shape[:2]
        layout, _ = plan_segment(
            [cursor] * batch, length, rules=self.rules, marks=Marks(), device=embeddings.device
        )
        return layout


class LandmarkAttentionForCausalLM(BaselineForCausalLM):
    """Landmark Attention with a language-model head."""

    config: LandmarkAttentionConfig
    config_class = LandmarkAttentionConfig
    model_class = LandmarkAttentionModel
    _no_split_modules = ["LandmarkLayer"]  # noqa: RUF012
