"""Landmark Attention, against a computation of one position and head at a time in float64."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from drt.baselines import LandmarkAttentionConfig, LandmarkAttentionForCausalLM
from drt.baselines import landmark_attention as module
from drt.baselines.chunk_attention import attend_to_chunks, search_landmarks


def make_model(**changes: Any) -> LandmarkAttentionForCausalLM:
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
    config = LandmarkAttentionConfig(**{**fields, **changes})
    return LandmarkAttentionForCausalLM(config).double().eval()


class OneByOne:
    """The model's logits, one position and head at a time."""

    def __init__(self, model: LandmarkAttentionForCausalLM, plain: SimpleNamespace) -> None:
        self.model, self.plain, self.config = model, plain, model.config

    def score(self, q: Tensor, k: Tensor, distance: int) -> float:
        """Of a query and a key that many positions before it."""
        turned = self.plain.turned(k, -distance, self.config.rope_theta)
        return float(q @ turned) / math.sqrt(len(q))

    def head(
        self, p: int, q: Tensor, keys: list[Tensor], values: list[Tensor], retrieves: bool
    ) -> Tensor:
        """(D,) what one head of position p finds."""
        size, window, topk = (
            self.config.chunk_size,
            self.config.sliding_window,
            self.config.retrieval_topk,
        )
        width = size + 1
        seen = [j for j in range(p + 1) if p - j < window and (j == p or j % width != size)]
        candidates = [c for c in range(p // width) if retrieves and p - c * width >= window]
        place = window - 1 + topk * width - size
        landmark = {c: self.score(q, keys[c * width + size], place) for c in candidates}
        best = sorted(sorted(candidates, key=lambda c: landmark[c])[-topk:])
        outer = [self.score(q, keys[j], p - j) for j in seen] + [landmark[c] for c in best]
        weights = [math.exp(a) / sum(math.exp(b) for b in outer) for a in outer]
        out = sum(w * values[j] for w, j in zip(weights, seen, strict=False))
        for rank, c in enumerate(best):
            begin = window - 1 + (len(best) - rank) * width
            tokens = range(c * width, c * width + size)
            inner = [math.exp(self.score(q, keys[j], begin - t)) for t, j in enumerate(tokens)]
            for a, j in zip(inner, tokens, strict=True):
                out = out + weights[len(seen) + rank] * a / sum(inner) * values[j]
        assert isinstance(out, Tensor)
        return out

    def layer(self, number: int, rows: list[Tensor]) -> list[Tensor]:
        part = self.plain.layer_weights(self.model, number)
        eps, heads = self.config.rms_norm_eps, self.config.num_attention_heads
        shared = heads // self.config.num_key_value_heads
        normed = [self.plain.norm(row, part["input_layernorm.weight"], eps) for row in rows]
        q, k, v = (
            [(part[f"self_attn.{name}_proj.weight"] @ x).view(-1, self.config.head_dim)
             for x in normed]
            for name in "qkv"
        )  # fmt: skip
        out = []
        for p, row in enumerate(rows):
            found = [
                self.head(
                    p,
                    q[p][h],
                    [x[h // shared] for x in k],
                    [x[h // shared] for x in v],
                    retrieves=number > 0,
                )
                for h in range(heads)
            ]
            row = row + part["self_attn.o_proj.weight"] @ torch.cat(found)
            out.append(self.plain.feed_forward(row, part, eps))
        return out

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        """(T, V) of one row."""
        embedding, size = self.model.model.embed_tokens.weight, self.config.chunk_size
        rows: list[Tensor] = []
        places = []
        for t, token in enumerate(ids):
            rows.append(embedding[token])
            if t % size == size - 1:
                rows.append(self.model.model.landmark)
            places.append(len(rows) - 1)
        for number in range(self.config.num_hidden_layers):
            rows = self.layer(number, rows)
        gain, eps = self.model.model.norm.weight, self.config.rms_norm_eps
        return torch.stack([self.plain.norm(rows[p], gain, eps) for p in places]) @ embedding.T


@pytest.mark.parametrize(
    "changes",
    [
        {},
        # A window narrower than a chunk, wider than the row.
        {"sliding_window": 4},
        {"sliding_window": 90},
        # More places than chunks.
        {"retrieval_topk": 9},
        {"chunk_size": 1},
    ],
)
def test_logits_are_those_of_one_position_at_a_time(
    changes: dict[str, Any], plain: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(**changes)
    # Several blocks of queries; the row is no multiple of them, nor of S.
    monkeypatch.setattr(module, "_QUERIES", 8)
    ids = torch.randint(61, (2, 34))
    got = model(ids).logits[1]
    wanted = OneByOne(model, plain).logits(ids[1].tolist())
    # Both are float64, but for the model's rotary factors, which are rounded to float32.
    assert (got - wanted).abs().max() < 1e-5


def test_parts_of_a_segment_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = make_model(), torch.randint(61, (2, 100))
    whole = model(ids).logits
    monkeypatch.setattr(module, "_NUMBERS", 1)
    # float64 sums in another order.
    assert torch.allclose(model(ids).logits, whole, atol=1e-9)


@pytest.mark.parametrize("popular", [True, False])
def test_each_query_attends_to_its_own_chunk(popular: bool) -> None:
    """However few or many queries want a chunk; with every gradient."""
    query = torch.randn(2, 37, 4, 3, 8, dtype=torch.float64, requires_grad=True)
    key, value = (
        torch.randn(2, 2, 5, 6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    indices = torch.randint(-1, 2 if popular else 5, query.shape[:4])
    grad = torch.randn_like(query)
    grad[indices < 0] = 0
    inputs = (query, key, value)
    out = attend_to_chunks(query, indices, key, value)
    found = torch.autograd.grad(out, inputs, grad)
    keys, values = (x.repeat_interleave(2, dim=1) for x in (key, value))
    row = torch.arange(2)[:, None, None, None]
    head = torch.arange(4)[:, None]
    chosen = indices.clamp_min(0)
    scores = torch.einsum("...d,...sd->...s", query, keys[row, head, chosen]) / 8**0.5
    wanted = torch.einsum("...s,...sd->...d", scores.softmax(-1), values[row, head, chosen])
    assert torch.allclose(out[indices >= 0], wanted[indices >= 0])
    for a, b in zip(found, torch.autograd.grad(wanted, inputs, grad), strict=True):
        assert torch.allclose(a, b)


def test_the_best_candidates_are_found_in_the_order_of_the_text() -> None:
    query = torch.randn(2, 9, 4, 8, dtype=torch.float64)
    landmarks = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    limits = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])
    scores, indices = search_landmarks(query, landmarks, limits, topk=3)
    for b, p, h in torch.cartesian_prod(torch.arange(2), torch.arange(9), torch.arange(4)).tolist():
        all_scores = landmarks[b, h // 2, : limits[p]] @ query[b, p, h] / 8**0.5
        best = all_scores.topk(min(3, int(limits[p]))).indices.sort().values
        missing = 3 - len(best)
        assert indices[b, p, h].tolist() == [-1] * missing + best.tolist()
        assert scores[b, p, h, :missing].isneginf().all()
        assert torch.allclose(scores[b, p, h, missing:], all_scores[best])


@pytest.mark.parametrize("name", ["num_hidden_layers", "sliding_window"])
def test_sizes_that_leave_nothing_to_choose_by_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 2.*got 1"):
        make_model(**{name: 1})
