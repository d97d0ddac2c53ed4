"""How fast a run trains: tokens and operations a second, and their share of what a GPU can do."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import PreTrainedModel
from transformers.training_args import TrainingArguments

from drt.precision import uses_bfloat16
from drt.run_config import RunConfig
from drt.training.flops import flops_if_known

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "A10": 125.0,
    "RTX 4090": 165.2,
}
"""Dense bfloat16 peaks that NVIDIA's data sheets state, 10^12 operations a second."""


def peak_tflops(name: str) -> float | None:
    """The published peak of a GPU by its name, 10^12 operations a second; None = not known."""
    fitting = [each for each in PEAK_TFLOPS if re.search(rf"\b{each}\b", name)]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


class SpeedMeter:
    """Speed of the steps since it was last asked; what lies between steps can be left out.

    Args:
        tokens_per_step: content tokens of a step, over all processes.
        num_devices: how many devices share a step.
        device: one of them.
        flops_of_row: operations of a row of a length, None = not known; asked once a length.
        peak: 10^12 operations a second that a device can do; None = not known, and there is no MFU.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        num_devices: int,
        device: torch.device,
        flops_of_row: Callable[[int], int | None],
        peak: float | None,
    ) -> None:
        self.tokens_per_step, self.num_devices = tokens_per_step, num_devices
        self.device, self.peak, self.flops_of_row = device, peak, flops_of_row
        self._counted: dict[int, int | None] = {}
        self._began, self._left_out = math.nan, 0.0
        self._lengths: list[int] = []

    def begin(self) -> None:
        """Start the clock, if it does not run."""
        if math.isnan(self._began):
            self._began = time.perf_counter()

    def step(self, length: int) -> None:
        """A step on rows of this length is done."""
        self._lengths.append(length)
        if length not in self._counted:
            with self.pause():
                self._counted[length] = self.flops_of_row(length)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside is no training and takes no time."""
        self._wait()
        begin = time.perf_counter()
        yield
        self._wait()
        self._left_out += time.perf_counter() - begin

    def _wait(self) -> None:
        """Let the device finish what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def take(self) -> dict[str, float]:
        """`tokens_per_second` of all devices; `tflops` and `mfu` of each, where they are known.

        Nothing if there was no step since the last call.
        """
        self._wait()
        seconds = time.perf_counter() - self._began - self._left_out
        lengths = self._lengths
        self._began, self._left_out, self._lengths = time.perf_counter(), 0.0, []
        if not lengths:
            return {}
        speed = {"tokens_per_second": round(len(lengths) * self.tokens_per_step / seconds, 1)}
        rows = [(self._counted[length], self.tokens_per_step / length) for length in lengths]
        flops = [each * count for each, count in rows if each is not None]
        if len(flops) < len(rows):
            return speed
        achieved = sum(flops) / self.num_devices / seconds / 1e12
        speed["tflops"] = float(f"{achieved:.4g}")
        if self.peak is not None:
            speed["mfu"] = float(f"{achieved / self.peak:.4g}")
        return speed


def speed_meter(config: RunConfig, model: PreTrainedModel, args: TrainingArguments) -> SpeedMeter:
    """The meter of a run, which the Trainer is told of in `args`."""
    training, peak = config.training, config.training.peak_tflops
    if peak is None and args.device.type == "cuda" and uses_bfloat16(config.precision):
        peak = peak_tflops(torch.cuda.get_device_name(args.device))
    return SpeedMeter(
        tokens_per_step=training.tokens_per_step,
        num_devices=args.world_size,
        device=args.device,
        # Only the first process says how fast it is.
        flops_of_row=partial(flops_if_known, model) if args.should_log else lambda length: None,
        peak=peak,
    )
