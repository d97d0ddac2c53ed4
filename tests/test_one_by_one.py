"""The whole model, against the method computed one position and head at a time in float64.

`OneByOne` follows docs/method.md from top to bottom: layout, lower layers, chunk encoder,
retrieval, grouped cross-attention, predictions. Of the package it takes only weights and sizes.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from drt import DRTForCausalLM
from drt.testing import tiny_config


class Chunk(NamedTuple):
    """What is remembered of a chunk."""

    landmark: Tensor
    """(L,)."""
    keys: Tensor
    """(S, G, D), of the content tokens."""
    values: Tensor
    """(S, G, D)."""


Weights = dict[int, Tensor]
"""Of a retrieval: chunk number to weight, best first."""


class OneByOne:
    """The logits of one row, and what its landmarks retrieve."""

    def __init__(self, model: DRTForCausalLM) -> None:
        self.config: Any = model.config
        self.weights = {
            name.removeprefix("model."): weight for name, weight in model.named_parameters()
        }

    # Arithmetic of any decoder.

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = x.pow(2).mean()
        return x / (mean_square + self.config.rms_norm_eps).sqrt() * self.weights[f"{name}.weight"]

    def heads(self, x: Tensor, name: str) -> Tensor:
        """(E,) -> (heads, D)."""
        return (self.weights[f"{name}.weight"] @ x).view(-1, self.config.head_dim)

    def turned(self, x: Tensor, position: int) -> Tensor:
        """(heads, D) rotated to a position; the halves of D are real and imaginary parts."""
        half = self.config.head_dim // 2
        frequency = self.config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = position * frequency
        # The model keeps its rotary factors in float32.
        turn = torch.complex(angle.cos().float().double(), angle.sin().float().double())
        pairs = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat([pairs.real, pairs.imag], dim=1)

    def feed_forward(self, x: Tensor, layer: str) -> Tensor:
        """FFN(norm(x)), SwiGLU."""
        y = self.norm(x, f"{layer}.post_attention_layernorm")
        gate = self.weights[f"{layer}.mlp.gate_proj.weight"] @ y
        inner = gate / (1 + (-gate).exp()) * (self.weights[f"{layer}.mlp.up_proj.weight"] @ y)
        return self.weights[f"{layer}.mlp.down_proj.weight"] @ inner

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, *, b: int = 0, alibi: bool = False
    ) -> Tensor:
        """(H, D) what a query (H, D) finds among n keys and values (n, G, D).

        Args:
            query: of all heads, which share keys and values H / G at a time.
            keys: the last one is at the position of the query if there is ALiBi.
            values: of the keys.
            b: is added to the denominator of the softmax.
            alibi: scores fall by 2^(-8 h / H), h = 1 .. H, for each position of distance.
        """
        num_heads, shared = len(query), len(query) // keys.shape[1]
        out = []
        for h, q in enumerate(query):
            scores = keys[:, h // shared] @ q / math.sqrt(len(q))
            if alibi:
                distances = torch.arange(len(keys) - 1, -1, -1)
                scores = scores - distances * 2 ** (-8 * (h + 1) / num_heads)
            p = scores.exp() / (b + scores.exp().sum())
            out.append(p @ values[:, h // shared])
        return torch.stack(out)

    def self_attention(
        self,
        rows: list[Tensor],
        layer: str,
        *,
        seen: Callable[[int], slice],
        rope: bool,
        alibi: bool,
    ) -> list[Tensor]:
        """SA(norm(h)) of each of the rows (E,); row p sees the rows `seen(p)`."""
        normed = [self.norm(row, f"{layer}.input_layernorm") for row in rows]
        q, k, v = ([self.heads(x, f"{layer}.self_attn.{n}_proj") for x in normed] for n in "qkv")
        if rope:
            q, k = ([self.turned(x, p) for p, x in enumerate(some)] for some in (q, k))
        keys, values = torch.stack(k), torch.stack(v)
        found = [
            self.attend(query, keys[seen(p)], values[seen(p)], alibi=alibi)
            for p, query in enumerate(q)
        ]
        return [self.weights[f"{layer}.self_attn.o_proj.weight"] @ x.flatten() for x in found]

    # Layout.

    def lay_out(self, ids: list[int], ends: set[int]) -> None:
        """Insert landmarks: after S tokens, or earlier after the tokens in `ends`."""
        self.rows: list[Tensor] = []
        # The positions of each closed chunk, its landmark the last.
        self.chunks: list[list[int]] = []
        # Where what follows each token is predicted.
        self.places: list[int] = []
        opened: list[int] = []
        for t, token in enumerate(ids):
            opened.append(len(self.rows))
            self.places.append(len(self.rows))
            self.rows.append(self.weights["embed_tokens.weight"][token])
            if len(opened) == self.config.chunk_size or t in ends:
                if self.config.retrieval_onset == "landmark":
                    self.places[-1] = len(self.rows)
                opened.append(len(self.rows))
                self.rows.append(self.weights["landmark"])
                self.chunks.append(opened)
                opened = []

    # Forward.

    def window_attention(self, rows: list[Tensor], layer: str) -> list[Tensor]:
        """SWA(norm(h)): each position sees the last W, itself included, landmarks too."""
        return self.self_attention(
            rows,
            layer,
            seen=lambda p: slice(max(p + 1 - self.config.sliding_window, 0), p + 1),
            rope=self.config.position_embedding == "rope",
            alibi=self.config.position_embedding == "alibi",
        )

    def lower_layer(self, rows: list[Tensor], layer: str) -> list[Tensor]:
        found = self.window_attention(rows, layer)
        rows = [h + x for h, x in zip(rows, found, strict=True)]
        return [h + self.feed_forward(h, layer) for h in rows]

    def encode(self, rows: list[Tensor]) -> Chunk:
        """A chunk's rows, bidirectional, at the positions 0 .. S."""
        rows = [self.norm(row, "chunk_encoder.input_layernorm") for row in rows]
        for number in range(self.config.num_encoder_layers):
            layer = f"chunk_encoder.layers.{number}"
            found = self.self_attention(
                rows, layer, seen=lambda _: slice(None), rope=True, alibi=False
            )
            rows = [h + x for h, x in zip(rows, found, strict=True)]
            rows = [h + self.feed_forward(h, layer) for h in rows]
        *content, landmark = [self.norm(row, "chunk_encoder.norm") for row in rows]
        if self.config.landmark_size is not None:
            landmark = self.weights["chunk_encoder.landmark_proj.weight"] @ landmark
        keys = torch.stack([self.heads(x, "chunk_encoder.k_proj") for x in content])
        values = torch.stack([self.heads(x, "chunk_encoder.v_proj") for x in content])
        return Chunk(landmark, keys, values)

    def retrieve(self, c: int, group: int, rows: list[Tensor], memory: list[Chunk]) -> Weights:
        """What landmark c retrieves."""
        place = self.chunks[c][-1]
        query = self.norm(rows[place], f"query_norms.{group}")
        if self.config.landmark_size is not None:
            query = self.weights[f"query_projs.{group}.weight"] @ query
        candidates = list(range(c))
        if self.config.exclude_window_chunks:
            window = range(place + 1 - self.config.sliding_window, place + 1)
            candidates = [j for j in candidates if not set(self.chunks[j]) <= set(window)]
        scores = {j: query @ memory[j].landmark / math.sqrt(len(query)) for j in candidates}
        best = sorted(scores, key=lambda j: -scores[j].item())[: self.config.retrieval_topk]
        return {j: scores[j].exp() / sum(scores[i].exp() for i in best) for j in best}

    def retrieval_at(self, p: int, retrievals: list[Weights]) -> Weights:
        """That of the last landmark before p, or of p itself if the onset is the landmark."""
        latest = p if self.config.retrieval_onset == "landmark" else p - 1
        closed = [c for c, chunk in enumerate(self.chunks) if chunk[-1] <= latest]
        return retrievals[closed[-1]] if closed else {}

    def cross_attention(
        self, a: Tensor, layer: str, retrieval: Weights, memory: list[Chunk]
    ) -> Tensor:
        """GCA(norm(a)): a softmax inside each chunk, the retrieval weights outside; or o = 0."""
        q = self.heads(self.norm(a, f"{layer}.cross_attn_layernorm"), f"{layer}.cross_attn.q_proj")
        out = torch.zeros_like(q)
        for j, w in retrieval.items():
            _, keys, values = memory[j]
            b = 1 if self.config.softmax_plus_one else 0
            out = out + w * self.attend(q, keys, values, b=b)
        return self.weights[f"{layer}.cross_attn.o_proj.weight"] @ out.flatten()

    def upper_layer(
        self, rows: list[Tensor], layer: str, retrievals: list[Weights], memory: list[Chunk]
    ) -> list[Tensor]:
        out = []
        for p, found in enumerate(self.window_attention(rows, layer)):
            a = rows[p] + found
            o = self.cross_attention(a, layer, self.retrieval_at(p, retrievals), memory)
            out.append(a + self.feed_forward(a + o, layer))
        return out

    def __call__(self, ids: list[int], ends: set[int]) -> tuple[Tensor, list[list[Weights]]]:
        """(T, V) logits, and per group what each landmark retrieved."""
        self.lay_out(ids, ends)
        rows, groups = self.rows, self.config.retrieval_groups
        number = self.config.num_hidden_layers - sum(groups)
        for lower in range(number):
            rows = self.lower_layer(rows, f"layers.{lower}")
        memory = [self.encode([rows[p] for p in chunk]) for chunk in self.chunks]
        retrieved = []
        for group, size in enumerate(groups):
            found = [self.retrieve(c, group, rows, memory) for c in range(len(memory))]
            for upper in range(number, number + size):
                rows = self.upper_layer(rows, f"layers.{upper}", found, memory)
            number += size
            retrieved.append(found)
        # The head is the embedding.
        logits = [self.weights["embed_tokens.weight"] @ self.norm(h, "norm") for h in rows]
        return torch.stack([logits[p] for p in self.places]), retrieved


