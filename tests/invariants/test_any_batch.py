"""Padding, the other rows of a batch, early chunk ends, documents: none changes what a row gets."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drt import DeviceMemory, DRTForCausalLM
from drt.testing import tiny_config

# The bound of the specification: float32 logits of order 1 after a few layers.
TOLERANCE = 1e-4

configs = st.fixed_dictionaries(
    {
        "chunk_size": st.integers(1, 20),
        "sliding_window": st.integers(1, 60),
        "retrieval_topk": st.integers(1, 6),
        "retrieval_groups": st.sampled_from([[], [1], [1, 1], [2, 1]]),
        "retrieval_onset": st.sampled_from(["chunk", "landmark"]),
        "position_embedding": st.sampled_from(["rope", "alibi"]),
        "exclude_window_chunks": st.booleans(),
        "landmark_size": st.sampled_from([None, 8]),
    }
)


def make(fields: dict[str, Any]) -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(tiny_config(**fields)).eval()


class Rows:
    """Rows of unequal lengths, their chunk ends and documents, and how columns are cut."""

    def __init__(self, seed: int, *, ends: bool, documents: bool) -> None:
        g = torch.Generator().manual_seed(seed)
        self.lengths = torch.randint(0, 90, (3,), generator=g).tolist()
        self.ids = [torch.randint(0, 61, (1, n), generator=g) for n in self.lengths]
        rate = 0.08 if ends else 0.0
        self.ends = [torch.rand(1, n, generator=g) < rate for n in self.lengths]
        self.documents = [
            (torch.rand(1, n, generator=g) < 0.04).long().cumsum(1) for n in self.lengths
        ]
        self.has_documents = documents
        self.width = max(self.lengths) + int(torch.randint(0, 10, (1,), generator=g))
        # Padding anywhere: each row's content takes these columns.
        self.columns = [
            torch.randperm(self.width, generator=g)[:n].sort().values for n in self.lengths
        ]
        cuts = torch.randint(0, self.width + 1, (4,), generator=g).sort().values.tolist()
        self.pieces = [b - a for a, b in zip([0, *cuts], [*cuts, self.width], strict=True)]

    def padded(self, rows: list[torch.Tensor], fill: float) -> torch.Tensor:
        out = rows[0].new_full((len(rows), self.width), fill)
        for b, row in enumerate(rows):
            out[b, self.columns[b]] = row[0]
        return out

    def marks(self, b: int) -> dict[str, torch.Tensor]:
        marks = {"chunk_ends": self.ends[b]}
        return {**marks, "document_ids": self.documents[b]} if self.has_documents else marks

    def batch(self) -> dict[str, torch.Tensor]:
        ones = [torch.ones_like(row) for row in self.ids]
        batch = {
            "input_ids": self.padded(self.ids, 7),
            "attention_mask": self.padded(ones, 0),
            "chunk_ends": self.padded(self.ends, 0),
        }
        if self.has_documents:
            batch["document_ids"] = self.padded(self.documents, 9)
        return batch


@settings(max_examples=60)
@given(configs, st.integers(0, 10**6), st.booleans(), st.booleans())
@torch.no_grad()
def test_a_row_alone_is_the_row_in_any_padded_batch_in_any_segments(
    fields: dict[str, Any], seed: int, ends: bool, documents: bool
) -> None:
    model, rows = make(fields), Rows(seed, ends=ends, documents=documents)
    batch = rows.batch()
    whole = model(**batch, output_retrievals=True)
    state = model.new_state(3, memory=DeviceMemory(slab_size=3))
    parts = [
        model(**dict(zip(batch, piece, strict=True)), past_key_values=state, output_retrievals=True)
        for piece in zip(*(v.split(rows.pieces, dim=1) for v in batch.values()), strict=True)
    ]
    logits = torch.cat([out.logits for out in parts], dim=1)
    assert state.num_tokens == rows.lengths
    for b, length in enumerate(rows.lengths):
        if not length:
            continue
        alone = model(rows.ids[b], **rows.marks(b), output_retrievals=True)
        for logit in (whole.logits, logits):
            got = logit[b, rows.columns[b]]
            assert (got - alone.logits[0]).abs().max() < TOLERANCE
        for group, retrieval in enumerate(alone.retrievals):
            got = whole.retrievals[group].scores[b, : retrieval.scores.shape[1]]
            # Scores and not indices: ties may be broken either way.
            assert torch.allclose(got, retrieval.scores[0], atol=TOLERANCE)


@settings(max_examples=25)
@given(configs, st.integers(0, 10**6), st.booleans())
@torch.no_grad()
def test_token_by_token_with_chunks_closed_on_the_way(
    fields: dict[str, Any], seed: int, documents: bool
) -> None:
    model, rows = make(fields), Rows(seed, ends=True, documents=documents)
    for b, length in enumerate(rows.lengths):
        marks, state = rows.marks(b), model.new_state(1)
        whole = model(rows.ids[b], **marks).logits
        for t in range(length):
            here = {name: mark[:, t : t + 1] for name, mark in marks.items()}
            out = model(rows.ids[b][:, t : t + 1], past_key_values=state, **here).logits
            assert (out[0, 0] - whole[0, t]).abs().max() < TOLERANCE


@settings(max_examples=25)
@given(configs, st.integers(1, 60), st.integers(1, 60))
@torch.no_grad()
def test_closing_a_chunk_of_the_state_is_an_end_in_the_tokens(
    fields: dict[str, Any], before: int, after: int
) -> None:
    model = make(fields)
    ids = torch.randint(0, 61, (2, before + after))
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[1, before - 1] = True
    whole = model(ids, chunk_ends=ends).logits
    state = model.new_state(2)
    model(ids[:, :before], past_key_values=state)
    state.close_chunk([1])
    state.close_chunk([1])
    model(ids[:, :0], past_key_values=state)
    out = model(ids[:, before:], past_key_values=state).logits
    assert (out - whole[:, before:]).abs().max() < TOLERANCE


@settings(max_examples=25)
@given(configs, st.integers(1, 60), st.integers(1, 60))
@torch.no_grad()
def test_documents_in_one_row_are_as_if_alone(
    fields: dict[str, Any], first: int, second: int
) -> None:
    model = make(fields)
    ids = torch.randint(0, 61, (1, first + second))
    documents = (torch.arange(first + second) >= first).long()[None]
    packed = model(ids, document_ids=documents).logits
    for part in (slice(0, first), slice(first, None)):
        assert (packed[:, part] - model(ids[:, part]).logits).abs().max() < TOLERANCE


@settings(max_examples=25)
@given(configs, st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 300))
@torch.no_grad()
def test_reading_padded_rows_is_exact(
    fields: dict[str, Any], seed: int, segment: int, scale: int
) -> None:
    model = make(fields)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (2, scale), generator=g)
    mask = (torch.rand(2, scale, generator=g) < 0.8).long()
    rest = torch.randint(0, 61, (2, 20), generator=g)
    state = model.new_state(2)
    model.read(ids, state, attention_mask=mask, segment_size=segment)
    got = model(rest, past_key_values=state).logits
    ones = torch.ones_like(rest)
    whole = model(torch.cat([ids, rest], 1), attention_mask=torch.cat([mask, ones], 1)).logits
    assert (got - whole[:, scale:]).abs().max() < TOLERANCE


@torch.no_grad()
def test_rows_of_a_state_are_selected_and_go_on_alone() -> None:
    model = make({})
    ids = torch.randint(0, 61, (3, 90))
    mask = torch.ones_like(ids)
    mask[1, :33] = 0
    state = model.new_state(3)
    model(ids, attention_mask=mask, past_key_values=state)
    state.reorder_cache(torch.tensor([1, 1, 0, 2]))
    rest = torch.randint(0, 61, (4, 50))
    got = torch.cat([model(p, past_key_values=state).logits for p in rest.split([1, 30, 19], 1)], 1)
    for row, (source, skipped) in enumerate([(1, 33), (1, 33), (0, 0), (2, 0)]):
        whole = torch.cat([ids[source, skipped:], rest[row]])[None]
        assert (got[row] - model(whole).logits[0, -50:]).abs().max() < TOLERANCE


@settings(max_examples=25)
@given(configs, st.integers(0, 10**6), st.lists(st.integers(0, 2), min_size=1, max_size=4))
@torch.no_grad()
def test_any_rows_of_a_ragged_state_go_on_alone(
    fields: dict[str, Any], seed: int, chosen: list[int]
) -> None:
    model, rows = make(fields), Rows(seed, ends=True, documents=False)
    state = model.new_state(3)
    model(**rows.batch(), past_key_values=state)
    state.reorder_cache(torch.tensor(chosen))
    rest = torch.randint(0, 61, (len(chosen), 40))
    parts = [model(part, past_key_values=state).logits for part in rest.split([1, 1, 20, 18], 1)]
    got = torch.cat(parts, dim=1)
    for row, source in enumerate(chosen):
        ids = torch.cat([rows.ids[source], rest[row : row + 1]], dim=1)
        ends = torch.cat([rows.ends[source], torch.zeros(1, 40, dtype=torch.bool)], dim=1)
        whole = model(ids, chunk_ends=ends).logits[0, -40:]
        assert (got[row] - whole).abs().max() < TOLERANCE


@settings(max_examples=25)
@given(configs, st.integers(1, 300), st.integers(1, 300), st.integers(0, 300), st.integers(20, 90))
@torch.no_grad()
def test_rows_read_on_by_unequal_amounts(
    fields: dict[str, Any], first: int, longer: int, shorter: int, segment: int
) -> None:
    """A row that gets few tokens still sees, in its upper layers, those that it had."""
    model = make(fields)
    ids = torch.randint(0, 61, (2, first + max(longer, shorter)))
    mask = torch.ones_like(ids)
    mask[1, first + shorter :] = 0
    mask[0, first + longer :] = 0
    state = model.new_state(2)
    for part in (slice(0, first), slice(first, None)):
        model.read(ids[:, part], state, attention_mask=mask[:, part], segment_size=segment)
    rest = torch.randint(0, 61, (2, 10))
    got = model(rest, past_key_values=state).logits
    whole = model(
        torch.cat([ids, rest], 1), attention_mask=torch.cat([mask, mask.new_ones(2, 10)], 1)
    )
    assert (got - whole.logits[:, -10:]).abs().max() < TOLERANCE
