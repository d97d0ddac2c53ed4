"""The Block-Recurrent Transformer, against a computation of one token at a time in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from drt.baselines import BlockRecurrentConfig, BlockRecurrentForCausalLM


def make_model(**changes: Any) -> BlockRecurrentForCausalLM:
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 7,
        "num_state_vectors": 5,
        "recurrent_layer": 1,
        "initializer_range": 0.2,
    }
    config = BlockRecurrentConfig(**{**fields, **changes})
    model = BlockRecurrentForCausalLM(config).double().eval()
    # Gates of different widths.
    torch.nn.init.normal_(model.model.layers[config.recurrent_layer].states.gate_bias)
    return model


class OneByOne:
    """The model's logits, one token and head at a time."""

    def __init__(self, model: BlockRecurrentForCausalLM, plain: SimpleNamespace) -> None:
        self.model, self.plain, self.config = model, plain, model.config
        self.shared = self.config.num_attention_heads // self.config.num_key_value_heads

    def heads(self, x: Tensor) -> Tensor:
        return x.view(-1, self.config.head_dim)

    def attend(
        self, query: Tensor, keys: list[Tensor], values: list[Tensor], p: int | None = None
    ) -> Tensor:
        """(H * D,) of (H, D) queries over (G, D) keys; those of the last positions up to p."""
        out = []
        for h, q in enumerate(query):
            scores = []
            for back, key in enumerate(reversed(keys)):
                k = key[h // self.shared]
                bias = 0.0
                if p is not None and self.config.position_embedding == "rope":
                    k = self.plain.turned(k, -back, self.config.rope_theta)
                elif p is not None:
                    bias = -back * 2.0 ** (-8.0 * (h + 1) / self.config.num_attention_heads)
                scores.append(q @ k / self.config.head_dim**0.5 + bias)
            probs = torch.stack(scores[::-1]).softmax(0)
            out.append(sum(w * v[h // self.shared] for w, v in zip(probs, values, strict=True)))
        return torch.cat(out)

    def layer(self, number: int, rows: list[Tensor]) -> list[Tensor]:
        part = self.plain.layer_weights(self.model, number)
        eps, window = self.config.rms_norm_eps, self.config.sliding_window
        normed = [self.plain.norm(row, part["input_layernorm.weight"], eps) for row in rows]
        q, k, v = (
            [self.heads(part[f"self_attn.{name}_proj.weight"] @ x) for x in normed]
            for name in "qkv"
        )
        recurrent = number == self.config.recurrent_layer
        states = list(part["states.initial"]) if recurrent else []
        out = []
        for p, row in enumerate(rows):
            first = max(p - window + 1, 0)
            found = self.attend(q[p], k[first : p + 1], v[first : p + 1], p)
            if recurrent:
                cross = self.heads(part["cross_q_proj.weight"] @ normed[p])
                read = self.read(states, part)
                found = torch.cat([found, self.attend(cross, *self.keys_and_values(read, part))])
            row = row + part["self_attn.o_proj.weight"] @ found
            out.append(self.plain.feed_forward(row, part, eps))
            if recurrent and p % window == window - 1:
                block = slice(p - window + 1, p + 1)
                states = self.advance(states, k[block], v[block], part)
        return out

    def read(self, states: list[Tensor], part: dict[str, Tensor]) -> list[Tensor]:
        gain, eps = part["states.layernorm.weight"], self.config.rms_norm_eps
        return [
            self.plain.norm(s, gain, eps) + i
            for s, i in zip(states, part["states.ids"], strict=True)
        ]

    def keys_and_values(
        self, read: list[Tensor], part: dict[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        keys, values = (
            [self.heads(part[f"states.{name}_proj.weight"] @ s) for s in read] for name in "kv"
        )
        return keys, values

    def advance(
        self, states: list[Tensor], k: list[Tensor], v: list[Tensor], part: dict[str, Tensor]
    ) -> list[Tensor]:
        read = self.read(states, part)
        keys, values = self.keys_and_values(read, part)
        gate = part["states.gate_bias"].sigmoid()
        out = []
        for state, s in zip(states, read, strict=True):
            own = self.attend(self.heads(part["states.q_proj.weight"] @ s), keys, values)
            tokens = self.attend(self.heads(part["states.cross_q_proj.weight"] @ s), k, v)
            z = part["states.o_proj.weight"] @ torch.cat([own, tokens]) + part["states.o_proj.bias"]
            out.append(gate * state + (1 - gate) * z)
        return out

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(T, V) of one row."""
        embedding, eps = self.model.model.embed_tokens.weight, self.config.rms_norm_eps
        rows = [embedding[token] for token in ids]
        for number in range(self.config.num_hidden_layers):
            rows = self.layer(number, rows)
        gain = self.model.model.norm.weight
        return torch.stack([self.plain.norm(row, gain, eps) for row in rows]) @ embedding.T


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (31, {}),
        # Blocks that end with the row, and a row within a block.
        (21, {}),
        (6, {}),
        (23, {"position_embedding": "alibi"}),
        (12, {"sliding_window": 1}),
    ],
)
def test_logits_are_those_of_one_token_at_a_time(
    length: int, changes: dict[str, Any], plain: SimpleNamespace
) -> None:
    model = make_model(**changes)
    ids = torch.randint(61, (2, length))
    got = model(ids).logits[1]
    wanted = OneByOne(model, plain).logits(ids[1].tolist())
    # Both are float64, but for the model's rotary factors, which are rounded to float32.
    assert (got - wanted).abs().max() < 1e-5


def test_what_left_every_window_is_remembered_by_the_states() -> None:
    model = make_model()
    ids = torch.randint(61, (1, 100))
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 1) % 61
    # Three layers of windows reach 3 * 6 tokens back.
    assert not torch.equal(model(ids).logits[0, -1], model(other).logits[0, -1])


def test_gradients_go_through_all_blocks() -> None:
    model = make_model()
    embeddings: list[Tensor] = []

    def keep(module: Any, args: Any, out: Tensor) -> None:
        out.retain_grad()
        embeddings.append(out)

    model.model.embed_tokens.register_forward_hook(keep)
    model(torch.randint(61, (1, 70))).logits[0, -1].sum().backward()
    assert embeddings[0].grad is not None
    assert embeddings[0].grad[0].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize("number", [-1, 3])
def test_a_recurrent_layer_that_is_none_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"recurrent_layer must be from 0 .* = 2, got {number}"):
        make_model(recurrent_layer=number)
