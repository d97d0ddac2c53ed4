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

from drt.flops import flops_if_known
from drt.precision import uses_bfloat16
from drt.run_config import RunConfig

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
        num_devices: how many devices share a step.
        device: one of them.
        flops_of_row: operations of a row of a length, None = not known; asked once a length, which
            is rounded up by at most an eighth where rows may have any.
        peak: 10^12 operations a second that a device can do; None = not known, and there is no MFU.
    """

    def __init__(
        self,
        *,
        num_devices: int,
        device: torch.device,
        flops_of_row: Callable[[int], int | None],
        peak: float | None,
    ) -> None:
        self.num_devices, self.device = num_devices, device
        self.peak, self.flops_of_row = peak, flops_of_row
        self._counted: dict[int, int | None] = {}
        self._began, self._left_out = math.nan, 0.0
        # Rows and their length of each step.
        self._steps: list[tuple[int, int]] = []

    def begin(self) -> None:
        """Start the clock, if it does not run."""
        if math.isnan(self._began):
            self._began = time.perf_counter()

    def step(self, num_rows: int, length: int) -> None:
        """A step on so many rows of this length, over all processes, is done."""
        self._steps.append((num_rows, length))
        counted = _counted_length(length)
        if counted not in self._counted:
            with self.pause():
                self._counted[counted] = self.flops_of_row(counted)

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
        steps = self._steps
        self._began, self._left_out, self._steps = time.perf_counter(), 0.0, []
        if not steps:
            return {}
        tokens = sum(num_rows * length for num_rows, length in steps)
        speed = {"tokens_per_second": round(tokens / seconds, 1)}
        rows = [(self._counted[_counted_length(length)], count) for count, length in steps]
        flops = [each * count for each, count in rows if each is not None]
        if len(flops) < len(rows):
            return speed
        achieved = sum(flops) / self.num_devices / seconds / 1e12
        speed["tflops"] = float(f"{achieved:.4g}")
        if self.peak is not None:
            speed["mfu"] = float(f"{achieved / self.peak:.4g}")
        return speed


def _counted_length(length: int) -> int:
    """Rounded up to three binary digits behind the first: powers of two stay what they are."""
    step = 1 << max(length.bit_length() - 4, 0)
    return -(-length // step) * step


def speed_meter(config: RunConfig, model: PreTrainedModel, args: TrainingArguments) -> SpeedMeter:
    """The meter of a run, which the Trainer is told of in `args`."""
    peak = config.training.peak_tflops
    if peak is None and args.device.type == "cuda" and uses_bfloat16(config.precision):
        peak = peak_tflops(torch.cuda.get_device_name(args.device))
    return SpeedMeter(
        num_devices=args.world_size,
        device=args.device,
        # Only the first process says how fast it is.
        flops_of_row=partial(flops_if_known, model) if args.should_log else lambda length: None,
        peak=peak,
    )
