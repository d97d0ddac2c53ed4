"""Batches of training rows from one task or several."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from drt.data.corpora import Corpus, Split
from drt.data.needle_rows import NeedleRow
from drt.data.needles import MIXTURE, check_range, generator


class RowTask(Protocol):
    """What makes training rows: a `NeedleTask`, or `BabiStories`."""

    def training_row(
        self,
        corpus: Corpus,
        *,
        seed: int,
        index: int,
        length: int,
        chunk_size: int,
        split: Split = "train",
    ) -> NeedleRow:
        """Return training row ``index``, a function of its arguments alone."""
        ...


Mixture = Sequence[tuple[RowTask, float]]
"""Tasks with weights; a row's task is drawn by weight."""


def batch(
    tasks: RowTask | Mixture,
    corpus: Corpus,
    *,
    seed: int,
    index: int,
    batch_size: int,
    length: int,
    chunk_size: int,
    split: Split = "train",
) -> dict[str, torch.Tensor]:
    """Return training batch ``index``: the rows from ``index * batch_size`` on.

    Args:
        tasks: one task, or a mixture.
        corpus: the haystack and the tokenizer.
        seed: the run's seed, 0 or more.
        index: the batch's number, 0 or more.
        batch_size: rows of a batch (B).
        length: content tokens of a row (T).
        chunk_size: content tokens of a chunk (S).
        split: which text the haystacks are made of.

    Returns:
        ``input_ids`` and ``labels`` (a copy; the model shifts), int64, ``answer_mask`` and
        ``chunk_ends`` (True at the last token of each question), bool, all (B, T).

    Raises:
        ValueError: no task, a weight that is not positive, a row that does not fit, or an argument
            out of range.
    """
    mixture = list(tasks) if isinstance(tasks, Sequence) else [(tasks, 1.0)]
    weights = np.array([weight for _, weight in mixture], dtype=np.float64)
    if not len(mixture) or not (np.isfinite(weights) & (weights > 0)).all():
        raise ValueError(
            f"a mixture needs tasks with positive weights; they are {weights.tolist()}"
        )
    check_range("batch_size", batch_size, 1, float("inf"))
    limits = weights.cumsum() / weights.cumsum()[-1]
    rows = []
    for row in range(index * batch_size, (index + 1) * batch_size):
        drawn = generator(seed, row, MIXTURE).random()
        task = mixture[int(limits.searchsorted(drawn, side="right"))][0]
        rows.append(
            task.training_row(
                corpus, seed=seed, index=row, length=length, chunk_size=chunk_size, split=split
            )
        )
    input_ids = torch.from_numpy(np.stack([row.input_ids for row in rows]))
    mask = torch.from_numpy(np.stack([row.answer_mask for row in rows]))
    ends = torch.zeros_like(mask)
    for number, row in enumerate(rows):
        ends[number, [question.question_span[1] - 1 for question in row.questions]] = True
    return {
        "input_ids": input_ids,
        "labels": input_ids.clone(),
        "answer_mask": mask,
        "chunk_ends": ends,
    }
