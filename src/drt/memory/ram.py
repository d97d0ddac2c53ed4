"""The memories that last as long as the process: on the model's device, or in host memory."""

from __future__ import annotations

import torch

from drt.memory.base import InferenceMemory, Options
from drt.memory.slabs import Scan


class DeviceMemory(InferenceMemory):
    """Keeps chunks on the device of what is appended.

    Args:
        dtype: storage dtype of keys and values: float32, bfloat16, float16 or int8; None = as
            appended. What is gathered has the dtype of what was appended.
        slab_size: chunks of the largest slabs; a row's first ones are smaller. None = about 512 MiB
            of records.
        landmark_dtype: float32 or bfloat16.
        scan: "bfloat16" scans landmarks rounded to it and ranks four times K candidates in
            float32: near exact, half the bytes to read, and half as many again to keep.

    Raises:
        ValueError: an option that is none of these.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype | None = None,
        slab_size: int | None = None,
        landmark_dtype: torch.dtype = torch.float32,
        scan: Scan = "float32",
    ) -> None:
        super().__init__(Options(dtype, slab_size, landmark_dtype, scan))

    def _sibling(self) -> DeviceMemory:
        return DeviceMemory(**vars(self.options))

    def _place(self, device: torch.device) -> torch.device:
        return device


class HostMemory(DeviceMemory):
    """Keeps landmarks on the device of what is appended, keys and values in host memory.

    On a GPU, `gather` copies the chunks to one pinned buffer and that to the device. Arguments as
    `DeviceMemory`. Forks of a `DiskMemory` are of this class: what they share is read from disk.
    """

    def _sibling(self) -> HostMemory:
        return HostMemory(**vars(self.options))

    def _place(self, device: torch.device) -> torch.device:
        return torch.device("cpu")
