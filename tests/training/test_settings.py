"""Each setting of a run does what it says: rates, clipping, decay, weights, stages."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from drt.data import Corpus, NeedleTask, byte_tokenizer, load_corpus
from drt.training import RunConfig, Stage, TaskMix, curriculum, run, speed, train
from drt.training.arguments import training_arguments
from drt.training.batches import NeedleSteps
from drt.training.curriculum import LEAD_STEPS, SETTLING_STEPS, SMOOTHING, Curriculum
from drt.training.materials import make_materials

from .watching import StopAfter, StoppedError, add_callback

NUM_LAYERS = 2
LINEAR = {
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
}
DECAYED = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    *(f"model.layers.{layer}.{part}.weight" for layer in range(NUM_LAYERS) for part in LINEAR),
    # The upper layer retrieves.
    "model.layers.1.cross_attn.q_proj.weight",
    "model.layers.1.cross_attn.o_proj.weight",
    *(f"model.chunk_encoder.layers.0.{part}.weight" for part in LINEAR),
    "model.chunk_encoder.k_proj.weight",
    "model.chunk_encoder.v_proj.weight",
}
NOT_DECAYED = {
    "model.landmark",
    "model.norm.weight",
    "model.query_norms.0.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.post_attention_layernorm.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.cross_attn_layernorm.weight",
    "model.layers.1.post_attention_layernorm.weight",
    "model.chunk_encoder.input_layernorm.weight",
    "model.chunk_encoder.norm.weight",
    "model.chunk_encoder.layers.0.input_layernorm.weight",
    "model.chunk_encoder.layers.0.post_attention_layernorm.weight",
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "attention_bias": True,
}
LLAMA_DECAYED = {
    "model.embed_tokens.weight",
    "lm_head.weight",
    *(f"model.layers.{layer}.{part}.weight" for layer in range(NUM_LAYERS) for part in LINEAR),
}
LLAMA_NOT_DECAYED = {
    "model.norm.weight",
    *(f"model.layers.{layer}.input_layernorm.weight" for layer in range(NUM_LAYERS)),
    *(f"model.layers.{layer}.post_attention_layernorm.weight" for layer in range(NUM_LAYERS)),
    *(f"model.layers.{n}.self_attn.{part}_proj.bias" for n in range(NUM_LAYERS) for part in "qkvo"),
}


@pytest.fixture(scope="module")
def haystack() -> Corpus:
    return load_corpus(None, byte_tokenizer())


@pytest.fixture
def settings(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Eight steps of two micro-batches; every setting is another than its default."""
    # It takes as long as all the steps, and other tests see to it.
    monkeypatch.setattr(speed, "flops_if_known", lambda model, length: None)
    changes: dict[str, Any] = {
        "num_steps": 8,
        "num_micro_batches": 2,
        "learning_rate": 1e-2,
        "final_learning_rate": 2e-3,
        "warmup_steps": 4,
        "weight_decay": 0.5,
        "adam_beta2": 0.8,
        "max_grad_norm": 0.01,
        "text_loss_weight": 0.25,
        "first_token_weight": 0.5,
    }
    return replace(
        run_config,
        model={**run_config.model, "tie_word_embeddings": False},
        training=replace(run_config.training, **changes),
        stages=[Stage(64, run_config.stages[0].tasks)],
    )


class Watch(TrainerCallback):
    """Notes of each step: the rates, the gradients that are used, and weights before and after."""

    def __init__(self) -> None:
        self.rates: list[set[float]] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []
        self.after: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        parameters = dict(given["model"].named_parameters())
        self.rates.append({group["lr"] for group in given["optimizer"].param_groups})
        self.gradients.append({name: p.grad.double() for name, p in parameters.items()})
        self.before.append({name: p.detach().double() for name, p in parameters.items()})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        parameters = given["model"].named_parameters()
        self.after.append({name: p.detach().double() for name, p in parameters})


