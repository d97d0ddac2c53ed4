"""Operations of a row by an independent count, speed by hand, and what is written of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.integration_utils import is_tensorboard_available

from drt import DRTForCausalLM
from drt.architectures import known_fields
from drt.baselines import AblationConfig, AblationForCausalLM
from drt.flops import flops_of_row
from drt.testing import tiny_config
from drt.training import RunConfig, speed, train
from drt.training.speed import SpeedMeter, peak_tflops

VOCAB, E, INNER, HEADS, WIDTH, LENGTH = 61, 32, 48, 4, 8, 96
# A multiplication and an addition; weights are multiplied in forward, and twice in backward.
LINEAR = 2 * 3
# Attention multiplies twice in forward; four times in backward, and once to have its scores again.
ATTENTION = 2 * 7


def test_operations_of_a_llama() -> None:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=E,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
    )
    weights = 3 * (4 * E * E + 3 * E * INNER) + VOCAB * E
    attention = 3 * LENGTH * LENGTH * E
    wanted = LINEAR * LENGTH * weights + ATTENTION * attention
    assert flops_of_row(LlamaForCausalLM(config), LENGTH) == wanted


def drt(**changes: Any) -> DRTForCausalLM:
    given = {
        "vocab_size": VOCAB,
        "hidden_size": E,
        "intermediate_size": INNER,
        "num_hidden_layers": 5,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": WIDTH,
        "num_encoder_layers": 2,
        "retrieval_groups": [1, 2],
        "retrieval_topk": 3,
        "chunk_size": 8,
        "sliding_window": 16,
        "landmark_size": None,
    }
    return DRTForCausalLM(tiny_config(**{**given, **changes}))


def test_operations_of_a_drt() -> None:
    chunks = LENGTH // 8
    positions = LENGTH + chunks
    layer = 4 * E * E + 3 * E * INNER
    # The blocks of an upper layer begin a landmark late: one more holds the rest.
    blocks = positions + 9
    linear = 5 * positions * layer + 3 * blocks * 2 * E * E
    # The encoder reads chunks with their landmarks, and makes keys and values of their content.
    linear += 2 * positions * layer + LENGTH * 2 * E * E
    linear += LENGTH * VOCAB * E
    # Each landmark is scored with all, for each of the two groups.
    linear += 2 * chunks * chunks * E
    window, retrieved, inside = 5 * positions * 16, 3 * blocks * 3 * 8, 2 * positions * 9
    wanted = LINEAR * linear + ATTENTION * (window + retrieved + inside) * E
    assert flops_of_row(drt(retrieval_onset="landmark"), LENGTH) == wanted


def test_what_saves_memory_is_not_counted() -> None:
    plain = drt(loss_chunk_size=None)
    chunked = drt(loss_chunk_size=16)
    chunked.gradient_checkpointing_enable()
    before = torch.get_rng_state()
    assert flops_of_row(chunked, LENGTH) == flops_of_row(plain, LENGTH)
    assert torch.equal(torch.get_rng_state(), before)


def meter(**changes: Any) -> SpeedMeter:
    given: dict[str, Any] = {
        "num_devices": 2,
        "device": torch.device("cpu"),
        "flops_of_row": lambda length: length * 10**9,
        "peak": 4.0,
    }
    return SpeedMeter(**{**given, **changes})


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def test_speed_by_hand(clock: Clock) -> None:
    made = meter()
    made.begin()
    for length in (40, 80):
        clock.now += 1.0
        made.step(160 // length, length)
    with made.pause():
        clock.now += 7.0
    # Two steps of 160 tokens in 2 seconds; 10^9 operations a token, by two devices.
    assert made.take() == {"tokens_per_second": 160.0, "tflops": 0.08, "mfu": 0.02}
    assert made.take() == {}
    clock.now += 4.0
    made.step(4, 40)
    assert made.take() == {"tokens_per_second": 40.0, "tflops": 0.02, "mfu": 0.005}


def test_rows_of_any_length_are_counted_at_few_lengths(clock: Clock) -> None:
    counted: list[int] = []

    def flops_of_row(length: int) -> int:
        counted.append(length)
        return length * 10**9

    made = meter(flops_of_row=flops_of_row)
    made.begin()
    for length in range(513, 1025):
        made.step(4, length)
    clock.now += 100.0
    taken = made.take()
    assert counted == [576, 640, 704, 768, 832, 896, 960, 1024]
    # Every length from 513 to 1,024 once, four rows each.
    assert taken["tokens_per_second"] == pytest.approx(4 * 512 * 768.5 / 100, abs=0.1)
    # By two devices; each counted with up to 63 tokens too many.
    assert taken["tflops"] == pytest.approx(4 * 512 * (768.5 + 31.5) * 1e9 / 2 / 100 / 1e12)


def test_operations_of_a_retriever_that_reads_text_are_not_the_models() -> None:
    known, given = known_fields("drt"), drt().config.to_dict()
    fields = {key: value for key, value in given.items() if key in known} | {"retriever": "fixed"}
    reads_ids, reads_text = (
        AblationForCausalLM(AblationConfig(**fields, retriever_name=name))
        for name in ("hashed-ngrams", "wordllama")
    )
    assert flops_of_row(reads_text, LENGTH) == flops_of_row(reads_ids, LENGTH) > 0


def test_speed_says_no_more_than_is_known(clock: Clock) -> None:
    for changes, names in (
        ({"flops_of_row": lambda length: None}, {"tokens_per_second"}),
        ({"peak": None}, {"tokens_per_second", "tflops"}),
    ):
        made = meter(**changes)
        made.begin()
        clock.now += 1.0
        made.step(4, 50)
        assert made.take().keys() == names


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.4),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GB200", None),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_of_that_gpu(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_a_run_says_its_share_of_a_peak_and_is_not_moved_by_the_count(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = replace(run_config.training, num_steps=3, peak_tflops=0.5)
    config = replace(run_config, training=training)
    train(config)
    without = replace(config, output_dir=str(tmp_path / "without"))
    monkeypatch.setattr(speed, "flops_if_known", lambda model, length: None)
    train(without)
    counted, plain = (
        [json.loads(line) for line in (Path(c.output_dir) / "metrics.jsonl").open()]
        for c in (config, without)
    )
    for line, other in zip(counted, plain, strict=True):
        # Four digits are logged.
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.5, rel=1e-3)
        assert line.keys() - other.keys() == {"mfu", "tflops"}
        assert line["loss"] == other["loss"]
        assert line["grad_norm"] == other["grad_norm"]


def test_a_model_that_looks_at_numbers_trains_without_tflops(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forward = DRTForCausalLM.forward

    def looks(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        int(input_ids.sum())
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(DRTForCausalLM, "forward", looks)
    model = drt()
    from drt.flops import flops_if_known

    assert flops_if_known(model, LENGTH) is None
    assert "operations of a DRTForCausalLM cannot be counted" in caplog.text


@pytest.mark.skipif(not is_tensorboard_available(), reason="tensorboard is not installed")
def test_tensorboard_files_hold_the_curve(run_config: RunConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = replace(run_config.training, num_steps=3, tensorboard=True)
    config = replace(run_config, training=training)
    train(config)
    (file,) = Path(config.output_dir).glob("runs/*/events.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    lines = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx({line["step"]: line["loss"] for line in lines})


def test_tensorboard_that_is_missing_is_said_before_anything_is_written(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drt.training import arguments

    monkeypatch.setattr(arguments, "is_tensorboard_available", lambda: False)
    config = replace(run_config, training=replace(run_config.training, tensorboard=True))
    with pytest.raises(ValueError, match=r"drt-lm\[tensorboard\]"):
        train(config)
    assert not Path(config.output_dir).exists()
