"""Speed by hand, and what is written of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.integration_utils import is_tensorboard_available

from drt.training import RunConfig, speed, train
from drt.training.speed import SpeedMeter, peak_tflops


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
