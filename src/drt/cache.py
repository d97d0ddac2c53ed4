"""What transformers asks of a decoding state that can be forked and not cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache


class ForkedCache(Cache):
    """A cache that its model alone writes, without a limit; subclasses reorder its rows."""

    @property
    def batch_size(self) -> int | None:
        """Rows; None = of any number, before anything was read."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those with these numbers (B',)."""
        raise NotImplementedError

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies side by side."""
        if self.batch_size is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows with these numbers."""
        self.reorder_cache(indices)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: its shapes change."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.get_seq_length() > 0

    @property
    def is_croppable(self) -> bool:
        """False: what left the window is gone; fork before what you may want to undo."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what left the window is gone."""
        raise NotImplementedError(
            f"a {type(self).__name__} cannot be cropped: fork() it before reading instead"
        )

    def reset(self) -> None:
        """Refused: make a new state."""
        raise NotImplementedError("make a new state with model.new_state()")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the model itself writes its state."""
        raise NotImplementedError(f"a {type(self).__name__} is written by its model only")


def row_numbers(rows: Tensor, batch_size: int) -> list[int]:
    """(B',) numbers of rows as a list.

    Raises:
        ValueError: no int64 or int32 numbers, none, or one that is not below `batch_size`.
    """
    # Beams of transformers are int32.
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32) or not len(rows):
        raise ValueError(
            "rows must be given by their numbers, (n,) int64, at least one, got shape "
            f"{tuple(rows.shape)} {rows.dtype}"
        )
    numbers: list[int] = rows.tolist()
    if min(numbers) < 0 or max(numbers) >= batch_size:
        raise ValueError(f"rows must be 0 to {batch_size - 1}, got {numbers}")
    return numbers


def check_trains_without(state: Cache | None, model: Any, *, use_cache: bool | None) -> None:
    """Refuse a state in training mode with gradients.

    Raises:
        ValueError: there is one, or one is to be made.
    """
    if model.training and torch.is_grad_enabled() and (use_cache or state is not None):
        raise ValueError(
            "a state remembers without gradients, so that what it holds would not be learned: "
            "train on whole rows, without past_key_values and use_cache, or call model.eval()"
        )
