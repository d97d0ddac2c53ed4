"""One process or two, stopped, killed or not: the same run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from packaging.version import Version
from safetensors.torch import load_file
from transformers import TrainerCallback

from drt.data import Corpus, byte_tokenizer, load_corpus
from drt.data.prepared import CorpusConfig, find_sources, prepare
from drt.layers import DRTMLP
from drt.training import RunConfig, Stage, TextData, curriculum, run, save_config, speed, train
from drt.training.batches import StepParts
from drt.training.callbacks import PROGRESS_FILE, latest_checkpoint
from drt.training.trainer import RunTrainer

from .processes import run_processes
from .watching import add_callback

TIMED = {"seconds", "tokens_per_second", "tflops"}


@pytest.fixture(scope="module")
def haystack() -> Corpus:
    return load_corpus(None, byte_tokenizer())


@pytest.fixture
def needles(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Seven steps, the last of them on longer rows; a checkpoint after three and after six."""
    monkeypatch.setattr(curriculum, "SETTLING_STEPS", 1)
    # It takes as long as all the steps, and other tests see to it.
    monkeypatch.setattr(speed, "flops_if_known", lambda model, length: None)
    tasks = run_config.stages[0].tasks
    return replace(
        run_config,
        stages=[Stage(64, tasks, advance_below=100.0), Stage(128, tasks)],
        training=replace(run_config.training, num_steps=7, tokens_per_step=512, save_every=3),
    )


@pytest.fixture
def text(needles: RunConfig, tmp_path: Path) -> RunConfig:
    for split in ("train", "validation"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "texts" / split / f"{number}.txt").write_text(f"{split} {number}, " * 30)
    kind = CorpusConfig(tokenizer="bytes")
    prepared = tmp_path / "prepared"
    prepare(kind, byte_tokenizer(), find_sources(kind, [tmp_path / "texts"]), prepared)
    data = TextData(str(prepared), length=64, validation_rows=2)
    training = replace(needles.training, evaluate_every=3)
    return replace(needles, stages=[], text=data, training=training)


def in_parts(config: RunConfig, name: str, micro_batches: int, **training: Any) -> RunConfig:
    """The run in another folder and number of micro-batches."""
    changed = replace(config.training, num_micro_batches=micro_batches, **training)
    folder = Path(config.output_dir).parent / name
    return replace(config, output_dir=str(folder), training=changed)


def run_in(config: RunConfig, processes: int, haystack: Corpus | None, **options: Any) -> list[int]:
    """Train in so many processes, and give what they exit with."""

    def work(rank: int) -> None:
        train(config, corpus=haystack, **options)

    return run_processes(work, processes, Path(config.output_dir).parent)


def curve(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def weights(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir) / "model" / "model.safetensors")


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    """Bit for bit."""
    assert curve(one) == curve(other)
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def assert_close_run(one: RunConfig, other: RunConfig) -> None:
    """To the order of float32 sums.

    A gradient summed in another order is off by some 1e-7 of itself; AdamW moves a weight whose
    gradient is no more than that by up to the learning rate, 3e-3, either way: so do few weights.
    What is retrieved is rounded to 4 places before it is logged.
    """
    for line, wanted in zip(curve(one), curve(other), strict=True):
        assert line == pytest.approx(wanted, rel=1e-4, abs=2e-4)
    found, wanted = weights(one), weights(other)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["needles", "text"])