def make_model(**changes: Any) -> DRTForCausalLM:
    sizes = {"chunk_size": 5, "sliding_window": 8, "retrieval_topk": 2}
    model = DRTForCausalLM(tiny_config(**{**sizes, **changes})).double().eval()
    # Gains that are not 1, and projections of queries and landmarks that are not the same.
    for weight in model.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.3)
    return model


# Seven chunks of five tokens, and three tokens of an open one.
LENGTH = 38
# Both are float64, in another order of summation: they differ by 1e-13 at most.
TOLERANCE = 1e-10


@pytest.mark.parametrize("onset", ["chunk", "landmark"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"position_embedding": "alibi"},
        {"softmax_plus_one": False},
        {"landmark_size": 7},
        {"landmark_size": 7, "num_encoder_layers": 0},
        {"num_encoder_layers": 2, "position_embedding": "alibi"},
        # One group of both upper layers; groups of different sizes.
        {"retrieval_groups": [2]},
        {"retrieval_groups": [2, 1], "softmax_plus_one": False},
        # As many key/value heads as query heads, one only, heads of another width.
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1, "head_dim": 6},
        # More than there are chunks.
        {"retrieval_topk": 9},
        # The window begins with the chunk before the landmark's, and one position later.
        {"exclude_window_chunks": True, "sliding_window": 12},
        {"exclude_window_chunks": True, "sliding_window": 11},
    ],
    ids=lambda changes: ", ".join(f"{k} {v}" for k, v in changes.items()) or "as is",
)
def test_logits_and_retrievals_are_those_of_the_method(changes: dict[str, Any], onset: str) -> None:
    check(make_model(retrieval_onset=onset, **changes), LENGTH, set())


