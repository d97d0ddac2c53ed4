"""The Block-Recurrent Transformer (Hutchins et al., arXiv 2203.07852), top to bottom.

A sliding-window transformer in which one layer is recurrent: it cuts the row into blocks of W
tokens and carries N_s state vectors from block to block. With tokens x and states s of a block,

    vertical:    a = x + W_o [window attention of x ; attention of x to s]
                 x' = a + FFN(norm(a))
    horizontal:  z = W_z [attention of s to s ; attention of s to the block's tokens] + b_z
                 s' = g * s + (1 - g) * z,   g = sigmoid(b_g)

The tokens of a block see the state that all blocks before it have made. This is the paper's "fixed"
gate, a learned bias that does not depend on the input, in its "skip" configuration, in which the
states have no feed-forward layer: the variant that the paper reports as its best. As there, states
and tokens have one set of keys and values each, read by both directions, and four sets of queries;
states are told apart by learned ids, added to them, normed, before they are read.

Departures, where the authors' code (google-research/meliad) is meant: RMSNorm, SwiGLU and rotary
positions (or ALiBi) in the window, as in the other models here, for its MLP and relative bias;
attention to and from states knows no positions, as there, but keys and queries are not normed. The
states, their ids and the gate's bias start as there, with standard deviations of 0.1, 1 and 0.1
(the paper's constants +1 and -1 are those of its LSTM gate, which is not this one). Gradients go
through all blocks of a row; there a row is 4,096 tokens and goes on from the states and the window
of the one before, without gradient.
"""

# No annotations from __future__: `strict` checks the types of fields, and no text is a type.
from typing import Any, Literal, NamedTuple

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
from drt.configuration import DecoderConfig
from drt.layers import (
    DRTMLP,
    DRTAttention,
    DRTRMSNorm,
    Rotary,
    alibi_slopes,
    rotary_factors,
    rotate,
)
from drt.ops.window import sliding_window_attention


@strict
class BlockRecurrentConfig(DecoderConfig):
    """Configuration of `BlockRecurrentForCausalLM`; `sliding_window` is also the block size W.

    Raises:
        ValueError: a size is out of range, heads do not divide, or a key is unknown.
    """

    model_type = "block_recurrent"

    position_embedding: Literal["rope", "alibi"] = "rope"
    """Positional scheme of window attention."""
    num_state_vectors: int = 512
    """State vectors that are carried from block to block."""
    recurrent_layer: int | None = None
    """Number of the recurrent layer, from 0; None = 3/4 of the depth, the paper's tenth of 12."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.recurrent_layer is None:
            self.recurrent_layer = 3 * self.num_hidden_layers // 4
        super().__post_init__(**kwargs)
        if not 0 <= self.recurrent_layer < self.num_hidden_layers:
            raise ValueError(
                f"recurrent_layer must be from 0 to num_hidden_layers - 1 = "
                f"{self.num_hidden_layers - 1}, got {self.recurrent_layer}"
            )

    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "num_state_vectors")


class Held(NamedTuple):
    """What the recurrent layer carries from one forward to the next."""

    keys: Tensor
    """(B, n, G, D) of the last W - 1 positions, with rotary positions."""
    values: Tensor
    """(B, n, G, D)."""
    open_keys: Tensor
    """(B, o, G, D) of the open block's tokens, without positions."""
    open_values: Tensor
    """(B, o, G, D)."""
    states: Tensor | None
    """(B, N_s, E) after the last full block; None before anything was read."""


class WindowAttention(DRTAttention):
    """Causal self-attention to the last W positions."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__(config)
        self.window = config.sliding_window
        self.num_heads = config.num_attention_heads
        self.uses_alibi = config.position_embedding == "alibi"

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, held: KeyValues | None
    ) -> tuple[Tensor, KeyValues | None]:
        """(B, T, H, D) of (B, T, G, D) keys and those held before; and what to hold now."""
        joined = KeyValues(key, value) if held is None else held.extended(key, value)
        slopes = alibi_slopes(self.num_heads, query.device) if self.uses_alibi else None
        out = sliding_window_attention(query, *joined, window=self.window, alibi_slopes=slopes)
        return out, None if held is None else joined.last(self.window - 1)

    def forward(
        self, hidden: Tensor, rotary: Rotary | None, held: KeyValues | None
    ) -> tuple[Tensor, KeyValues | None]:
        """(B, T, E) -> (B, T, E); and what to hold now, where anything is held."""
        out, held = self.attend(*self.project(hidden, rotary), held)
        return self.o_proj(out.flatten(-2)), held


class WindowLayer(GradientCheckpointingLayer):
    """A plain decoder layer."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        self.input_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = WindowAttention(config)
        self.post_attention_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DRTMLP(config)

    def forward(
        self, hidden: Tensor, rotary: Rotary | None, first: int, held: KeyValues | None
    ) -> tuple[Tensor, KeyValues | None]:
        """(B, T, E) -> (B, T, E); the arguments are those of `RecurrentLayer`."""
        out, held = self.self_attn(self.input_layernorm(hidden), rotary, held)
        hidden = hidden + out
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), held

    def nothing_held(self, like: Tensor) -> KeyValues:
        """What is held before anything was read."""
        return KeyValues(*_no_positions(self.self_attn, like))


