"""What `generate`, `read` and `Trainer` must do with every transformers that is supported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from drt import DRTForCausalLM
from drt.data.tokenization import byte_tokenizer
from drt.testing import tiny_config

GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

# The bound of the specification: float32 logits of order 1 after a few layers.
TOLERANCE = 1e-4


@pytest.fixture(params=[[1, 1], []], ids=["groups", "groupless"])
def model(request: pytest.FixtureRequest) -> DRTForCausalLM:
    return DRTForCausalLM(tiny_config(retrieval_groups=request.param)).eval()


@pytest.mark.parametrize("window", [24, 64])
@pytest.mark.parametrize("length", [6, 30])
@torch.no_grad()
def test_a_row_selected_from_longer_ones_goes_on_as_if_alone(window: int, length: int) -> None:
    model = DRTForCausalLM(tiny_config(sliding_window=window)).eval()
    ids = torch.randint(1, 61, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    state, alone = model.new_state(2), model.new_state(1)
    model(ids, attention_mask=mask, past_key_values=state)
    model(ids[1:, :5], past_key_values=alone)
    state.batch_select_indices(torch.tensor([1]))
    rest = torch.randint(1, 61, (1, length))
    got = model(rest, past_key_values=state).logits
    assert (got - model(rest, past_key_values=alone).logits).abs().max() < TOLERANCE


def test_a_short_prompt_beside_a_long_one_keeps_what_its_row_has_read(
    model: DRTForCausalLM,
) -> None:
    before = torch.randint(1, 61, (2, 40))
    prompts = torch.randint(1, 61, (2, model.reach + 50))
    mask = torch.ones_like(prompts)
    mask[1, :-5] = 0
    both, alone = model.new_state(2), model.new_state(1)
    model.read(before, both)
    model.read(before[1:], alone)
    options = {"max_new_tokens": 8, **GREEDY}
    made = model.generate(prompts, attention_mask=mask, past_key_values=both, **options)
    wanted = model.generate(prompts[1:, -5:], past_key_values=alone, **options)
    assert torch.equal(made[1, -8:], wanted[0, -8:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_embeddings_are_prompts_like_ids(model: DRTForCausalLM, side: str) -> None:
    ids = torch.randint(1, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, : 4 if side == "left" else None] = 0
    mask[1, : 6 if side == "right" else 0] = 1
    embeddings = model.get_input_embeddings()(ids)
    options = {"attention_mask": mask, "max_new_tokens": 6, **GREEDY}
    made = model.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(made, model.generate(ids, **options)[:, 9:])


def test_stop_strings() -> None:
    model = DRTForCausalLM(tiny_config(vocab_size=258)).eval()
    tokenizer, state = byte_tokenizer(), model.new_state()
    ids = tokenizer("once upon", return_tensors="pt").input_ids
    with torch.no_grad():
        model.lm_head.weight[ord("a")] += 10 * model.lm_head.weight.abs().max()
    stopped = model.generate(
        ids,
        max_new_tokens=40,
        stop_strings=["aaa"],
        tokenizer=tokenizer,
        past_key_values=state,
        **GREEDY,
    )
    free = model.generate(ids, max_new_tokens=40, **GREEDY)
    assert torch.equal(stopped, free[:, : stopped.shape[1]])
    assert state.num_tokens == [stopped.shape[1]]


@pytest.mark.parametrize("name", ["chunk_ends", "document_ids", "position_ids"])
def test_arguments_of_forward_that_generate_cannot_use_are_refused(name: str) -> None:
    model = DRTForCausalLM(tiny_config()).eval()
    ids = torch.randint(1, 61, (2, 9))
    with pytest.raises(ValueError, match=name):
        model.generate(ids, max_new_tokens=3, **GREEDY, **{name: torch.zeros_like(ids)})


def test_the_trainer_evaluates_and_predicts(tmp_path: Path) -> None:
    model = DRTForCausalLM(tiny_config())
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 61, (3, 20))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=rows)  # pyright: ignore[reportArgumentType]
    assert trainer.evaluate()["eval_loss"] > 0
    assert trainer.predict(rows).predictions.shape == (3, 20, 61)  # pyright: ignore


@pytest.mark.parametrize("field", [{"sliding_window": 12}, {"retrieval_topk": 2}])
def test_a_state_is_of_a_configuration_too(tmp_path: Path, field: dict[str, int]) -> None:
    models = []
    for fields in ({}, field):
        torch.manual_seed(0)
        models.append(DRTForCausalLM(tiny_config(**fields)).eval())
    state = models[0].new_state()
    models[0].read(torch.randint(0, 61, (1, 40)), state)
    models[0].save_state(state, tmp_path / "state")
    with pytest.raises(ValueError, match="another model"):
        models[1].load_state(tmp_path / "state")
    short = models[0].new_state()
    models[0].read(torch.randint(0, 61, (1, 4)), short)
    with pytest.raises(ValueError, match="holds another memory"):
        models[0].save_state(short, tmp_path / "state")
