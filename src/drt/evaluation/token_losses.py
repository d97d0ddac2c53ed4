"""What a model loses on tokens of a split: in windows, side by side or in segments; in books."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drt.data.prepared import PreparedSplit
from drt.evaluation.reading import start_reading
from drt.evaluation.windows import Excerpt, Window
from drt.loss import losses_of_logits

# Tokens of a book whose losses are fetched at once.
_PART = 1 << 16


@torch.no_grad()
def window_nats(
    model: Any,
    split: PreparedSplit,
    windows: list[Window],
    *,
    batch_tokens: int,
    segment_size: int,
    beyond_limit: bool = False,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """The summed loss of each window's scored tokens, in nats, (len(windows),) float64.

    Args:
        model: a causal LM in evaluation mode.
        split: where the tokens are.
        windows: what to read, each from nothing.
        batch_tokens: windows of one shape are read side by side while they have at most so many
            tokens together; a window that has more by itself is read in segments.
        segment_size: tokens of a segment.
        beyond_limit: as in `start_reading`.
        on_tokens: called with the number of tokens that were read.

    Windows are no longer than the model's positions, which the caller has checked.
    """
    found = []
    for batch in _batches(windows, batch_tokens):
        ids = _token_ids(split, batch).to(model.device)
        scored = batch[0].num_scored
        if batch[0].num_tokens <= batch_tokens:
            found += _batch_nats(model, ids, scored)
        else:
            with start_reading(
                model, segment_size=segment_size, beyond_limit=beyond_limit
            ) as reading:
                reading.read(ids[0, :-scored])
                found.append(float(reading.losses(ids[0, -scored:]).double().sum()))
        on_tokens(ids.numel())
    return np.array(found, dtype=np.float64)


def _batches(windows: list[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Runs of windows of one shape that fit together, in order."""
    for (length, _), run in groupby(windows, key=lambda x: (x.num_tokens, x.num_scored)):
        alike = list(run)
        size = max(batch_tokens // length, 1)
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


def _token_ids(split: PreparedSplit, windows: list[Window]) -> Tensor:
    """(len(windows), T) int64."""
    rows = [split.document(x.document).tokens[x.start : x.stop] for x in windows]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _batch_nats(model: Any, ids: Tensor, scored: int) -> list[float]:
    """Of each row of (B, T) ids the loss of its last `scored` tokens."""
    # Logits are what fills the memory: none are made for tokens that are only context.
    known = "logits_to_keep" in inspect.signature(model.forward).parameters
    keep = {"logits_to_keep": scored + 1} if known else {}
    logits = model(input_ids=ids, use_cache=False, **keep).logits[:, -scored - 1 : -1]
    # Row by row: the softmax in float32 is larger than the logits.
    rows = zip(logits, ids[:, -scored:], strict=True)
    return [float(losses_of_logits(row, targets).double().sum()) for row, targets in rows]


@torch.no_grad()
def book_nats(
    model: Any,
    split: PreparedSplit,
    excerpt: Excerpt,
    *,
    segment_size: int,
    beyond_limit: bool = False,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """The loss of each token of an excerpt given all before it, read once from its start.

    Args:
        model: a causal LM in evaluation mode.
        split: where the tokens are.
        excerpt: what to read.
        segment_size: tokens of one forward.
        beyond_limit: as in `start_reading`.
        on_tokens: called with the number of tokens that were read.

    Returns:
        (num_tokens,) float64 nats; that of the first token, which nothing predicts, is 0.

    Raises:
        ValueError: the excerpt is longer than the model's positions.
    """
    tokens = split.document(excerpt.document).tokens[: excerpt.num_tokens]
    ids = torch.from_numpy(tokens.astype(np.int64)).to(model.device)
    found = []
    with start_reading(model, segment_size=segment_size, beyond_limit=beyond_limit) as reading:
        for part in ids.split(_PART):
            found.append(reading.losses(part).double().cpu().numpy())
            on_tokens(len(part))
    return np.concatenate(found)
