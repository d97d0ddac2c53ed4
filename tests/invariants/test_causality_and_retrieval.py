"""What may influence what: the properties that make the method what it is."""

from typing import Any

import pytest
import torch

from drt import DRTForCausalLM
from drt.chunking import ChunkRules, Cursor, Marks, plan_segment
from drt.retrieval import RetrievedChunks
from drt.testing import tiny_config

BOTH_ONSETS = pytest.mark.parametrize("onset", ["chunk", "landmark"])


def make(**fields: Any) -> DRTForCausalLM:
    return DRTForCausalLM(tiny_config(**fields)).eval()


@BOTH_ONSETS
@pytest.mark.parametrize("changed", [0, 15, 16, 100, 256])
@torch.no_grad()
def test_a_token_changes_no_logit_before_it(onset: str, changed: int) -> None:
    model = make(retrieval_onset=onset)
    ids = torch.randint(0, 61, (1, 257))
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % 61
    before, after = model(ids).logits, model(other).logits
    # Exactly: the same operations on the same numbers.
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@BOTH_ONSETS
def test_the_loss_trains_the_retriever(onset: str) -> None:
    model = make(retrieval_onset=onset).train()
    ids = torch.randint(0, 61, (2, 257))
    kept: list[torch.Tensor] = []
    assert model.model.chunk_encoder is not None

    def keep_landmarks(_module: Any, _inputs: Any, output: Any) -> None:
        output.landmarks.retain_grad()
        kept.append(output.landmarks)

    model.model.chunk_encoder.register_forward_hook(keep_landmarks)
    model(ids, labels=ids).loss.backward()
    gradient = kept[0].grad
    assert gradient is not None
    # Every chunk but the last has been a candidate of some landmark.
    assert (gradient[:, :-2].abs().sum(-1) > 0).any(-1).all()
    for norm in model.model.query_norms:
        assert norm.weight.grad is not None
        assert norm.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_an_unretrieved_chunk_has_no_influence() -> None:
    # One retrieval group, so that the choice does not depend on what an earlier group saw.
    model = make(retrieval_groups=[2], num_hidden_layers=4, retrieval_topk=2)
    ids = torch.randint(0, 61, (1, 257))
    plain = model(ids, output_retrievals=True)
    assert model.model.chunk_encoder is not None

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        del module, inputs
        keys, values = output.keys.clone(), output.values.clone()
        keys[:, 3], values[:, 3] = 1e3, -1e3
        return output._replace(keys=keys, values=values)

    handle = model.model.chunk_encoder.register_forward_hook(spoil)
    spoilt = model(ids).logits
    handle.remove()
    uses = (plain.retrievals[0].indices[0] == 3).any(-1)
    assert uses.any()
    assert not uses.all()
    # Landmark c serves the position after token 16 c + 15 and those to the next chunk's end. With
    # two upper layers a window carries an influence at most 2 * 23 positions further.
    touched = torch.zeros(257, dtype=torch.bool)
    for landmark in uses.nonzero().flatten().tolist():
        start = 16 * (landmark + 1) - 1
        touched[start : start + 17 + 2 * 23] = True
    changed = (spoilt - plain.logits).abs().amax(-1)[0] > 0
    assert changed.any()
    assert not (changed & ~touched).any()


@torch.no_grad()
def test_the_order_of_retrieved_chunks_is_irrelevant() -> None:
    model = make()
    cross = model.model.layers[-1].cross_attn
    keys, values = torch.randn(2, 9, 16, 2, 8).unbind(0)
    indices = torch.randperm(9)[:4].view(1, 1, 4)
    weights = torch.rand(1, 1, 4)
    blocks = torch.randn(1, 1, 17, 32)
    out = cross(blocks, RetrievedChunks(keys, values, None, indices, weights))
    order = torch.tensor([2, 0, 3, 1])
    turned = RetrievedChunks(keys, values, None, indices[..., order], weights[..., order])
    # Four terms added in another order, float32.
    assert torch.allclose(cross(blocks, turned), out, atol=1e-6)


@torch.no_grad()
def test_without_groups_nothing_beyond_the_windows_is_seen() -> None:
    model = make(retrieval_groups=[], num_hidden_layers=2)
    assert model.model.chunk_encoder is None
    assert model.model.landmark is None
    ids = torch.randint(0, 61, (1, 200))
    other = ids.clone()
    other[0, 100] = (ids[0, 100] + 1) % 61
    changed = (model(ids).logits != model(other).logits).any(-1)[0].nonzero().flatten()
    assert changed.min() == 100
    # Two layers, each looking back 23 positions.
    assert changed.max() <= 100 + 2 * 23


@BOTH_ONSETS
@torch.no_grad()
def test_what_lies_beyond_every_window_is_seen_through_retrieval(onset: str) -> None:
    model = make(retrieval_onset=onset, retrieval_topk=16)
    ids = torch.randint(0, 61, (1, 257))
    other = ids.clone()
    other[0, 3] = (ids[0, 3] + 1) % 61
    last = (model(ids).logits - model(other).logits).abs()[0, -1]
    assert last.max() > 0


def test_bypass_feeds_the_feed_forward_only() -> None:
    """h' = a + FFN(norm(a + o)): with a silent feed-forward, what was retrieved leaves no trace."""
    layer = make().model.layers[-1]
    torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    ids = torch.randn(1, 17, 32)
    keys, values = torch.randn(2, 3, 16, 2, 8).unbind(0)
    chunks = RetrievedChunks(
        keys, values, None, torch.zeros(1, 1, 1, dtype=torch.int64), torch.ones(1, 1, 1)
    )
    rules = ChunkRules(chunk_size=16, landmark_starts_block=False)
    layout, _ = plan_segment([Cursor()], 16, rules=rules, marks=Marks(), device=ids.device)
    assert torch.equal(layer(ids, None, layout, None, chunks), layer(ids, None, layout))