def test_two_processes_are_two_micro_batches(
    kind: str, haystack: Corpus, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(kind)
    one, two = in_parts(config, "one", 2), in_parts(config, "two", 1)
    assert run_in(one, 1, haystack) == [0]
    assert run_in(two, 2, haystack) == [0, 0]
    # Two gradients have one sum; halving and doubling it is exact. Noise follows from the part.
    assert_same_run(one, two)
    steps = [line["step"] for line in curve(two) if "loss" in line]
    # Written by the first process only.
    assert steps == list(range(1, 8))
    if kind == "needles":
        assert {line["length"] for line in curve(two)} == {64, 128}


def test_rows_that_use_a_part_of_the_model_train_in_two_processes(
    needles: RunConfig, haystack: Corpus
) -> None:
    recurrent = replace(
        needles,
        chunk_size=16,
        model={
            "model_type": "block_recurrent",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_state_vectors": 4,
            "sliding_window": 64,
        },
    )
    one, two = in_parts(recurrent, "one", 2), in_parts(recurrent, "two", 1)
    assert run_in(one, 1, haystack) == [0]
    assert run_in(two, 2, haystack) == [0, 0]
    assert_same_run(one, two)
    # Rows of one block come first, then those of two, which carry a state on.
    assert {line["length"] for line in curve(two)} == {64, 128}


def test_without_noise_the_split_into_parts_does_not_matter(text: RunConfig) -> None:
    text = replace(text, model={**text.model, "retrieval_noise": 0.0})
    whole, parts = in_parts(text, "whole", 1), in_parts(text, "parts", 2)
    assert run_in(whole, 1, None) == [0]
    assert run_in(parts, 2, None) == [0, 0]
    assert_close_run(whole, parts)


def test_gradient_checkpointing_changes_nothing_in_two_processes(
    needles: RunConfig, haystack: Corpus
) -> None:
    kept, again = (
        in_parts(needles, str(flag), 1, num_steps=3, gradient_checkpointing=flag)
        for flag in (False, True)
    )
    for config in (kept, again):
        assert run_in(config, 2, haystack) == [0, 0]
    assert_same_run(kept, again)


def test_an_error_of_the_first_process_ends_all(needles: RunConfig, haystack: Corpus) -> None:
    config = in_parts(needles, "run", 1)
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "run.yaml").write_text("")
    assert run_in(config, 2, haystack) == [1, 1]
    for rank in range(2):
        said = (Path(config.output_dir).parent / f"rank{rank}.txt").read_text()
        assert "holds an earlier run" in said