def lines_of(config: RunConfig) -> list[dict[str, Any]]:
    timed = {"seconds", "tokens_per_second"}
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rates_warm_up_and_fall_and_gradients_are_clipped(
    settings: RunConfig, haystack: Corpus, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    config = replace(settings, training=replace(settings.training, optimizer=optimizer))
    watch = Watch()
    add_callback(watch, monkeypatch)
    train(config, corpus=haystack)
    # A line from 0 to 1e-2 in four steps, then 2e-3 + (1e-2 - 2e-3) (1 + cos(pi x)) / 2 at
    # x = 0, 1/4, 1/2 and 3/4 of the steps after it; 2e-3 itself follows the last step.
    half = math.sqrt(0.5)
    wanted = [0.0, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 6e-3 + 4e-3 * half, 6e-3, 6e-3 - 4e-3 * half]
    lines = lines_of(config)
    assert [line["learning_rate"] for line in lines] == pytest.approx(wanted)
    # Of all groups: one rate a step, the one that is logged.
    assert watch.rates == [{line["learning_rate"]} for line in lines]
    for line, gradients in zip(lines, watch.gradients, strict=True):
        # What is logged is the norm before; the largest of these would not be clipped to 1.
        assert line["grad_norm"] > 0.05
        norm = math.sqrt(sum(float((each**2).sum()) for each in gradients.values()))
        # PyTorch divides by the norm plus 1e-6.
        assert norm == pytest.approx(0.01, rel=1e-4)


def test_gradients_below_the_limit_are_not_clipped(
    settings: RunConfig, haystack: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ten times the usual ones, above the Trainer's own limit of 1.
    training = replace(
        settings.training,
        num_steps=2,
        max_grad_norm=1000.0,
        text_loss_weight=10.0,
        first_token_weight=10.0,
    )
    watch = Watch()
    add_callback(watch, monkeypatch)
    config = replace(settings, training=training)
    train(config, corpus=haystack)
    for line, gradients in zip(lines_of(config), watch.gradients, strict=True):
        norm = math.sqrt(sum(float((each**2).sum()) for each in gradients.values()))
        assert 1.5 < norm < 1000.0
        # Float32 sums of squares.
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_a_run_moves_its_weights_as_adamw_written_out_does(
    settings: RunConfig, haystack: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(settings, training=replace(settings.training, num_steps=6))
    watch = Watch()
    add_callback(watch, monkeypatch)
    train(config, corpus=haystack)
    rates = [0.0, 2.5e-3, 5e-3, 7.5e-3, 1e-2, 6e-3]
    mean = {name: torch.zeros_like(each) for name, each in watch.before[0].items()}
    square = {name: torch.zeros_like(each) for name, each in watch.before[0].items()}
    assert mean.keys() == DECAYED | NOT_DECAYED
    for index, rate in enumerate(rates):
        for name, gradient in watch.gradients[index].items():
            mean[name] = 0.9 * mean[name] + 0.1 * gradient
            square[name] = 0.8 * square[name] + 0.2 * gradient**2
            first = mean[name] / (1 - 0.9 ** (index + 1))
            second = square[name] / (1 - 0.8 ** (index + 1))
            decay = 0.5 if name in DECAYED else 0.0
            wanted = (1 - rate * decay) * watch.before[index][name]
            wanted = wanted - rate * first / (second.sqrt() + 1e-8)
            # Weights of 1 are rounded to 6e-8; moments in float32 are off by some 1e-6 of the
            # rate. A decay that is missing or too much moves the norms by 1e-3.
            torch.testing.assert_close(watch.after[index][name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "optimizer", "decayed", "others"),
    [
        ({}, "adamw", DECAYED, NOT_DECAYED),
        ({}, "muon", DECAYED, NOT_DECAYED),
        (LLAMA, "adamw", LLAMA_DECAYED, LLAMA_NOT_DECAYED),
        (LLAMA, "muon", LLAMA_DECAYED, LLAMA_NOT_DECAYED),
    ],
    ids=["drt-adamw", "drt-muon", "llama-adamw", "llama-muon"],
)
def test_matrices_are_decayed_and_norms_biases_and_vectors_are_not(
    settings: RunConfig,
    haystack: Corpus,
    model: dict[str, Any],
    optimizer: Any,
    decayed: set[str],
    others: set[str],
) -> None:
    config = replace(
        settings,
        model=model or settings.model,
        # Rows of 64 tokens have room for questions at the ends of chunks of 16.
        chunk_size=16,
        training=replace(settings.training, optimizer=optimizer),
    )
    materials = make_materials(config, haystack)
    arguments = training_arguments(config, materials.model)
    trainer = run._trainer(config, materials, arguments, title="test")
    names = {id(each): name for name, each in materials.model.named_parameters()}
    found = {
        names[id(each)]: group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for each in group["params"]
    }
    assert found == {**dict.fromkeys(decayed, 0.5), **dict.fromkeys(others, 0.0)}


def test_weights_of_the_losses_of_a_needle_batch_by_hand(
    settings: RunConfig, haystack: Corpus
) -> None:
    task = NeedleTask(kind="single", num_questions=2, num_digits=3)
    config = replace(
        settings,
        stages=[Stage(128, [TaskMix(task)])],
        training=replace(settings.training, tokens_per_step=256),
    )
    source = NeedleSteps(config, haystack, Curriculum(config.stages), chunk_size=16)
    made = source.rows(0)
    weights, answers = made["token_weights"], made["answer_mask"]
    # Two rows with two answers of three bytes each: 12 tokens, of which 4 are the first, and 256
    # less those and less the first of each row of text.
    assert answers.sum().item() == 12
    for row in range(2):
        places = answers[row].nonzero().flatten().tolist()
        for start in (places[0], places[3]):
            found = weights[row, start : start + 3].tolist()
            assert found == pytest.approx([1 / 12 + 0.5 / 4, 1 / 12, 1 / 12])
    assert weights[:, 0].tolist() == [0.0, 0.0]
    text = weights[:, 1:][~answers[:, 1:]]
    assert text.tolist() == pytest.approx([0.25 / 242] * 242)
    # Answers 1, first tokens 0.5, text 0.25.
    assert weights.sum().item() == pytest.approx(1.75)


def test_the_loss_of_a_run_is_weighted_as_it_says(settings: RunConfig, haystack: Corpus) -> None:
    config = replace(settings, training=replace(settings.training, num_steps=3))
    train(config, corpus=haystack)
    for line in lines_of(config):
        wanted = line["answer_loss"] + 0.5 * line["first_token_loss"] + 0.25 * line["text_loss"]
        # The Trainer rounds what it logs to float32 sums.
        assert line["loss"] == pytest.approx(wanted, rel=1e-4)


def test_a_curriculum_that_was_saved_goes_on_with_its_average(
    run_config: RunConfig, tmp_path: Path
) -> None:
    tasks = run_config.stages[0].tasks
    stages = [Stage(128, tasks, 0.5), Stage(192, tasks, 0.25), Stage(256, tasks)]
    first = Curriculum(stages)
    for step in range(SETTLING_STEPS):
        first.observe(step, 1.0)
    # 0.95 ** 14 is the first power below 0.5; saved after six of them.
    for step in range(SETTLING_STEPS, SETTLING_STEPS + 6):
        first.observe(step, 0.0)
    first.save(tmp_path / "progress.json")
    second = Curriculum(stages)
    second.load(tmp_path / "progress.json")
    assert second.average == pytest.approx(0.95**6)
    step = SETTLING_STEPS + 6
    while len(second.starts) == 1:
        assert step < 200
        second.observe(step, 0.0)
        step += 1
    began = SETTLING_STEPS + 13 + LEAD_STEPS
    assert second.starts == [0, began]
    # The next stage has an average of its own, which is saved as well.
    second.save(tmp_path / "progress.json")
    third = Curriculum(stages)
    third.load(tmp_path / "progress.json")
    third.observe(began - 1, 100.0)
    assert (third.starts, third.average) == ([0, began], None)
    third.observe(began, 2.0)
    assert third.average == pytest.approx(2.0)


def first_below(losses: list[float], limit: float, *, settling: int, average_from: int) -> int:
    """The step of a stage whose smoothed loss is low enough, with an average that begins later."""
    average = losses[average_from]
    for step in range(average_from, len(losses)):
        average = SMOOTHING * average + (1 - SMOOTHING) * losses[step]
        if step >= settling and average < limit:
            return step
    raise AssertionError("no such step")


def test_a_run_that_is_stopped_inside_a_stage_goes_on_with_its_average(
    settings: RunConfig, haystack: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum, "SETTLING_STEPS", 6)
    tasks, limit, saved = settings.stages[0].tasks, 4.75, 10
    config = replace(
        settings,
        stages=[Stage(64, tasks, advance_below=limit), Stage(128, tasks)],
        training=replace(settings.training, num_steps=26, num_micro_batches=1, save_every=saved),
    )
    train(config, corpus=haystack)
    lines = lines_of(config)
    losses = [line["answer_loss"] for line in lines]
    advanced = first_below(losses, limit, settling=6, average_from=0)
    lengths = [line["length"] for line in lines]
    changed = advanced + LEAD_STEPS
    assert lengths == [64] * changed + [128] * (26 - changed)
    # The stop is in the stage, and without the average of the steps before it would end earlier.
    assert saved + 3 < advanced
    assert first_below(losses, limit, settling=6, average_from=saved) < advanced - 3
    stopped = replace(config, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        add_callback(StopAfter(saved + 3), patch)
        with pytest.raises(StoppedError):
            train(stopped, corpus=haystack)
    train(stopped, resume=True, corpus=haystack)
    assert lines_of(stopped) == lines
    one, other = (
        load_file(Path(each.output_dir) / "model" / "model.safetensors")
        for each in (config, stopped)
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
