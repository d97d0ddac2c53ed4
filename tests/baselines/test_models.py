"""What every baseline must do as transformers and the training of this package see it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from drt.baselines import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    LandmarkAttentionConfig,
    LandmarkAttentionForCausalLM,
)
from drt.baselines.base import BaselineForCausalLM
from drt.configuration import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
NAMES = ["landmark_attention", "block_recurrent"]
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def make_config(name: str, **changes: Any) -> DecoderConfig:
    if name == "landmark_attention":
        own = {"sliding_window": 19, "chunk_size": 8, "retrieval_topk": 2}
        return LandmarkAttentionConfig(**{**SIZES, **own, **changes})
    own = {"sliding_window": 16, "num_state_vectors": 5}
    return BlockRecurrentConfig(**{**SIZES, **own, **changes})


def make_model(name: str, **changes: Any) -> BaselineForCausalLM:
    config = make_config(name, **changes)
    if isinstance(config, LandmarkAttentionConfig):
        return LandmarkAttentionForCausalLM(config)
    return BlockRecurrentForCausalLM(config)


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> BaselineForCausalLM:
    return make_model(request.param).eval()


@pytest.fixture
def ids() -> Tensor:
    # Not 0, which `generate` takes for padding.
    return torch.randint(1, 61, (2, 101))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(data=st.data())
@torch.no_grad()
def test_pieces_equal_the_whole(name: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    # Narrower ones make landmarks alike, and which of them is chosen is then left to rounding.
    window = data.draw(st.integers(8, 30))
    model = make_model(name, sliding_window=window).double().eval()
    length = data.draw(st.integers(2, 120))
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=8)))
    ids = torch.randint(61, (2, length))
    state, logits = model.new_state(), []
    for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
        fork = copy.deepcopy(state)
        logits.append(model(ids[:, begin:end], past_key_values=state).logits)
        # What is read with a fork does not reach the state, nor the other way round.
        model(torch.randint(61, (2, 40)), past_key_values=fork)
    assert state.num_tokens == length
    # float64 in another order of summation; a key rotated to another position and back is off by
    # the float32 rounding of rotary factors.
    assert (torch.cat(logits, dim=1) - model(ids).logits).abs().max() < 1e-5


@torch.no_grad()
def test_later_tokens_change_nothing_before(model: BaselineForCausalLM, ids: Tensor) -> None:
    for kept in (1, 37, 64, 100):
        other = ids.clone()
        other[:, kept:] = torch.randint(61, (2, 101 - kept))
        # The same operations on the same numbers, but for what is masked.
        assert torch.allclose(model(other).logits[:, :kept], model(ids).logits[:, :kept], atol=1e-5)


def test_saved_and_loaded_gives_the_same_logits(
    model: BaselineForCausalLM, ids: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(model.config)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_finite_and_reach_every_parameter(
    model: BaselineForCausalLM, ids: Tensor, checkpointing: bool
) -> None:
    model.train()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad for name, p in model.named_parameters()}
    missing = [name for name, grad in plain.items() if grad is None or not grad.any()]
    assert missing == []
    assert all(grad.isfinite().all() for grad in plain.values() if grad is not None)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        again = {name: p.grad for name, p in model.named_parameters()}
        # The same operations once more.
        assert all(torch.equal(again[name], grad) for name, grad in plain.items())


def test_the_loss_is_the_mean_of_the_shifted_labels(
    model: BaselineForCausalLM, ids: Tensor
) -> None:
    labels = ids.clone()
    labels[:, :50] = -100
    out = model(ids, labels=labels, output_token_losses=True)
    wanted = F.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
    )
    assert torch.allclose(out.token_losses.flatten(), wanted)
    assert torch.allclose(out.loss, wanted.sum() / (labels[:, 1:] >= 0).sum())
    by_items = model(ids, labels=labels, num_items_in_batch=1000).loss
    assert torch.allclose(by_items, wanted.sum() / 1000)
    model.config.loss_chunk_size = 16
    in_chunks = model.train()(ids, labels=labels)
    assert in_chunks.logits is None
    assert torch.allclose(in_chunks.loss, out.loss)


def test_logits_to_keep_are_the_last(model: BaselineForCausalLM, ids: Tensor) -> None:
    logits, index = model(ids).logits, torch.tensor([3, 70])
    # A matrix product of fewer rows may be summed in another order.
    assert torch.allclose(model(ids, logits_to_keep=5).logits, logits[:, -5:], atol=1e-5)
    assert torch.allclose(model(ids, logits_to_keep=index).logits, logits[:, index], atol=1e-5)


@torch.no_grad()
def test_greedy_generation_is_one_step_after_another(
    model: BaselineForCausalLM, ids: Tensor
) -> None:
    wanted = ids[:, :50]
    for _ in range(30):
        wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], dim=1)
    prompt = ids[:, :50]
    assert torch.equal(model.generate(prompt, max_new_tokens=30, **GREEDY), wanted)
    without = model.generate(prompt, max_new_tokens=30, use_cache=False, **GREEDY)
    assert torch.equal(without, wanted)
    # A state that has read the beginning; input_ids are still the whole text.
    state = model(prompt[:, :20], use_cache=True).past_key_values
    fork = copy.deepcopy(state)
    gone_on = model.generate(prompt, past_key_values=state, max_new_tokens=30, **GREEDY)
    assert torch.equal(gone_on, wanted)
    assert (state.num_tokens, fork.num_tokens) == (79, 20)
    for count in (5, 20):
        with pytest.raises(ValueError, match=f"read 20 tokens, .* the prompt has {count}: there"):
            model.generate(prompt[:, :count], past_key_values=fork, max_new_tokens=1, **GREEDY)
    with pytest.raises(ValueError, match="use_cache=False with a state is not supported"):
        model.generate(prompt, past_key_values=fork, max_new_tokens=2, use_cache=False, **GREEDY)
    # A mask of the whole text says that the prompt is what comes after the state.
    mask = torch.ones_like(prompt)
    behind = model.generate(
        prompt[:, 20:], attention_mask=mask, past_key_values=fork, max_new_tokens=30, **GREEDY
    )
    assert torch.equal(behind[:, 30:], wanted[:, 50:])


@torch.no_grad()
def test_beams_move_the_state(model: BaselineForCausalLM, ids: Tensor) -> None:
    options = {"max_new_tokens": 12, "num_beams": 3, **GREEDY}
    with_state = model.generate(ids[:, :40], **options)
    assert torch.equal(with_state, model.generate(ids[:, :40], use_cache=False, **options))


@torch.no_grad()
def test_rows_of_a_state_can_be_selected(model: BaselineForCausalLM, ids: Tensor) -> None:
    state = model(ids[:, :60], use_cache=True).past_key_values
    state.batch_repeat_interleave(2)
    state.batch_select_indices(torch.tensor([2, 0]))
    got = model(ids[:, 60:].flip(0), past_key_values=state).logits
    # A batch of other rows may be summed in another order.
    assert torch.allclose(got.flip(0), model(ids).logits[:, 60:], atol=1e-4)


@torch.no_grad()
def test_bfloat16_autocast_stays_near(model: BaselineForCausalLM, ids: Tensor) -> None:
    wanted = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state()
        parts = [model(part, past_key_values=state).logits for part in ids.split(30, dim=1)]
    got = torch.cat(parts, dim=1).float()
    # bfloat16 keeps 8 bits: 0.4 % a rounding, and some dozens of them in three layers. A chunk that
    # is chosen otherwise changes a position more than that, so the median is what is bounded.
    error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert error.median() < 0.05


@torch.no_grad()
def test_padding_at_the_right_is_invisible(model: BaselineForCausalLM, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, 70:] = 0
    got = model(ids.masked_fill(mask == 0, 0), attention_mask=mask).logits
    # A batch of one may be summed in another order.
    assert torch.allclose(got[1, :70], model(ids[1:, :70]).logits[0], atol=1e-4)


def test_other_padding_is_refused(model: BaselineForCausalLM, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="padding before content in row 1"):
        model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="padding, which a state cannot hold"):
        model(ids, attention_mask=mask.flip(1), use_cache=True)


def test_wrong_arguments_are_refused(model: BaselineForCausalLM, ids: Tensor) -> None:
    with pytest.raises(ValueError, match="does not know the arguments"):
        model(ids, position_bias=ids)
    with pytest.raises(ValueError, match=r"\(B, T\), T at least 1, got \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match="must be a BaselineState, got dict"):
        model(ids, past_key_values={})
    state = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="the state has 2 rows, the input has 1"):
        model(ids[:1], past_key_values=state)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 0}, "sliding_window must be at least 1, got 0"),
        ({"loss_chunk_size": 0}, "loss_chunk_size must be at least 1, got 0"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"slidingwindow": 8}, "unknown .*Config key 'slidingwindow'.*sliding_window"),
        ({"num_encoder_layers": 1}, "unknown .*Config key 'num_encoder_layers'"),
    ],
)
def test_wrong_sizes_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("landmark_attention", {"retrieval_topk": 2.5}),
        ("block_recurrent", {"num_state_vectors": "many"}),
        ("block_recurrent", {"position_embedding": "none"}),
    ],
)
def test_wrong_types_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(StrictDataclassError, match=next(iter(changes))):
        make_config(name, **changes)


def test_memory_of_a_training_step_is_linear(largest_tensor: Any) -> None:
    for name in NAMES:
        model = make_model(name, num_hidden_layers=2).train()
        sizes = []
        for length in (512, 1024):
            ids = torch.randint(61, (1, length))
            with type(largest_tensor)() as largest:
                model(ids, labels=ids).loss.backward()
            sizes.append(largest.numel)
        # Twice the tokens, twice the largest tensor, but for what fills up the last block.
        assert sizes[1] < 2.2 * sizes[0]


def test_a_state_is_not_trained_through(model: BaselineForCausalLM, ids: Tensor) -> None:
    model.train()
    for arguments in ({"use_cache": True}, {"past_key_values": model.new_state()}):
        with pytest.raises(ValueError, match="a state remembers without gradients"):
            model(ids, **arguments)
    with torch.no_grad():
        assert model(ids, use_cache=True).past_key_values.num_tokens == ids.shape[1]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_resized_model_still_has_its_head(name: str, tied: bool, ids: Tensor) -> None:
    model = make_model(name, tie_word_embeddings=tied, loss_chunk_size=8).train()
    model.resize_token_embeddings(70)
    assert model(ids, labels=ids).loss.isfinite()
