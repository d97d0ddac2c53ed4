"""A reading is what one forward over all of its text would give, however the text is cut."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from drt import DRTForCausalLM
from drt.baselines import (
    BlockRecurrentConfig,
    BlockRecurrentForCausalLM,
    LandmarkAttentionConfig,
    LandmarkAttentionForCausalLM,
)
from drt.evaluation.reading import position_limit, start_reading
from drt.memory import ChunkMemory, HostMemory
from drt.testing import assert_within_budget, tiny_config

VOCABULARY = 61
LENGTH = 170
LLAMA_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    # Weights large enough for a random model to tell inputs apart.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "max_position_embeddings": 256,
}


def gpt2(positions: int = 256) -> GPT2LMHeadModel:
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": positions}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
            **shape,
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "drt": lambda: DRTForCausalLM(tiny_config()),
    "sliding window": lambda: DRTForCausalLM(tiny_config(retrieval_groups=[])),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA_SHAPE, sliding_window=24)),
    "gpt2": gpt2,
    "landmark attention": lambda: LandmarkAttentionForCausalLM(
        LandmarkAttentionConfig(**LLAMA_SHAPE, sliding_window=24, chunk_size=16)
    ),
    "block recurrent": lambda: BlockRecurrentForCausalLM(
        BlockRecurrentConfig(**LLAMA_SHAPE, sliding_window=24, num_state_vectors=8)
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().eval()


def some_ids(count: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (count,))


@torch.no_grad()
def assert_losses(actual: Tensor, model: Any, ids: Tensor) -> None:
    """The losses of the last tokens are those of one forward in float64 without a cache.

    The budget is measured: what the same forward costs in float32.
    """
    assert actual.dtype == torch.float32
    wanted = ids[len(ids) - len(actual) :]

    def whole(model: Any) -> Tensor:
        return F.cross_entropy(
            model(ids[None]).logits[0, -len(actual) - 1 : -1], wanted, reduction="none"
        )

    expected = whole(copy.deepcopy(model).double())
    assert_within_budget(actual, expected, baseline=whole(model), name="losses")


@pytest.mark.parametrize(
    ("cuts", "segment_size"), [((), 4096), ((), 16), ((1, 2, 48, 64, 65, 130), 16), ((32, 33), 7)]
)
def test_losses_are_those_of_one_forward(
    model: Any, cuts: tuple[int, ...], segment_size: int
) -> None:
    ids = some_ids()
    reading = start_reading(model, segment_size=segment_size)
    parts = [reading.losses(ids[a:b]) for a, b in pairwise((0, *cuts, LENGTH))]
    losses = torch.cat(parts)
    assert losses[0] == 0
    assert_losses(losses[1:], model, ids)
    assert reading.num_tokens == LENGTH


@pytest.mark.parametrize("cuts", [(64,), (100,), (1,), (16, 17, 81), (30, 96, 97, 98)])
def test_what_was_read_predicts_what_follows(model: Any, cuts: tuple[int, ...]) -> None:
    """The first token after a text that was read without logits has its loss too."""
    ids = some_ids()
    reading = start_reading(model, segment_size=32)
    for first, end in pairwise((0, *cuts)):
        reading.read(ids[first:end])
    assert_losses(reading.losses(ids[cuts[-1] :]), model, ids)


def test_nothing_read_changes_nothing(model: Any) -> None:
    ids, nothing = some_ids(40), torch.zeros(0, dtype=torch.int64)
    reading = start_reading(model)
    reading.read(nothing)
    assert reading.losses(nothing).shape == (0,)
    first = reading.losses(ids[:20])
    reading.read(nothing)
    losses = torch.cat([first, reading.losses(nothing), reading.losses(ids[20:])])
    assert_losses(losses[1:], model, ids)


def test_forks_are_independent(model: Any) -> None:
    ids, other = some_ids(), some_ids(80)
    reading = start_reading(model, segment_size=32)
    reading.read(ids[:90])
    branch = reading.fork()
    twig = branch.fork()
    branch.read(other[:50])
    assert (reading.num_tokens, branch.num_tokens, twig.num_tokens) == (90, 140, 90)
    assert_losses(twig.losses(ids[90:]), model, ids)
    assert_losses(reading.losses(ids[90:]), model, ids)
    assert_losses(branch.losses(other[50:]), model, torch.cat([ids[:90], other]))


@pytest.mark.parametrize("segment_size", [4096, 24])
def test_an_answer_is_the_greedy_continuation(model: Any, segment_size: int) -> None:
    context, question = some_ids(100), some_ids(44)
    reading = start_reading(model, segment_size=segment_size)
    reading.read(context)
    answer = reading.answer(question, 7)
    prompt = torch.cat([context, question])[None]
    told = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, do_sample=False
    )
    assert answer.token_ids == told[0, 144:].tolist()
    assert reading.num_tokens == 100
    # The same again: nothing of the first answer is left.
    assert reading.answer(question, 7).token_ids == answer.token_ids
    retrieves = isinstance(model, DRTForCausalLM) and model.config.retrieval_groups
    assert [tuple(r.indices.shape) for r in answer.retrievals] == (
        [(1, 1, 4)] * 2 if retrieves else []
    )


def test_a_drt_is_asked_as_by_hand() -> None:
    """Bit for bit: one reading of the context, one forward of the question on a fork."""
    model = DRTForCausalLM(tiny_config()).eval()
    context, question = some_ids(128), some_ids(32)
    ends = torch.zeros(1, 32, dtype=torch.bool)
    ends[0, -1] = True
    state = model.new_state(memory=HostMemory())
    with torch.no_grad():
        model.read(context[None], state, segment_size=48)
        out = model(
            question[None],
            past_key_values=state.fork(),
            chunk_ends=ends,
            logits_to_keep=1,
            output_retrievals=True,
        )
    with start_reading(model, segment_size=48, new_memory=HostMemory) as reading:
        reading.read(context)
        answer = reading.answer(question, 1)
    assert answer.token_ids == [int(out.logits[0, -1].argmax())]
    assert out.retrievals is not None
    for got, expected in zip(answer.retrievals, out.retrievals, strict=True):
        for part, whole in zip(got, expected, strict=True):
            assert torch.equal(part, whole[:, -1:])


def test_the_memory_is_let_go_once() -> None:
    events: list[str] = []

    @contextmanager
    def new_memory() -> Iterator[ChunkMemory]:
        events.append("made")
        with HostMemory() as memory:
            yield memory
        events.append("gone")

    model = DRTForCausalLM(tiny_config()).eval()
    with start_reading(model, new_memory=new_memory) as reading:
        reading.read(some_ids(40))
        reading.fork().close()
        assert events == ["made"]
    assert events == ["made", "gone"]


def test_logits_of_a_long_text_are_not_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drt.evaluation.reading._LOGITS_AT_ONCE", 20 * VOCABULARY)
    model = MODELS["llama"]().eval()
    ids, sizes = some_ids(50), []
    model.model.register_forward_hook(lambda *a: sizes.append(a[2].last_hidden_state.shape[1]))
    losses = start_reading(model).losses(ids)
    assert sizes == [20, 20, 10]
    assert_losses(losses[1:], model, ids)


def test_learned_positions_end() -> None:
    model = gpt2(positions=32).eval()
    for beyond in (False, True):
        reading = start_reading(model, beyond_limit=beyond)
        reading.read(some_ids(30))
        with pytest.raises(ValueError, match=r"a gpt2 has 32 positions .*33 tokens"):
            reading.read(some_ids(3))
        with pytest.raises(ValueError, match="33 tokens"):
            reading.losses(some_ids(3))
        # The last token of an answer is not read.
        assert len(reading.answer(some_ids(1), 2).token_ids) == 2
        with pytest.raises(ValueError, match="33 tokens"):
            reading.answer(some_ids(1), 3)
        assert reading.losses(some_ids(2)).shape == (2,)


def test_rotary_positions_go_on_if_asked() -> None:
    model = MODELS["llama"]().eval()
    model.config.max_position_embeddings = 32
    assert position_limit(model.config) == (32, False)
    with pytest.raises(ValueError, match=r"32 positions .*40 tokens .*beyond_limit"):
        start_reading(model).read(some_ids(40))
    ids = some_ids(40)
    losses = start_reading(model, beyond_limit=True).losses(ids)
    assert_losses(losses[1:], model, ids)


@pytest.mark.parametrize("name", ["drt", "landmark attention", "block recurrent"])
def test_models_of_drt_have_no_limit(name: str) -> None:
    model = MODELS[name]().eval()
    model.config.max_position_embeddings = 16
    assert position_limit(model.config) is None
    start_reading(model).read(some_ids(40))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda m: start_reading(m, segment_size=0), "segment_size must be at least 1, got 0"),
        (lambda m: start_reading(m.train()), "is in training mode"),
        (lambda m: start_reading(m).read(some_ids(4)[None]), r"must be \(T,\) int64, got \(1, 4\)"),
        (lambda m: start_reading(m).read(some_ids(4).int()), r"got \(4,\) torch.int32"),
        (lambda m: start_reading(m).answer(some_ids(0), 2), "got 0 tokens of question"),
        (lambda m: start_reading(m).answer(some_ids(2), 0), "num_tokens = 0"),
        (lambda m: start_reading(torch.nn.Linear(2, 2).eval()), "Linear does not take past_key"),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(model: Any, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(model)
