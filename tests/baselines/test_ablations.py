"""Ablations: each keeps what a DRT promises of segments and rows, and is what it says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from drt import DecodingGraph, DeviceMemory, DRTForCausalLM, MemoryFormatError
from drt.baselines import AblationConfig, AblationForCausalLM
from drt.layers import ChunkEncoder
from drt.testing import tiny_config

# As for the model itself: float32 logits of order 1 after a few layers.
TOLERANCE = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "no bypass": {"bypass": False},
    "no chunk encoder": {"num_encoder_layers": 0},
    "joint": {"mixing": "joint", "landmark_size": 8},
    "joint, no plus-one": {"mixing": "joint", "softmax_plus_one": False},
    "random": {"retriever": "random", "retrieval_onset": "chunk"},
    "random, joint": {"retriever": "random", "mixing": "joint", "exclude_window_chunks": True},
    "fixed": {"retriever": "fixed"},
    "fixed, uniform": {"retriever": "fixed", "retriever_weights": "uniform"},
    "rpt": {"retriever": "fixed", "mixing": "joint", "bypass": False},
}
variants = st.sampled_from(sorted(VARIANTS))
each_variant = pytest.mark.parametrize("name", sorted(VARIANTS))


def config_of(**changes: Any) -> AblationConfig:
    plain = tiny_config().to_dict()
    names = (*("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),)
    names += ("num_attention_heads", "num_key_value_heads", "num_encoder_layers")
    names += ("retrieval_groups", "retrieval_topk", "chunk_size", "sliding_window")
    kept = {name: plain[name] for name in (*names, "initializer_range")}
    return AblationConfig(**{**kept, **changes})


def make(**changes: Any) -> AblationForCausalLM:
    torch.manual_seed(0)
    return AblationForCausalLM(config_of(**changes)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 257))


def test_as_it_stands_it_is_a_drt_bit_for_bit(ids: torch.Tensor) -> None:
    torch.manual_seed(0)
    plain = DRTForCausalLM(tiny_config()).train()
    model = make().train()
    model.load_state_dict(plain.state_dict())
    losses = []
    for each in (plain, model):
        generator = torch.Generator().manual_seed(3)
        loss = each(ids, labels=ids, generator=generator).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@settings(max_examples=20)
@given(variants, st.lists(st.integers(0, 40), min_size=1, max_size=7), st.integers(0, 10**6))
@torch.no_grad()
def test_segments_are_invisible(name: str, pieces: list[int], seed: int) -> None:
    model = make(**VARIANTS[name])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (2, sum(pieces)), generator=generator)
    whole = model(ids, output_retrievals=True)
    state = model.new_state(2, memory=DeviceMemory(slab_size=3))
    outs = [
        model(part, past_key_values=state, output_retrievals=True)
        for part in ids.split(pieces, dim=1)
    ]
    logits = torch.cat([out.logits for out in outs], dim=1)
    assert (logits - whole.logits).abs().max() < TOLERANCE if sum(pieces) else True
    for group, retrieval in enumerate(whole.retrievals):
        weights = torch.cat([out.retrievals[group].weights for out in outs], dim=1)
        assert torch.allclose(weights, retrieval.weights, atol=TOLERANCE)
        if model.config.retriever == "random":
            indices = torch.cat([out.retrievals[group].indices for out in outs], dim=1)
            assert torch.equal(indices, retrieval.indices)


@each_variant
@torch.no_grad()
def test_token_by_token_is_the_full_forward(name: str) -> None:
    model, ids = make(**VARIANTS[name]), torch.randint(0, 61, (1, 70))
    state = model.new_state(1)
    steps = [model(token, past_key_values=state).logits for token in ids.split(1, dim=1)]
    assert (torch.cat(steps, dim=1) - model(ids).logits).abs().max() < TOLERANCE


@settings(max_examples=9)
@given(variants, st.integers(0, 300), st.integers(1, 40), st.integers(1, 90))
@torch.no_grad()
def test_reading_without_upper_layers_is_exact(
    name: str, context: int, rest: int, segment: int
) -> None:
    model = make(**VARIANTS[name])
    ids = torch.randint(0, 61, (2, context + rest))
    state = model.new_state(2)
    model.read(ids[:, :context], state, segment_size=segment)
    out = model(ids[:, context:], past_key_values=state).logits
    assert (out - model(ids).logits[:, context:]).abs().max() < TOLERANCE


@settings(max_examples=14)
@given(variants, st.integers(0, 10**6))
@torch.no_grad()
def test_padding_chunk_ends_and_other_rows_are_invisible(name: str, seed: int) -> None:
    # So many that all candidates are retrieved: texts of a token or two tie for the last place.
    model = make(**{**VARIANTS[name], "retrieval_topk": 16})
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 61, (2, 90), generator=g)
    mask = torch.rand(2, 90, generator=g) < 0.8
    ends = (torch.rand(2, 90, generator=g) < 0.06) & mask
    cuts = torch.randint(0, 91, (3,), generator=g).sort().values.tolist()
    state, parts = model.new_state(2), []
    for begin, end in zip([0, *cuts], [*cuts, 90], strict=True):
        part = slice(begin, end)
        given = {"attention_mask": mask[:, part], "chunk_ends": ends[:, part]}
        parts.append(model(ids[:, part], past_key_values=state, **given).logits)
    for row in range(2):
        kept = mask[row]
        alone = model(ids[row, kept][None], chunk_ends=ends[row, kept][None]).logits[0]
        assert (torch.cat(parts, dim=1)[row, kept] - alone).abs().max() < TOLERANCE


@each_variant
@torch.no_grad()
def test_documents_in_one_row_are_as_if_alone(name: str) -> None:
    model, ids = make(**VARIANTS[name]), torch.randint(0, 61, (1, 150))
    documents = (torch.arange(150) >= 53).long()[None]
    packed = model(ids, document_ids=documents).logits
    for part in (slice(0, 53), slice(53, None)):
        assert (packed[:, part] - model(ids[:, part]).logits).abs().max() < TOLERANCE


@each_variant
@torch.no_grad()
def test_forks_and_reordered_rows_go_their_own_way(name: str) -> None:
    model = make(**VARIANTS[name])
    ids, rest = torch.randint(0, 61, (2, 90)), torch.randint(0, 61, (3, 60))
    mask = torch.ones_like(ids)
    mask[1, 33:40] = 0
    state = model.new_state(2)
    model(ids, attention_mask=mask, past_key_values=state)
    model(torch.randint(0, 61, (2, 30)), past_key_values=state.fork())
    state.reorder_cache(torch.tensor([1, 0, 1]))
    got = torch.cat([model(p, past_key_values=state).logits for p in rest.split([1, 40, 19], 1)], 1)
    for row, source in enumerate([1, 0, 1]):
        whole = torch.cat([ids[source][mask[source] > 0], rest[row]])[None]
        assert (got[row] - model(whole).logits[0, -60:]).abs().max() < TOLERANCE


@each_variant
@torch.no_grad()
def test_a_saved_state_goes_on_and_knows_its_model(name: str, tmp_path: Path) -> None:
    model, ids = make(**VARIANTS[name]), torch.randint(0, 61, (1, 150))
    state = model.new_state(1)
    model(ids[:, :90], past_key_values=state)
    model.save_state(state, tmp_path)
    state, _ = model.load_state(tmp_path)
    out = model(ids[:, 90:], past_key_values=state).logits
    assert (out - model(ids).logits[:, 90:]).abs().max() < TOLERANCE
    model.config.retriever_scale = 3.0
    with pytest.raises(MemoryFormatError, match="another model"):
        model.load_state(tmp_path)


@each_variant
def test_saved_and_loaded_by_the_auto_classes(name: str, ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(**VARIANTS[name])
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, AblationConfig)
    assert {key: getattr(config, key) for key in VARIANTS[name]} == VARIANTS[name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, AblationForCausalLM)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    longer = loaded.generate(ids[:, :50], max_new_tokens=4, do_sample=False)
    assert longer.shape == (2, 54)


@each_variant
def test_every_parameter_gets_a_gradient(name: str, ids: torch.Tensor) -> None:
    model = make(**VARIANTS[name]).train()
    out = model(ids, labels=ids, output_retrievals=True)
    # Through the weights, and through them alone, the loss reaches a retriever.
    learns = model.config.retriever == "learned"
    assert all(each.weights.requires_grad == learns for each in out.retrievals)
    assert any("query_norms" in name for name, _ in model.named_parameters()) == learns
    out.loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


@each_variant
def test_gradient_checkpointing_changes_no_gradient(name: str, ids: torch.Tensor) -> None:
    model = make(**VARIANTS[name]).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        generator = torch.Generator().manual_seed(3)
        model(ids, labels=ids, generator=generator).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("bypass", [True, False])
@torch.no_grad()
def test_what_is_retrieved_enters_the_residual_stream_or_bypasses_it(bypass: bool) -> None:
    model = make(bypass=bypass).double()
    layer, seen = model.model.layers[-1], {}
    parts = {"a": layer.cross_attn_layernorm, "mixed": layer.post_attention_layernorm}
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    layer.mlp.register_forward_hook(lambda _, x, out: seen.update(fed=out))
    layer.register_forward_hook(lambda _, x, out: seen.update(out=out))
    model(torch.randint(0, 61, (1, 100)))
    retrieved = seen["mixed"] - seen["a"]
    # The first chunk and its landmark's predecessors have retrieved nothing.
    assert not retrieved[:, :16].any()
    assert retrieved[:, 40:].abs().mean() > 1e-3
    wanted = seen["a"] + seen["fed"] + (0 if bypass else retrieved)
    # Float64 sums of three terms.
    assert torch.allclose(seen["out"], wanted, atol=1e-12)


@torch.no_grad()
def test_without_encoder_layers_chunks_are_normed_and_projected() -> None:
    encoder = ChunkEncoder(tiny_config(num_encoder_layers=0)).double()
    hidden = torch.randn(2, 3, 17, 32, dtype=torch.float64)
    chunks = encoder(hidden)
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    normed = normed / (normed.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(chunks.landmarks, normed[:, :, 16], atol=1e-12)
    keys = (normed[:, :, :16] @ encoder.k_proj.weight.T).unflatten(-1, (2, 8))
    assert torch.allclose(chunks.keys, keys, atol=1e-12)


def test_random_chunks_are_drawn_anew_in_training_only(ids: torch.Tensor) -> None:
    model = make(retriever="random").train()

    def chosen(seed: int, of: AblationForCausalLM = model) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        out = of(ids, output_retrievals=True, generator=generator)
        indices = torch.stack([each.indices for each in out.retrievals])
        own = torch.arange(16)[:, None]
        assert (indices < own).all()
        assert torch.equal((indices >= 0).sum(-1), own[:, 0].clamp_max(4).expand(2, 2, -1))
        return indices

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))
    model.eval()
    assert torch.equal(chosen(1), chosen(2))
    # Other groups draw others, rows of a batch draw the same.
    assert not torch.equal(chosen(1)[0], chosen(1)[1])
    assert torch.equal(chosen(1)[:, 0], chosen(1)[:, 1])
    assert not torch.equal(chosen(1), chosen(1, make(retriever="random", retriever_seed=1)))


@torch.no_grad()
def test_a_fixed_retriever_finds_the_chunk_of_equal_text_first(ids: torch.Tensor) -> None:
    model = make(retriever="fixed", retriever_scale=10.0)
    ids[:, 12 * 16 : 13 * 16] = ids[:, 5 * 16 : 6 * 16]
    for each in model(ids, output_retrievals=True).retrievals:
        assert (each.indices[:, 12, 0] == 5).all()
        # A cosine of 1, times the scale, in float32.
        assert torch.allclose(each.scores[:, 12, 0], torch.tensor(10.0), atol=1e-4)
        assert torch.allclose(each.weights, each.scores.softmax(-1).nan_to_num(0.0), atol=1e-6)
    # Training adds no noise to the choice of a retriever that does not learn.
    again = model.train()(ids, output_retrievals=True)
    assert torch.equal(again.retrievals[0].indices, each.indices)
    model = make(retriever="fixed", retriever_weights="uniform")
    for each in model(ids, output_retrievals=True).retrievals:
        assert torch.equal(each.weights[:, 4:], torch.full((2, 12, 4), 0.25))


def test_a_retriever_of_texts_needs_the_tokenizer(ids: torch.Tensor, tmp_path: Path) -> None:
    model = make(retriever="fixed", retriever_name=str(tmp_path))
    with pytest.raises(ValueError, match=r"call model.attach_retriever\(tokenizer\) first"):
        model(ids)
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        model.attach_retriever(None)
    # Those that read no text need none.
    make(retriever="fixed").attach_retriever(None)
    make(retriever_name=str(tmp_path)).attach_retriever(None)


def test_an_attached_retriever_sees_the_texts_of_chunks() -> None:
    model, texts = make(retriever="fixed", retriever_name="a model"), []

    def encode(ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        texts.extend(row[:n].tolist() for row, n in zip(ids, lengths.tolist(), strict=True) if n)
        return torch.nn.functional.one_hot(ids[:, 0] % 5, 5).float()

    model.model.text_encoder = encode
    ids = torch.arange(50)[None]
    ends = ids == 19
    state = model.new_state(1)
    for part in (slice(0, 10), slice(10, 30), slice(30, 50)):
        model(ids[:, part], chunk_ends=ends[:, part], past_key_values=state)
    assert texts == [list(range(16)), list(range(16, 20)), list(range(20, 36))]
    assert not any("text_encoder" in name for name in model.state_dict())


def test_what_cannot_be_is_refused(ids: torch.Tensor) -> None:
    model = make(retriever="fixed")
    with pytest.raises(ValueError, match="pass input_ids, not inputs_embeds"):
        model(inputs_embeds=model.model.embed_tokens(ids))
    state = model.new_state(2)
    graph = DecodingGraph(model, batch_size=2)
    with torch.no_grad(), graph.attached(state), pytest.raises(ValueError, match="decode without"):
        model(ids[:, :1], past_key_values=state)


@pytest.mark.parametrize("name", ["random, joint", "joint", "no bypass"])
@torch.no_grad()
def test_a_decoding_graph_takes_the_steps_of_the_others(name: str) -> None:
    model, ids = make(**VARIANTS[name]), torch.randint(0, 61, (2, 100))
    state = model.new_state(2)
    model(ids[:, :20], past_key_values=state)
    with DecodingGraph(model, batch_size=2).attached(state):
        steps = [model(token, past_key_values=state).logits for token in ids[:, 20:].split(1, 1)]
    assert (torch.cat(steps, dim=1) - model(ids).logits[:, 20:]).abs().max() < TOLERANCE


@each_variant
def test_runs_in_bfloat16(name: str, ids: torch.Tensor) -> None:
    model = make(**VARIANTS[name]).bfloat16().train()
    model(ids, labels=ids).loss.backward()
    state = model.eval().new_state(2)
    with torch.no_grad():
        parts = [model(p, past_key_values=state).logits for p in ids.split([100, 1, 156], 1)]
    assert all(part.dtype == torch.bfloat16 and part.isfinite().all() for part in parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retrievr": "fixed"}, "unknown AblationConfig key 'retrievr'.*retriever"),
        ({"retriever_scale": 0.0}, "retriever_scale must be positive, got 0.0"),
        ({"retriever": "random", "landmark_size": 8}, "landmark_size 8 .* 'random' has not"),
        ({"retrieval_topk": 0}, "retrieval_topk must be at least 1, got 0"),
        ({"mixing": "both"}, "mixing"),
        ({"retriever": "oracle"}, "retriever"),
    ],
)
def test_wrong_configurations_raise(changes: dict[str, Any], message: str) -> None:
    # Wrong types have an error of their own.
    with pytest.raises(Exception, match=message) as error:
        config_of(**changes)
    assert "Strict" in type(error.value).__name__ or isinstance(error.value, ValueError)
