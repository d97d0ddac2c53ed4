"""A run from start to end, and a run that was stopped and went on."""

import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from drt.checkpoints import load_checkpoint
from drt.data import NeedleTask, byte_tokenizer, load_corpus
from drt.training import RunConfig, Stage, TaskMix, load_config, speed, train
from drt.training.batches import NeedleSteps, StepParts, needle_masks, share
from drt.training.callbacks import PROGRESS_FILE, latest_checkpoint
from drt.training.curriculum import LEAD_STEPS, SETTLING_STEPS, Curriculum
from drt.training.materials import make_materials

from .watching import StopAfter, StoppedError, add_callback


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    timed = {"seconds", "tokens_per_second", "tflops"}
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


@pytest.mark.parametrize(
    ("stop", "optimizer", "log_every"),
    # Checkpoints are at every tenth step: not at those of all lines.
    [(43, "adamw", 4), (46, "muon", 1), (55, "muon", 1)],
)
def test_a_stopped_run_goes_on_with_the_same_curve(
    run_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: int,
    optimizer: Any,
    log_every: int,
) -> None:
    training = replace(run_config.training, optimizer=optimizer, log_every=log_every)
    run_config = replace(run_config, training=training)
    train(run_config)
    whole = replace(run_config, output_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        add_callback(StopAfter(stop), patch)
        with pytest.raises(StoppedError):
            train(whole)
    train(whole, resume=True)
    # The stage changes inside the run, at a step after which one of the stops is.
    assert {line["length"] for line in metrics(run_config)} == {128, 256}
    assert metrics(whole) == metrics(run_config)
    models = [
        AutoModelForCausalLM.from_pretrained(Path(c.output_dir) / "model").state_dict()
        for c in (run_config, whole)
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_run_that_goes_on_logs_and_saves_as_often_as_it_is_asked_to(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(run_config.training, num_steps=13, log_every=2, save_every=4)
    with monkeypatch.context() as patch:
        add_callback(StopAfter(5), patch)
        with pytest.raises(StoppedError):
            train(replace(run_config, training=training))
    now = replace(training, log_every=3, save_every=5)
    cut = Path(run_config.output_dir) / "checkpoint-12"
    cut.mkdir()
    train(replace(run_config, training=now), resume=True)
    # A line before each checkpoint, too.
    assert [line["step"] for line in metrics(run_config)] == [2, 4, 5, 6, 9, 10, 12, 13]
    folders = Path(run_config.output_dir).glob("checkpoint-*")
    assert {folder.name for folder in folders} == {"checkpoint-10", "checkpoint-13"}


def test_a_run_leaves_what_is_needed_to_use_and_repeat_it(run_config: RunConfig) -> None:
    short = replace(run_config, training=replace(run_config.training, num_steps=3))
    final = train(short)
    assert {"config.json", "model.safetensors", "tokenizer.json", "run.yaml"} <= {
        path.name for path in final.iterdir()
    }
    lines = metrics(short)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        expected = line["answer_loss"] + 0.1 * line["text_loss"]
        # The Trainer rounds what it logs to float32 sums.
        assert line["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_run_may_hold_the_logits_of_a_few_tokens_only(
    run_config: RunConfig,
    tmp_path: Path,
    largest_tensor: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Operations are counted on tensors without numbers, which hold nothing of their size.
    monkeypatch.setattr(speed, "flops_if_known", lambda model, length: None)
    short = replace(run_config, training=replace(run_config.training, num_steps=3))
    model = {**short.model, "loss_chunk_size": 20}
    chunked = replace(short, model=model, output_dir=str(tmp_path / "chunked"))
    train(short)
    with largest_tensor:
        train(chunked)
    # 256 tokens of 258 entries would be all of them.
    assert largest_tensor.numel < 256 * 258 / 4
    for line, wanted in zip(metrics(chunked), metrics(short), strict=True):
        # Three steps on gradients that differ by float32 rounding.
        assert line == pytest.approx(wanted, rel=1e-3)


def test_an_earlier_run_is_not_overwritten_by_accident(run_config: RunConfig) -> None:
    short = replace(run_config, training=replace(run_config.training, num_steps=2))
    train(short)
    with pytest.raises(ValueError, match="holds an earlier run"):
        train(short)
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(short, seed=5), resume=True)
    train(replace(short, seed=5), overwrite=True)


def test_a_run_that_cannot_begin_leaves_nothing(run_config: RunConfig) -> None:
    wrong = replace(run_config, model={**run_config.model, "retrieval_topk": 0})
    with pytest.raises(ValueError, match="retrieval_topk"):
        train(wrong)
    assert not Path(run_config.output_dir).exists()


def test_a_run_that_cannot_begin_overwrites_nothing(run_config: RunConfig) -> None:
    short = replace(run_config, training=replace(run_config.training, num_steps=1))
    final = train(short)
    llama = {"model_type": "llama", "num_hidden_layers": 1}
    compiled = replace(short.training, compile_layers=True)
    with pytest.raises(ValueError, match="has no DRT layers to compile"):
        train(replace(short, model=llama, chunk_size=16, training=compiled), overwrite=True)
    assert (final / "model.safetensors").is_file()


def test_a_loss_that_is_no_number_is_logged_as_none(run_config: RunConfig) -> None:
    training = replace(run_config.training, num_steps=4, learning_rate=1e30)
    train(replace(run_config, training=training))
    assert math.isnan(metrics(run_config)[-1]["loss"])


def test_stories_can_be_trained_on(run_config: RunConfig, tmp_path: Path) -> None:
    story = {"task": 1, "facts": ["Mary went out."], "question": "Who?", "answer": "Mary"}
    file = tmp_path / "stories.jsonl"
    file.write_text(json.dumps({**story, "supporting": [0]}))
    mapping = asdict(run_config)
    mapping["stages"] = [{"length": 128, "tasks": [{"task": {"facts": str(file), "tasks": [1]}}]}]
    mapping["training"]["num_steps"] = 2
    (tmp_path / "stories.yaml").write_text(yaml.safe_dump(mapping))
    config = load_config(tmp_path / "stories.yaml")
    train(config)
    assert metrics(config)[-1]["answer_loss"] > 0
    assert load_config(Path(config.output_dir) / "run.yaml") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_questions": 40}, r"stages\.1\.tasks\.0: "),
        ({"num_digits": 3}, r"evaluation\.multi, which training\.evaluate_every asks for at 256"),
    ],
)
def test_what_training_would_come_to_later_is_refused_before(
    run_config: RunConfig, change: dict[str, Any], message: str
) -> None:
    first, last = run_config.stages
    task = replace(last.tasks[0].task, **change)
    many = NeedleTask(kind="multi", num_keys=16, num_questions=16)
    wrong = replace(
        run_config,
        stages=[first, replace(last, tasks=[TaskMix(task)])],
        evaluation=replace(run_config.evaluation, multi=many),
        training=replace(run_config.training, evaluate_every=50),
    )
    with pytest.raises(ValueError, match=message):
        train(wrong)
    assert not Path(run_config.output_dir).exists()


def test_a_finished_run_that_is_resumed_stays_as_it_is(run_config: RunConfig, capsys: Any) -> None:
    short = replace(run_config, training=replace(run_config.training, num_steps=2))
    final, folder = train(short), Path(short.output_dir)
    shutil.rmtree(folder / "checkpoint-2")
    files = [folder / "metrics.jsonl", final / "model.safetensors"]
    before = [(file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    assert train(short, resume=True) == final
    assert "holds a finished run: there is nothing to resume" in capsys.readouterr().out
    assert [(file.read_bytes(), file.stat().st_mtime_ns) for file in files] == before
    with pytest.raises(ValueError, match="another configuration"):
        train(replace(short, seed=5), resume=True)


def test_a_run_without_a_checkpoint_says_that_it_begins_anew(
    run_config: RunConfig, capsys: Any
) -> None:
    train(replace(run_config, training=replace(run_config.training, num_steps=1)), resume=True)
    assert "holds no checkpoint to resume from: training begins at step 0" in (
        capsys.readouterr().out
    )


def test_a_folder_of_other_things_is_left_alone(run_config: RunConfig) -> None:
    folder = Path(run_config.output_dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            train(run_config, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_a_checkpoint_is_a_model_too_and_without_its_last_file_not_whole(
    run_config: RunConfig, tmp_path: Path
) -> None:
    short = replace(run_config, training=replace(run_config.training, num_steps=20))
    train(short)
    folder = Path(short.output_dir)
    assert latest_checkpoint(folder) == folder / "checkpoint-20"
    last, final = load_checkpoint(folder / "checkpoint-20"), load_checkpoint(folder)
    assert last.precision == final.precision == short.precision
    assert all(map(torch.equal, last.model.parameters(), final.model.parameters()))
    file = folder / "checkpoint-20" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in sorted(weights)[1:]}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of a DRTFor.* as {min(weights)}"):
        load_checkpoint(folder / "checkpoint-20")
    (folder / "checkpoint-20" / PROGRESS_FILE).unlink()
    assert latest_checkpoint(folder) == folder / "checkpoint-10"
    shutil.rmtree(folder / "checkpoint-10")
    assert latest_checkpoint(folder) is None


def test_the_curriculum_moves_on_when_the_loss_is_low_and_settled(run_config: RunConfig) -> None:
    tasks = run_config.stages[0].tasks
    curriculum = Curriculum([Stage(128, tasks, advance_below=0.5), Stage(256, tasks)])
    for step in range(SETTLING_STEPS + 10):
        curriculum.observe(step, 1.0)
    assert curriculum.starts == [0]
    step = SETTLING_STEPS + 10
    while len(curriculum.starts) == 1:
        curriculum.observe(step, 0.0)
        step += 1
    # 1.0 decays by 0.95 a step: below 0.5 after 14 steps.
    assert curriculum.starts == [0, SETTLING_STEPS + 10 + 13 + LEAD_STEPS]
    assert curriculum.stage_at(curriculum.starts[1] - 1).length == 128
    assert curriculum.stage_at(curriculum.starts[1]).length == 256


def test_a_batch_is_a_function_of_the_step(run_config: RunConfig) -> None:
    corpus = load_corpus(None, byte_tokenizer())
    first, second = (
        NeedleSteps(run_config, corpus, Curriculum(run_config.stages), chunk_size=32)
        for _ in range(2)
    )
    second.rows(3)
    assert torch.equal(first.rows(7)["input_ids"], second.rows(7)["input_ids"])
    assert not torch.equal(first.rows(7)["input_ids"], first.rows(8)["input_ids"])


def test_questions_end_at_the_models_chunks_or_at_those_that_are_given(
    run_config: RunConfig, small_model: dict[str, Any]
) -> None:
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    for changes, wanted in (
        ({}, small_model["chunk_size"]),
        ({"chunk_size": 32}, 32),
        ({"model": llama}, 64),
        ({"model": llama, "chunk_size": 16}, 16),
    ):
        source = make_materials(replace(run_config, **changes)).source
        assert isinstance(source, NeedleSteps)
        assert source.chunk_size == wanted
    # Those that are asked on the way too.
    asked = replace(
        run_config,
        model=llama,
        chunk_size=16,
        stages=[replace(run_config.stages[0], length=112)],
        training=replace(run_config.training, tokens_per_step=224, num_steps=1, evaluate_every=1),
        output_dir=f"{run_config.output_dir}-asked",
    )
    train(asked)
    assert "single_exact_match" in metrics(asked)[-1] | metrics(asked)[0]
    # With the chunks of the model that it begins with, whose rows would not fit.
    saved = train(replace(run_config, training=replace(run_config.training, num_steps=1)))
    begun = replace(run_config, model={}, initial=str(saved))
    source = make_materials(begun).source
    assert isinstance(source, NeedleSteps)
    assert source.chunk_size == small_model["chunk_size"]
    with pytest.raises(ValueError, match="row length 128 must be a multiple of chunk_size 24"):
        make_materials(replace(begun, model={"chunk_size": 24}))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_parts_are_the_rows_of_a_step(run_config: RunConfig, num_parts: int) -> None:
    corpus = load_corpus(None, byte_tokenizer())
    source = NeedleSteps(run_config, corpus, Curriculum(run_config.stages), chunk_size=32)
    parts = StepParts(source, num_steps=60, num_parts=num_parts)
    assert len(parts) == 60 * num_parts
    made = [parts[5 * num_parts + part] for part in range(num_parts)]
    for name, whole in source.rows(5).items():
        assert torch.equal(torch.cat([part[name] for part in made]), whole)
    assert [int(part["step"]) for part in made] == [5] * num_parts
    with pytest.raises(IndexError):
        parts[60 * num_parts]


def test_losses_of_answers_and_text_by_hand() -> None:
    each = torch.rand(5)
    mask = torch.tensor([[False, False, True, True, False]])
    answer, first, text = (float((share(m)[0] * each).sum()) for m in needle_masks(mask))
    assert answer == pytest.approx(float(each[2:4].mean()))
    assert first == pytest.approx(float(each[2]))
    assert text == pytest.approx(float(each[[1, 4]].mean()))
