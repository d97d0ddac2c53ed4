"""`generate` against the full forward, row by row, and what it does to states."""

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from drt import DRTForCausalLM
from drt.testing import tiny_config

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(params=["chunk", "landmark"])
def model(request: pytest.FixtureRequest) -> DRTForCausalLM:
    return DRTForCausalLM(tiny_config(retrieval_onset=request.param)).eval()


def next_logits(model: DRTForCausalLM, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """(B, V) after `ids`, the chunk that is open at the prompt's end closed there."""
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[:, prompt - 1] = model.config.close_prompt_chunk
    with torch.no_grad():
        return model(ids, chunk_ends=ends).logits[:, -1]


def greedy(model: DRTForCausalLM, ids: torch.Tensor, count: int) -> torch.Tensor:
    prompt = ids.shape[1]
    for _ in range(count):
        ids = torch.cat([ids, next_logits(model, ids, prompt).argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("closes", [True, False])
@pytest.mark.parametrize("prompt", [1, 15, 16, 17, 45])
def test_greedy_is_the_argmax_of_the_full_forward(
    model: DRTForCausalLM, closes: bool, prompt: int
) -> None:
    model.config.close_prompt_chunk = closes
    ids = torch.randint(1, 61, (2, prompt))
    made = model.generate(ids, max_new_tokens=30, **GREEDY)
    assert torch.equal(made, greedy(model, ids, 30))
    in_pieces = model.generate(ids, max_new_tokens=30, prefill_chunk_size=7, **GREEDY)
    assert torch.equal(in_pieces, made)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_unequal_prompts_give_the_text_of_each_alone(model: DRTForCausalLM, side: str) -> None:
    prompts = [torch.randint(1, 61, (1, n)) for n in (3, 50, 17, 33)]
    width, ids = 52, torch.zeros(4, 52, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        length = prompt.shape[1]
        start = {"left": width - length, "right": 0, "both": (width - length) // 2}[side]
        ids[row, start : start + length] = prompt
    made = model.generate(ids, attention_mask=(ids > 0).long(), max_new_tokens=25, **GREEDY)
    for row, prompt in enumerate(prompts):
        assert torch.equal(made[row, width:], greedy(model, prompt, 25)[0, prompt.shape[1] :])


def beam_search(model: DRTForCausalLM, ids: torch.Tensor, beams: int, count: int) -> torch.Tensor:
    """The best of all continuations that beam search keeps, by full forwards of one row."""
    prompt, kept = ids.shape[1], [(0.0, ids)]
    for _ in range(count):
        grown = []
        for score, sequence in kept:
            logs = next_logits(model, sequence, prompt).log_softmax(-1)[0]
            for value, token in zip(*logs.topk(2 * beams), strict=True):
                longer = torch.cat([sequence, token.view(1, 1)], dim=1)
                grown.append((score + float(value), longer))
        kept = sorted(grown, key=lambda item: -item[0])[:beams]
    return kept[0][1]


def test_beam_search_finds_what_uncached_beam_search_finds(model: DRTForCausalLM) -> None:
    ids = torch.randint(1, 61, (2, 43))
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    made = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=10, **GREEDY)
    wanted = [beam_search(model, row[None], 3, 10) for row in (ids[0, 10:], ids[1])]
    for row, best in enumerate(wanted):
        assert torch.equal(made[row, 43:], best[0, -10:])


def test_prompts_are_read_once_whatever_is_returned(model: DRTForCausalLM) -> None:
    rows: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, i, _o: rows.append(i[0].shape[0]))
    ids = torch.randint(1, 61, (2, 45))
    out = model.generate(
        ids,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=9,
        return_dict_in_generate=True,
        eos_token_id=None,
    )
    assert out.sequences.shape == (6, 54)
    assert torch.equal(out.sequences[:, :45], ids.repeat_interleave(3, dim=0))
    # Two forwards for the prompt, then one a token.
    assert rows == [2, 2, *[6] * 8]


def test_a_conversation_is_one_text_with_chunks_closed_at_the_ends_of_prompts(
    model: DRTForCausalLM,
) -> None:
    first, second = torch.randint(1, 61, (2, 20)), torch.randint(1, 61, (2, 23))
    state = model.new_state(2)
    said = model.generate(first, past_key_values=state, max_new_tokens=11, **GREEDY)
    assert state.num_tokens == [31, 31]
    dropped = state.fork()
    model.generate(second, past_key_values=dropped, max_new_tokens=3, **GREEDY)
    answer = model.generate(second, past_key_values=state, max_new_tokens=12, **GREEDY)
    text = torch.cat([said, second], dim=1)
    for _ in range(12):
        ends = torch.zeros_like(text, dtype=torch.bool)
        ends[:, 19] = ends[:, said.shape[1] + 22] = True
        with torch.no_grad():
            token = model(text, chunk_ends=ends).logits[:, -1].argmax(-1, keepdim=True)
        text = torch.cat([text, token], dim=1)
    assert torch.equal(answer[:, 23:], text[:, -12:])


def test_ends_and_padding_of_finished_rows_stay_out_of_the_state(model: DRTForCausalLM) -> None:
    ids = torch.randint(1, 61, (3, 30))
    free = greedy(model, ids, 15)[:, 30:]
    # A token that ends row 0 early, another row later or never.
    end = int(free[0, 2])
    for pad in (0, end):
        state = model.new_state(3)
        made = model.generate(
            ids,
            past_key_values=state,
            max_new_tokens=15,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=end,
        )[:, 30:]
        for row in range(3):
            found = (free[row] == end).nonzero().flatten().tolist()
            said = found[0] + 1 if found else 15
            assert torch.equal(made[row, :said], free[row, :said])
            assert state.num_tokens[row] == 30 + said


def test_beams_and_several_returns_leave_a_given_state_as_it_was(model: DRTForCausalLM) -> None:
    state = model.new_state(1)
    model(torch.randint(1, 61, (1, 40)), past_key_values=state)
    ids = torch.randint(1, 61, (1, 9))
    model.generate(ids, past_key_values=state, num_beams=3, max_new_tokens=8, **GREEDY)
    assert state.num_tokens == [40]
    once = model.generate(ids, past_key_values=state.fork(), max_new_tokens=8, **GREEDY)
    again = model.generate(ids, past_key_values=state, max_new_tokens=8, **GREEDY)
    assert torch.equal(once, again)


def test_ids_that_were_read_are_not_read_twice(model: DRTForCausalLM) -> None:
    state = model.new_state(1)
    ids = torch.randint(1, 61, (1, 40))
    model.read(ids[:, :30], state)
    model(ids[:, 30:35], past_key_values=state)
    with pytest.raises(ValueError, match="begin with the 35 tokens that the state has read"):
        model.generate(ids, past_key_values=state, max_new_tokens=2, **GREEDY)
    mask = torch.ones(1, 75, dtype=torch.int64)
    out = model.generate(
        ids, attention_mask=mask, past_key_values=state, max_new_tokens=2, **GREEDY
    )
    assert out.shape == (1, 42)
    assert state.num_tokens == [77]


def test_processors_criteria_and_streamers_see_the_prompt(model: DRTForCausalLM) -> None:
    ids = torch.randint(1, 61, (1, 40))
    seen: list[torch.Tensor] = []

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids)
        return scores

    class Stream(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    stream = Stream()
    made = model.generate(
        ids,
        max_new_tokens=6,
        logits_processor=LogitsProcessorList([process]),
        stopping_criteria=StoppingCriteriaList([lambda i, _, **__: i[:, 40:41].sum(1) < 0]),
        streamer=stream,
        **GREEDY,
    )
    assert torch.equal(seen[0], ids)
    assert stream.tokens == [*made[0].tolist(), -1]


def test_embeddings_can_be_the_prompt(model: DRTForCausalLM) -> None:
    ids = torch.randint(1, 61, (2, 20))
    embeddings = model.get_input_embeddings()(ids)
    made = model.generate(inputs_embeds=embeddings, max_new_tokens=9, **GREEDY)
    assert torch.equal(made, greedy(model, ids, 9)[:, 20:])


def test_embeddings_are_read_in_segments_that_are_asked_for(model: DRTForCausalLM) -> None:
    ids = torch.randint(1, 61, (2, 45))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    embeddings = model.get_input_embeddings()(ids)
    widths: list[int] = []
    model.model.layers[0].register_forward_hook(lambda _m, i, _o: widths.append(i[0].shape[1]))
    made = model.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        prefill_chunk_size=7,
        max_new_tokens=9,
        **GREEDY,
    )
    # Seven tokens, and a landmark at most for each row's closed chunk.
    assert max(widths) <= 8
    assert torch.equal(made[1], greedy(model, ids[1:], 9)[0, 45:])
    assert torch.equal(made[0], greedy(model, ids[:1, 20:], 9)[0, 25:])
    with pytest.raises(ValueError, match="prefill_chunk_size must be at least 1, got 0"):
        model.generate(inputs_embeds=embeddings, prefill_chunk_size=0, max_new_tokens=1, **GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static' is not supported"),
        ({"use_cache": False}, "use_cache=False is not supported"),
        ({"past_key_values": object()}, "must be a DRTState, got object"),
        ({"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "prompt 1 has no token"),
        (
            {"attention_mask": torch.tensor([[0, 1], [1, 1]])},
            "2 rows of 2 columns, the prompt has 2 rows of 3",
        ),
        (
            {"attention_mask": torch.tensor([[0, 1, 1]])},
            "1 rows of 3 columns, the prompt has 2 rows of 3",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(
    model: DRTForCausalLM, arguments: dict[str, Any], message: str
) -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, max_new_tokens=2, **GREEDY, **arguments)
