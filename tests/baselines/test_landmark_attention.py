"""Landmark Attention, against a computation of one position and head at a time in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drt.baselines import LandmarkAttentionConfig, LandmarkAttentionForCausalLM


def make_config(**changes: Any) -> LandmarkAttentionConfig:
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 11,
        "chunk_size": 6,
        "retrieval_topk": 2,
        "initializer_range": 0.2,
    }
    return LandmarkAttentionConfig(**{**fields, **changes})


def make_model(**changes: Any) -> LandmarkAttentionForCausalLM:
    return LandmarkAttentionForCausalLM(make_config(**changes)).double().eval()


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, position: int, theta: float) -> Tensor:
    """(D,) rotated to a position, pair by pair, as complex numbers."""
    half = x.shape[0] // 2
    pairs = torch.complex(x[:half], x[half:])
    angle = torch.tensor([position * theta ** (-i / half) for i in range(half)]).double()
    pairs = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag])


def attend_from(
    p: int,
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    config: LandmarkAttentionConfig,
    retrieves: bool,
) -> Tensor:
    """What one head of position p finds: (D,)."""
    size, window, topk = config.chunk_size, config.sliding_window, config.retrieval_topk
    width, theta, scale = size + 1, config.rope_theta, q.shape[0] ** -0.5
    seen = [j for j in range(max(p - window + 1, 0), p + 1) if j == p or j % width != size]
    outer = [float(q @ turned(keys[j], j - p, theta)) * scale for j in seen]
    candidates = [c for c in range(p // width) if retrieves and c * width <= p - window]

    def landmark(c: int) -> float:
        # The landmark of a chunk in the first of the K places before the window.
        distance = window - 1 + topk * width - size
        return float(q @ turned(keys[c * width + size], -distance, theta)) * scale

    best = sorted(sorted(candidates, key=landmark, reverse=True)[:topk])
    outer += [landmark(c) for c in best]
    total = sum(math.exp(a) for a in outer)
    weights = [math.exp(a) / total for a in outer]
    out = sum(
        (w * values[j] for w, j in zip(weights, seen, strict=False)), torch.zeros_like(values[0])
    )
    for rank, c in enumerate(best):
        begin = window - 1 + (len(best) - rank) * width
        inner = (
            torch.tensor(
                [
                    float(q @ turned(keys[c * width + t], t - begin, theta)) * scale
                    for t in range(size)
                ]
            )
            .double()
            .softmax(0)
        )
        for t in range(size):
            out = out + weights[len(seen) + rank] * inner[t] * values[c * width + t]
    return out


@torch.no_grad()
def reference(model: LandmarkAttentionForCausalLM, ids: list[int]) -> Tensor:
    """(T, V) logits of one row."""
    config, w = model.config, {n: p.double() for n, p in model.named_parameters()}
    size, eps = config.chunk_size, config.rms_norm_eps
    embedding = w["model.embed_tokens.weight"]
    rows, reads = [], []
    for t, token in enumerate(ids):
        rows.append(embedding[token])
        if t % size == size - 1:
            rows.append(w["model.landmark"])
        reads.append(len(rows) - 1)
    heads, shared = config.num_attention_heads, config.num_attention_heads // 2
    for layer in range(config.num_hidden_layers):
        part = {n[len(f"model.layers.{layer}.") :]: p for n, p in w.items() if f".{layer}." in n}
        x = [norm(row, part["input_layernorm.weight"], eps) for row in rows]
        q, k, v = (
            [(part[f"self_attn.{n}_proj.weight"] @ row).view(-1, 8) for row in x] for n in "qkv"
        )
        for p in range(len(rows)):
            found = []
            for head in range(heads):
                keys = [key[head // shared] for key in k]
                values = [value[head // shared] for value in v]
                found.append(attend_from(p, q[p][head], keys, values, config, layer > 0))
            rows[p] = rows[p] + part["self_attn.o_proj.weight"] @ torch.cat(found)
        for p, row in enumerate(rows):
            y = norm(row, part["post_attention_layernorm.weight"], eps)
            gate = part["mlp.gate_proj.weight"] @ y
            inner = gate * gate.sigmoid() * (part["mlp.up_proj.weight"] @ y)
            rows[p] = row + part["mlp.down_proj.weight"] @ inner
    last = torch.stack([norm(rows[p], w["model.norm.weight"], eps) for p in reads])
    return last @ embedding.T


@pytest.mark.parametrize(
    "changes", [{}, {"sliding_window": 3}, {"retrieval_topk": 5}, {"sliding_window": 70}]
)
def test_logits_are_those_of_one_position_at_a_time(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    ids = torch.randint(61, (2, 63))
    got = model(ids).logits
    for row in range(2):
        # Both are float64, but for the model's rotary factors, which are rounded to float32.
        assert (got[row] - reference(model, ids[row].tolist())).abs().max() < 1e-5