class StateVectors(nn.Module):
    """The horizontal direction: states attend to themselves and to a block, and pass a gate."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.head_dim = config.head_dim
        size, count = config.hidden_size, config.num_state_vectors
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.initial = nn.Parameter(torch.empty(count, size))
        self.ids = nn.Parameter(torch.empty(count, size))
        self.layernorm = DRTRMSNorm(size, config.rms_norm_eps)
        self.q_proj = nn.Linear(size, queries, bias=False)
        self.cross_q_proj = nn.Linear(size, queries, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, keys, bias=False)
        self.o_proj = nn.Linear(2 * queries, size, bias=True)
        self.gate_bias = nn.Parameter(torch.empty(size))

    def read(self, states: Tensor) -> Tensor:
        """(B, N_s, E) states as keys, values and queries are made of them."""
        return self.layernorm(states) + self.ids

    def keys_and_values(self, read: Tensor) -> KeyValues:
        """(B, N_s, G, D) each, for tokens and for the states themselves."""
        heads = (-1, self.head_dim)
        return KeyValues(
            self.k_proj(read).unflatten(-1, heads), self.v_proj(read).unflatten(-1, heads)
        )

    def advance(self, states: Tensor, read: Tensor, own: KeyValues, block: KeyValues) -> Tensor:
        """(B, N_s, E) states after a block of W tokens."""
        heads = (-1, self.head_dim)
        of_states = _attend(self.q_proj(read).unflatten(-1, heads), own)
        of_tokens = _attend(self.cross_q_proj(read).unflatten(-1, heads), block)
        update = self.o_proj(torch.cat([of_states, of_tokens], dim=-1))
        gate = self.gate_bias.sigmoid()
        return gate * states + (1 - gate) * update


class RecurrentLayer(GradientCheckpointingLayer):
    """A decoder layer whose tokens also attend to states, which it carries over blocks."""

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        queries = config.num_attention_heads * config.head_dim
        self.block_size = config.sliding_window
        self.input_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = WindowAttention(config)
        # It takes what two attentions found.
        self.self_attn.o_proj = nn.Linear(2 * queries, config.hidden_size, bias=False)
        self.cross_q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.states = StateVectors(config)
        self.post_attention_layernorm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DRTMLP(config)

    def forward(
        self, hidden: Tensor, rotary: Rotary | None, first: int, held: Held | None
    ) -> tuple[Tensor, Held | None]:
        """Read a segment.

        Args:
            hidden: (B, T, E).
            rotary: factors of its positions, or None.
            first: tokens read before, which say where blocks end.
            held: what was read before; None = nothing was, and nothing is kept.

        Returns:
            (B, T, E), and what to hold now.
        """
        normed = self.input_layernorm(hidden)
        query, key, value = self.self_attn.project(normed, None)
        turned = (query, key) if rotary is None else (rotate(query, rotary), rotate(key, rotary))
        window = None if held is None else KeyValues(held.keys, held.values)
        out, window = self.self_attn.attend(*turned, value, window)
        tokens = KeyValues(key, value)
        if held is not None:
            tokens = KeyValues(held.open_keys, held.open_values).extended(key, value)
        states, seen = self._carry(tokens, held)
        from_states = self._attend_to_states(normed, seen, first % self.block_size)
        hidden = hidden + self.self_attn.o_proj(torch.cat([out.flatten(-2), from_states], dim=-1))
        if window is not None:
            opened = tokens.last(tokens.keys.shape[1] % self.block_size)
            held = Held(*window, *opened, states)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), held

    def _carry(self, tokens: KeyValues, held: Held | None) -> tuple[Tensor, KeyValues]:
        """Carry the states over the blocks of n tokens, the first of which begins a block.

        Returns:
            (B, N_s, E) states after the last full block, or before it if they are not kept; and
            the (B, NB, N_s, G, D) keys and values of the states that each block sees.
        """
        batch, length, size = tokens.keys.shape[0], tokens.keys.shape[1], self.block_size
        states = None if held is None else held.states
        if states is None:
            states = self.states.initial.expand(batch, -1, -1)
        seen: list[KeyValues] = []
        for begin in range(0, length, size):
            read = self.states.read(states)
            own = self.states.keys_and_values(read)
            seen.append(own)
            end = begin + size
            # The state after the row's last block is for those who go on.
            if end < length or (end == length and held is not None):
                block = KeyValues(*(x[:, begin:end] for x in tokens))
                states = self.states.advance(states, read, own, block)
        return states, KeyValues(*(torch.stack(x, dim=1) for x in zip(*seen, strict=True)))

    def _attend_to_states(self, normed: Tensor, seen: KeyValues, offset: int) -> Tensor:
        """(B, T, E) tokens, of which `offset` of their block came before, -> (B, T, H * D)."""
        batch, length, size = normed.shape[0], normed.shape[1], self.block_size
        count = seen.keys.shape[1]
        query = self.cross_q_proj(normed)
        if count > 1:
            query = F.pad(query, (0, 0, offset, count * size - offset - length))
        else:
            offset = 0
        heads = (-1, self.states.head_dim)
        query = query.view(batch * count, -1, query.shape[-1]).unflatten(-1, heads)
        out = _attend(query, KeyValues(*(x.flatten(0, 1) for x in seen)))
        return out.view(batch, -1, out.shape[-1])[:, offset : offset + length]

    def nothing_held(self, like: Tensor) -> Held:
        """What is held before anything was read."""
        none = _no_positions(self.self_attn, like)
        return Held(*none, *none, None)


def _attend(query: Tensor, others: KeyValues) -> Tensor:
    """(B, Q, H, D) queries over all of (B, n, G, D) others -> (B, Q, H * D)."""
    key, value = (x.transpose(1, 2).to(query.dtype) for x in others)
    shared = key.shape[1] != query.shape[2]
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, enable_gqa=shared)
    return out.transpose(1, 2).flatten(-2)


def _no_positions(attention: DRTAttention, like: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 0, G, D) keys and values for (B, T, E) inputs."""
    heads = attention.k_proj.out_features // attention.head_dim
    none = like.new_empty(like.shape[0], 0, heads, attention.head_dim)
    return none, none


