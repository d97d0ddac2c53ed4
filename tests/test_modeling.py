"""The model as transformers sees it: saving, loss, generation, checkpointing, errors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from drt import DeviceMemory, DRTForCausalLM
from drt.testing import assert_within_budget, relative_error, tiny_config


@pytest.fixture
def model() -> DRTForCausalLM:
    return DRTForCausalLM(tiny_config()).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 257))


def test_saved_and_loaded_gives_the_same_logits(
    model: DRTForCausalLM, ids: torch.Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, DRTForCausalLM)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_the_head_is_the_embedding_when_tied() -> None:
    tied = DRTForCausalLM(tiny_config())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    loose = DRTForCausalLM(tiny_config(tie_word_embeddings=False))
    assert loose.lm_head.weight is not loose.model.embed_tokens.weight


def test_lower_weights_are_named_as_llama_names_them() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = tiny_config(retrieval_groups=[])
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    ).eval()
    ours = DRTForCausalLM(config).eval()
    ours.load_state_dict(llama.state_dict())
    # Inside the window, causal attention and sliding-window attention are the same thing.
    ids = torch.randint(0, 61, (2, config.sliding_window))
    # Two float32 forwards of four layers, in another order of summation.
    assert torch.allclose(ours(ids).logits, llama(ids).logits, atol=1e-5)


def test_labels_are_shifted_inside(model: DRTForCausalLM, ids: torch.Tensor) -> None:
    labels = ids.clone()
    labels[:, :50] = -100
    out = model(ids, labels=labels)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(out.loss, wanted)
    by_items = model(ids, labels=labels, num_items_in_batch=1000).loss
    assert torch.allclose(by_items, wanted * (labels[:, 1:] >= 0).sum() / 1000)


@pytest.mark.parametrize("keep", [1, 7])
def test_logits_to_keep_are_the_last(model: DRTForCausalLM, ids: torch.Tensor, keep: int) -> None:
    kept = model(ids, logits_to_keep=keep).logits
    # A matrix product of fewer rows may be summed in another order.
    assert torch.allclose(kept, model(ids).logits[:, -keep:], atol=1e-5)
    index = torch.tensor([3, 100])
    assert torch.allclose(
        model(ids, logits_to_keep=index).logits, model(ids).logits[:, index], atol=1e-5
    )


def test_gradient_checkpointing_changes_no_gradient(ids: torch.Tensor) -> None:
    model = DRTForCausalLM(tiny_config()).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        generator = torch.Generator().manual_seed(3)
        model(ids, labels=ids, generator=generator).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_gets_a_gradient(ids: torch.Tensor) -> None:
    model = DRTForCausalLM(tiny_config()).train()
    model(ids, labels=ids).loss.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_right_padding_is_invisible(model: DRTForCausalLM, ids: torch.Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, 100:] = 0
    padded = ids.masked_fill(mask == 0, 0)
    out = model(padded, attention_mask=mask).logits[1, :100]
    assert torch.allclose(out, model(ids[1:, :100]).logits[0], atol=1e-5)


def test_retrievals_are_returned_when_asked_for(model: DRTForCausalLM, ids: torch.Tensor) -> None:
    out = model(ids, output_retrievals=True)
    assert len(out.retrievals) == 2
    for retrieval in out.retrievals:
        assert retrieval.indices.shape == (2, 16, 4)
        own = torch.arange(16).view(1, 16, 1)
        assert (retrieval.indices < own).all()
        assert torch.equal((retrieval.indices >= 0).sum(-1), own[..., 0].clamp_max(4).expand(2, -1))
    assert model(ids).retrievals is None


def test_chunks_inside_the_window_can_be_excluded(ids: torch.Tensor) -> None:
    # A window of 60 positions holds 3 whole chunks of 17: the landmark's own and two before it.
    config = tiny_config(exclude_window_chunks=True, sliding_window=60)
    out = DRTForCausalLM(config).eval()(ids, output_retrievals=True)
    own = torch.arange(16).view(1, 16, 1)
    for retrieval in out.retrievals:
        assert (retrieval.indices < (own - 2).clamp_min(0)).all()
        assert (retrieval.indices[:, 3:, 0] >= 0).all()


def test_the_noise_has_a_generator(ids: torch.Tensor) -> None:
    model = DRTForCausalLM(tiny_config()).train()

    def chosen(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        out = model(ids, output_retrievals=True, generator=generator)
        return out.retrievals[0].indices

    assert torch.equal(chosen(1), chosen(1))
    assert not torch.equal(chosen(1), chosen(2))


def test_chunks_are_closed_early_at_random_in_training_only(ids: torch.Tensor) -> None:
    model = DRTForCausalLM(tiny_config(early_close_rate=2.0)).train()

    def num_chunks(seed: int, **kwargs: Any) -> int:
        generator = torch.Generator().manual_seed(seed)
        out = model(ids, output_retrievals=True, generator=generator, **kwargs)
        return out.retrievals[0].indices.shape[1]

    assert num_chunks(1) == num_chunks(1)
    assert len({num_chunks(seed) for seed in range(8)}) > 1
    # 257 tokens in chunks of 16; two early ends more in each make about three times as many.
    assert num_chunks(1) > 24
    with torch.no_grad():
        assert num_chunks(1, past_key_values=model.new_state(2)) == 16
    assert model.eval()(ids, output_retrievals=True).retrievals[0].indices.shape[1] == 16


def test_a_state_in_training_is_refused_where_it_would_take_gradients(ids: torch.Tensor) -> None:
    model = DRTForCausalLM(tiny_config()).train()
    for given in ({"use_cache": True}, {"past_key_values": model.new_state(2)}):
        with pytest.raises(ValueError, match="a state remembers without gradients"):
            model(ids, labels=ids, **given)
    model.eval()
    state = model.new_state(2)
    # Two segments, each with a backward of its own.
    for part in ids.split(128, dim=1):
        model(part, labels=part, past_key_values=state).loss.backward()


def test_a_state_does_not_hold_the_buffers_that_ids_came_in(model: DRTForCausalLM) -> None:
    state, buffer = model.new_state(), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for number in (5, 6, 7, 8):
            buffer.fill_(number)
            model(buffer, past_key_values=state)
    assert state.recent_ids is not None
    assert state.recent_ids.tolist() == [[5, 6, 7, 8]]
    whole = torch.arange(10_000)[None]
    state.note_ids(whole[:, -1:])
    assert sum(part.untyped_storage().nbytes() for part in state._recent_ids) == 5 * 8


def test_gradients_flow_through_short_chunks(ids: torch.Tensor) -> None:
    """The ragged layout against the grid: the same rows, once with a padded one beside them."""
    model = DRTForCausalLM(tiny_config(retrieval_noise=0.0, landmark_size=8)).train()
    grads = []
    for ragged in (False, True):
        model.zero_grad()
        if ragged:
            rows = torch.cat([ids, torch.zeros_like(ids[:1])])
            mask = torch.ones_like(rows)
            mask[2, 100:] = 0
            labels = rows.clone()
            labels[2] = -100
            model(rows, attention_mask=mask, labels=labels).loss.backward()
        else:
            model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for grid, padded in zip(*grads, strict=True):
        # Sums of some hundred float32 terms in another order.
        assert torch.allclose(padded, grid, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("segment_size", [4096, 48])
def test_a_reading_returns_what_the_next_token_is_predicted_from(
    model: DRTForCausalLM, ids: torch.Tensor, segment_size: int
) -> None:
    ragged = torch.ones_like(ids)
    ragged[1, 150:] = 0
    last, state = torch.tensor([ids.shape[1] - 1, 149]), model.new_state(2)
    hidden = model.read(ids, state, attention_mask=ragged, segment_size=segment_size)
    logits = model(ids, attention_mask=ragged).logits[torch.arange(2), last]
    assert hidden is not None
    assert hidden.shape == (2, 1, model.config.hidden_size)
    # Sums of some hundred float32 terms in another order.
    torch.testing.assert_close(model.lm_head(hidden)[:, 0], logits, atol=1e-4, rtol=1e-4)
    assert model.read(ids[:, :0], state) is None
    assert model.read(ids, state, complete=False) is None


@pytest.mark.parametrize("window", [1, 24])
@pytest.mark.parametrize("more", [-1, 0, 1, 40])
def test_a_reading_without_retrieval_sees_all_that_its_last_token_sees(
    window: int, more: int
) -> None:
    config = tiny_config(retrieval_groups=[], sliding_window=window)
    model = DRTForCausalLM(config).double().eval()
    ids = torch.randint(0, 61, (1, max(model.reach + more, 1)))
    hidden = model.read(ids, model.new_state())
    # Sums of some hundred float64 terms in another order; a token too few costs 1e-5.
    torch.testing.assert_close(
        model.lm_head(hidden), model(ids, logits_to_keep=1).logits, atol=1e-12, rtol=1e-12
    )


@torch.no_grad()
def test_bfloat16_is_as_near_in_parts_as_in_one(ids: torch.Tensor) -> None:
    # All chunks are retrieved: which ones are, rounding decides otherwise.
    model = DRTForCausalLM(tiny_config(retrieval_topk=16)).bfloat16().eval()
    state = model.new_state(2)
    whole = model(ids).logits
    parts = [model(part, past_key_values=state).logits for part in ids.split([100, 1, 156], dim=1)]
    assert whole.dtype == torch.bfloat16
    truth = copy.deepcopy(model).double()(ids).logits
    # A number has 8 bits; four layers and two cross-attentions add up some roundings.
    assert relative_error(whole, truth) < 8 * 2**-8
    assert_within_budget(torch.cat(parts, dim=1), truth, baseline=whole, factor=1.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_ids": None}, "exactly one of input_ids and inputs_embeds"),
        ({"inputs_embeds": torch.zeros(2, 3, 32)}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": torch.zeros(3).long()}, r"must be \(B, T\) int64, .*got shape \(3,\)"),
        ({"input_ids": torch.zeros(0, 3).long()}, r"B at least 1, got shape \(0, 3\)"),
        ({"input_ids": torch.zeros(2, 3)}, r"must be \(B, T\) int64, .*torch.float32"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 3, 31)},
            r"inputs_embeds must be \(B, T, 32\).*got shape \(2, 3, 31\)",
        ),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(2, 32)},
            r"inputs_embeds must be \(B, T, 32\).*got shape \(2, 32\)",
        ),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(0, 3, 32)},
            r"B at least 1, got shape \(0, 3, 32\)",
        ),
        ({"past_key_values": object()}, "must be a DRTState, got object"),
        ({"attention_mask": torch.ones(2, 2)}, "has 2 columns, the input has 3"),
        ({"attention_mask": torch.ones(2, 4)}, "has 4 columns, the input has 3$"),
        ({"attention_mask": torch.ones(1, 3)}, r"must be \(B, T\) = \(2, 3\)"),
        ({"chunk_ends": torch.zeros(2, 3)}, "chunk_ends must be bool, got torch.float32"),
        ({"document_ids": torch.zeros(2, 4)}, r"document_ids must be .*got \(2, 4\)"),
        ({"document_ids": torch.zeros(2, 3)}, "document_ids must be integers, got torch.float32"),
        (
            {"document_ids": torch.zeros(2, 3, dtype=torch.bool)},
            "document_ids must be integers, got torch.bool",
        ),
        ({"attention_mask": torch.zeros(2, 1, 3, 3)}, r"must be \(B, T\) = .*got shape"),
        ({"output_attentions": True}, "does not know the arguments.*output_attentions"),
        ({"output_token_losses": True}, "output_token_losses=True needs labels"),
        (
            {"labels": torch.zeros(2, 3, dtype=torch.int64), "logits_to_keep": 1},
            "labels need all logits, got logits_to_keep = 1",
        ),
        ({"window": 3}, "does not know the arguments.*window"),
    ],
)
def test_wrong_arguments_raise(model: DRTForCausalLM, kwargs: dict[str, Any], message: str) -> None:
    arguments = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), **kwargs}
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_a_state_of_other_rows_raises(model: DRTForCausalLM) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="the state has 1 rows, the input has 2"):
        model(ids, past_key_values=model.new_state(1))
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.new_state(0)
    with pytest.raises(ValueError, match="segment_size must be at least 1, got 0"):
        model.read(ids, model.new_state(2), segment_size=0)
    with pytest.raises(ValueError, match=r"input_ids must be \(B, T\) int64.*got shape \(3,\)"):
        model.read(ids[0], model.new_state(2))


@pytest.mark.parametrize("refused", ["crop", "reset", "update"])
def test_what_a_state_cannot_do_raises(model: DRTForCausalLM, refused: str) -> None:
    state = model.new_state(1)
    with pytest.raises(NotImplementedError, match=r"fork\(\)|new_state|written by"):
        getattr(state, refused)(*([1] if refused == "crop" else []))


def test_a_memory_can_be_handed_in(model: DRTForCausalLM, ids: torch.Tensor) -> None:
    memory = DeviceMemory(slab_size=4)
    state = model.new_state(2, memory=memory)
    model(ids, past_key_values=state)
    assert memory.counts == (16, 16)
    assert state.memory is memory