def test_a_run_that_not_all_processes_see_does_not_go_on(
    needles: RunConfig, haystack: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = in_parts(needles, "run", 1, num_steps=3)
    assert run_in(config, 2, haystack) == [0, 0]
    shutil.rmtree(Path(config.output_dir) / "model")

    def seen(folder: Path) -> Path | None:
        return None if os.environ["RANK"] == "1" else latest_checkpoint(folder)

    monkeypatch.setattr(run, "latest_checkpoint", seen)
    assert run_in(config, 2, haystack, resume=True) == [1, 1]
    said = (Path(config.output_dir).parent / "rank0.txt").read_text()
    assert "newest there: checkpoint-3, none" in said


def kill_process(*_: Any, **__: Any) -> None:
    """As the kernel or an operator would."""
    os.kill(os.getpid(), signal.SIGKILL)


class KillAfter(TrainerCallback):
    """Kills the process after a step, before anything of it is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            kill_process()


def killed_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    add_callback(KillAfter(step), monkeypatch)


def killed_while_saving(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when the weights of this step's checkpoint are written, and nothing else of it."""
    save: Callable[..., Any] = RunTrainer._save_optimizer_and_scheduler

    def kill_or_save(trainer: RunTrainer, folder: Any) -> None:
        if trainer.state.global_step == step:
            kill_process()
        save(trainer, folder)

    monkeypatch.setattr(RunTrainer, "_save_optimizer_and_scheduler", kill_or_save)


@pytest.mark.parametrize("kind", ["needles", pytest.param("text", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(
    kind: str, haystack: Corpus, request: pytest.FixtureRequest
) -> None:
    config = request.getfixturevalue(kind)
    whole = in_parts(config, "whole", 2)
    assert run_in(whole, 1, haystack) == [0]
    for name, kill in {
        "step": partial(killed_after, 5),
        "saving": partial(killed_while_saving, 6),
    }.items():
        killed = in_parts(config, name, 2)
        with pytest.MonkeyPatch.context() as patch:
            kill(patch)
            assert run_in(killed, 1, haystack) == [-signal.SIGKILL]
        newest = latest_checkpoint(Path(killed.output_dir))
        assert newest is not None
        assert newest.name == "checkpoint-3"
        assert run_in(killed, 1, haystack, resume=True) == [0]
        assert_same_run(whole, killed)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="Trainers of transformers before 5.23 cannot load a checkpoint in several CPU processes",
)
def test_a_killed_run_goes_on_in_another_number_of_processes(
    needles: RunConfig, haystack: Corpus
) -> None:
    whole = in_parts(needles, "whole", 2)
    assert run_in(whole, 1, haystack) == [0]
    for first, then in ((1, 2), (2, 1)):
        # As many parts before as after, so that the noise is the same.
        killed = in_parts(needles, f"from{first}", then)
        with pytest.MonkeyPatch.context() as patch:
            killed_after(5, patch)
            # What is not killed first finds that it is alone.
            assert set(run_in(killed, first, haystack)) <= {-signal.SIGKILL, 1}
        assert (Path(killed.output_dir) / "checkpoint-3" / PROGRESS_FILE).is_file()
        other = in_parts(needles, f"from{first}", first)
        assert run_in(other, then, haystack, resume=True) == [0] * then
        assert_same_run(whole, other)


def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accelerate shards on GPUs only: let it take the processes for such."""
    start = PartialState.__init__

    def start_on_gpus(state: PartialState, *args: Any, **kwargs: Any) -> None:
        start(state, *args, **kwargs)
        state.distributed_type = DistributedType.MULTI_GPU

    monkeypatch.setattr(PartialState, "__init__", start_on_gpus)
    monkeypatch.setattr(run, "check_processes", lambda *_: None)


@pytest.mark.slow
@pytest.mark.parametrize("then", [2, 4])
def test_a_sharded_run_is_killed_and_goes_on_as_a_whole_one(
    needles: RunConfig, haystack: Corpus, monkeypatch: pytest.MonkeyPatch, then: int
) -> None:
    tied = replace(
        needles,
        model={**needles.model, "tie_word_embeddings": True},
        training=replace(needles.training, evaluate_every=3),
    )
    whole = in_parts(tied, "whole", then)
    given: Any = {"sharding": "fsdp", "gradient_checkpointing": True}
    sharded = in_parts(tied, "sharded", then // 2, **given)
    assert run_in(whole, 1, haystack) == [0]
    as_on_gpus(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(5, patch)
        assert set(run_in(sharded, 2, haystack)) <= {-signal.SIGKILL, 1}
    # Both processes have written their part of it.
    shards = Path(sharded.output_dir).glob("checkpoint-3/pytorch_model_fsdp_0/*.distcp")
    assert len(list(shards)) == 2
    # As many parts of a step as before, over twice as many processes.
    sharded = in_parts(tied, "sharded", 1, **given)
    assert run_in(sharded, then, haystack, resume=True) == [0] * then
    assert_close_run(sharded, whole)
    assert weights(sharded).keys() == weights(whole).keys()


@pytest.mark.slow
def test_sharding_adds_no_rounding_to_that_of_products(
    needles: RunConfig, haystack: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = replace(needles, precision="bfloat16", training=replace(needles.training, num_steps=1))
    whole = in_parts(halves, "whole", 2)
    sharded = in_parts(halves, "sharded", 1, sharding="fsdp")
    multiply = DRTMLP.forward

    def in_halves(layer: DRTMLP, hidden: torch.Tensor) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu")
        return multiply(layer, hidden)

    monkeypatch.setattr(DRTMLP, "forward", in_halves)
    assert run_in(whole, 1, haystack) == [0]
    as_on_gpus(monkeypatch)
    assert run_in(sharded, 2, haystack) == [0, 0]
    one, other = curve(whole)[0], curve(sharded)[0]
    # Sums of float32 losses; with those of bfloat16 it was 3e-4. Gradients are of such products.
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_torchrun_trains_and_says_what_is_wrong(needles: RunConfig, tmp_path: Path) -> None:
    config = replace(needles, training=replace(needles.training, num_steps=2))
    save_config(config, tmp_path / "config.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["-m", "drt.cli.main", "train", str(tmp_path / "config.yaml")]

    def started() -> subprocess.CompletedProcess[str]:
        given = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=200)

    done = started()
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in curve(config)] == [1, 2]
    again = started()
    assert again.returncode != 0
    assert "holds an earlier run" in again.stderr


def test_parts_carry_their_numbers_for_the_host(needles: RunConfig) -> None:
    class Rows:
        def rows(self, step: int) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.arange(4)[:, None]}

    part = StepParts(Rows(), num_steps=3, num_parts=2)[5]
    assert (part["step"], part["index"]) == (2, 5)
    assert part["input_ids"].flatten().tolist() == [2, 3]