@pytest.mark.parametrize("onset", ["chunk", "landmark"])
@pytest.mark.parametrize(
    ("length", "ends"),
    [
        # The row ends with a chunk, within the second, within the first.
        (35, set()),
        (8, set()),
        (4, set()),
        # Chunks that close early, one of them of a single token, and one that was full anyway.
        (LENGTH, {2, 9, 10, 15, 27, 37}),
    ],
)
def test_rows_of_any_length_and_chunks(onset: str, length: int, ends: set[int]) -> None:
    check(make_model(retrieval_onset=onset), length, ends)


def check(model: DRTForCausalLM, length: int, ends: set[int]) -> None:
    """Compare the second of two rows, in which chunks also close after `ends`."""
    ids = torch.randint(61, (2, length))
    marks = torch.zeros(2, length, dtype=torch.bool)
    marks[1, list(ends)] = True
    with torch.no_grad():
        got = model(ids, chunk_ends=marks if ends else None, output_retrievals=True)
        logits, retrieved = OneByOne(model)(ids[1].tolist(), ends)
    assert got.logits.dtype == torch.float64
    assert (got.logits[1] - logits).abs().max() < TOLERANCE
    for found, wanted in zip(got.retrievals, retrieved, strict=True):
        assert found.indices.shape[1] >= len(wanted)
        for c, chosen in enumerate(wanted):
            count = len(chosen)
            assert found.indices[1, c, :count].tolist() == list(chosen)
            assert (found.indices[1, c, count:] == -1).all()
            weights = torch.tensor(list(chosen.values()), dtype=torch.float64)
            assert (found.weights[1, c, :count] - weights).abs().le(TOLERANCE).all()
            assert (found.weights[1, c, count:] == 0).all()


def test_gradients_are_those_of_the_method() -> None:
    """Of all weights, and so of the retriever's, which learns by the next-token loss alone."""
    model = make_model(landmark_size=7)
    # The landmarks of the third chunk and the fourth have a choice, and tokens that use it.
    ids = torch.randint(61, (1, 23))
    names, weights = zip(*model.named_parameters(), strict=True)
    got = torch.autograd.grad(model(ids, labels=ids).loss, weights)
    logits, _ = OneByOne(model)(ids[0].tolist(), set())
    wanted = torch.autograd.grad(F.cross_entropy(logits[:-1], ids[0, 1:]), weights)
    for name, a, b in zip(names, got, wanted, strict=True):
        assert b.abs().max() > 0, name
        assert (a - b).abs().max() < TOLERANCE, name