class BlockRecurrentModel(BaselineModel):
    """Window layers, one of them recurrent."""

    config: BlockRecurrentConfig
    config_class = BlockRecurrentConfig
    _no_split_modules = ["WindowLayer", "RecurrentLayer"]  # noqa: RUF012

    def __init__(self, config: BlockRecurrentConfig) -> None:
        super().__init__(config)
        self.layers.extend(
            RecurrentLayer(config) if number == config.recurrent_layer else WindowLayer(config)
            for number in range(config.num_hidden_layers)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StateVectors):
            init.normal_(module.initial, mean=0.0, std=0.1)
            # As large as what the norm lets through.
            init.normal_(module.ids, mean=0.0, std=1.0)
            init.normal_(module.gate_bias, mean=0.0, std=0.1)

    def forward(self, input_ids: Tensor, state: BaselineState | None) -> Tensor:
        """See `BaselineModel`."""
        hidden = self.embed_tokens(input_ids)
        first = 0 if state is None else state.num_tokens
        rotary = None
        if self.config.position_embedding == "rope":
            rotary = rotary_factors(
                first,
                input_ids.shape[1],
                config=self.config,
                device=hidden.device,
            )
        for number, layer in enumerate(self.layers):
            held = None if state is None else state.held[number]
            if state is not None and held is None:
                held = layer.nothing_held(hidden)  # type: ignore[operator]
            hidden, held = layer(hidden, rotary, first, held)
            if state is not None:
                state.held[number] = held
        if state is not None:
            state.num_tokens += input_ids.shape[1]
        return hidden


class BlockRecurrentForCausalLM(BaselineForCausalLM):
    """The Block-Recurrent Transformer with a language-model head."""

    config: BlockRecurrentConfig
    config_class = BlockRecurrentConfig
    model_class = BlockRecurrentModel
    _no_split_modules = ["WindowLayer", "RecurrentLayer"]  # noqa: RUF012
