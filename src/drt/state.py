"""The decoding state: all that a model must remember of what it has read.

Per row: the last W positions of every self-attention layer, the open chunk, the current retrieval
of each group, and the memory of closed chunks. It counts content tokens, never landmarks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from drt.configuration import DRTConfig
from drt.memory.interface import ChunkMemory
from drt.memory.slabs import SlabMemory
from drt.retrieval import RetrievedChunks


class WindowCache:
    """Keys and values of the last W - 1 positions of one self-attention layer.

    They are stored head-major, (B, G, n, D), which a step of decoding reads without a copy.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, key: Tensor, value: Tensor, *, window: int) -> tuple[Tensor, Tensor]:
        """Append (B, P, G, D) keys and values; return those with the cached ones before them."""
        key, self.keys = _extend(self.keys, key.transpose(1, 2), window - 1)
        value, self.values = _extend(self.values, value.transpose(1, 2), window - 1)
        return key.transpose(1, 2), value.transpose(1, 2)

    def clear(self) -> None:
        """Forget all positions."""
        self.keys = self.values = None


def _extend(cached: Tensor | None, new: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Cached and new positions, and the last `limit` of them."""
    joined = new if cached is None else torch.cat([cached, new], dim=2)
    # A copy, or the slice would keep the whole segment alive.
    return joined, joined[:, :, max(joined.shape[2] - limit, 0) :].clone()


class DRTState(Cache):
    """What `DRTForCausalLM` carries from one forward to the next; made by `model.new_state()`.

    Tensors in it are replaced, never written to, so a fork is a shallow copy.

    Args:
        config: the model's configuration.
        batch_size: rows.
        memory: an empty chunk memory; None = a `SlabMemory`.
    """

    def __init__(
        self, config: DRTConfig, batch_size: int, *, memory: ChunkMemory | None = None
    ) -> None:
        super().__init__(layers=[])
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.rows = batch_size
        self.num_tokens = 0
        """Content tokens read, per row."""
        self.windows = [WindowCache() for _ in range(config.num_hidden_layers)]
        self.opened: Tensor | None = None
        """(B, n, E) lower-layer outputs of the open chunk."""
        self.current: list[RetrievedChunks | None] = [None] * len(config.retrieval_groups)
        """Per group, the chunks that the open block attends to."""
        self.memory: ChunkMemory = SlabMemory() if memory is None else memory

    def fork(self) -> DRTState:
        """A state that goes on from here on its own; full slabs of the memory are shared."""
        other = copy.copy(self)
        other.windows = [copy.copy(window) for window in self.windows]
        other.current = list(self.current)
        other.memory = self.memory.fork()
        return other

    def forget_layers(self, first: int) -> None:
        """Drop what layers from `first` on saw; they must read a long enough tail again."""
        for window in self.windows[first:]:
            window.clear()
        self.current = [None] * len(self.current)

    # What transformers asks of a cache.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Content tokens read."""
        return self.num_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.rows

    @property
    def is_compileable(self) -> bool:
        """False: its shapes change."""
        return False

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self.num_tokens > 0

    @property
    def is_croppable(self) -> bool:
        """False: what left the window is gone; fork before what you may want to undo."""
        return False

    def __len__(self) -> int:
        return len(self.windows)

    def __repr__(self) -> str:
        return (
            f"DRTState(rows={self.rows}, num_tokens={self.num_tokens}, chunks={len(self.memory)})"
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refused: rows of a memory cannot be permuted yet."""
        raise NotImplementedError("DRTState cannot reorder rows: beam search is not supported yet")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: rows of a memory cannot be repeated yet."""
        raise NotImplementedError("DRTState cannot repeat rows: pass repeated prompts instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refused: rows of a memory cannot be selected yet."""
        raise NotImplementedError("DRTState cannot select rows: pass the wanted prompts instead")

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what left the window is gone."""
        raise NotImplementedError("DRTState cannot be cropped: fork() it before reading instead")

    def reset(self) -> None:
        """Refused: make a new state."""
        raise NotImplementedError("make a new state with model.new_state(batch_size)")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: the model itself writes its state."""
        raise NotImplementedError("a DRTState is written by DRTForCausalLM only")
