"""Training data as a sequence of steps: what a step is made of follows from its number alone.

A step's rows are shared out over processes and micro-batches. An item of `StepParts` is one such
part, in the order in which the Trainer's data loader hands them out, so that neither the number of
processes nor a stop in between changes what a step is made of.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from drt.data import Corpus, batch
from drt.data.prepared import TokenRows
from drt.data.summary_batches import SummaryBatches
from drt.loss import IGNORED
from drt.run_config import RunConfig, check_row_lengths
from drt.training.curriculum import Curriculum

Batch = dict[str, Tensor]
"""What a model reads, (B, T) each; `token_weights`, float32, of each token's loss in the loss of
the step, which is their weighted sum; and `answer_mask` where there are answers."""


class StepSource(Protocol):
    """Where the batches of a run come from."""

    def rows(self, step: int) -> Batch:
        """All rows of a step."""
        ...


class StepParts(Dataset[dict[str, Any]]):
    """The parts of all steps, one after another.

    Args:
        source: makes the batches.
        num_steps: steps of the run.
        num_parts: parts of a step: processes times micro-batches.
    """

    def __init__(self, source: StepSource, *, num_steps: int, num_parts: int) -> None:
        self.source, self.num_steps, self.num_parts = source, num_steps, num_parts
        self._kept: tuple[int, Batch] = (-1, {})

    def __len__(self) -> int:
        return self.num_steps * self.num_parts

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Part `index`: its rows, with `step` and `index`, which stay numbers of the host."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, part = divmod(index, self.num_parts)
        if self._kept[0] != step:
            self._kept = (step, self.source.rows(step))
        rows = self._kept[1]
        size = len(rows["input_ids"]) // self.num_parts
        chosen = {name: each[part * size : (part + 1) * size] for name, each in rows.items()}
        return {**chosen, "step": step, "index": index}


class NeedleSteps:
    """Needle rows of the curriculum's stage; a function of (seed, step, stage).

    loss = answer + first_token_weight * first + text_loss_weight * text, each a mean over the step.

    Args:
        config: the run.
        corpus: the haystack.
        curriculum: says which stage it is.
        chunk_size: questions end at multiples of so many tokens.

    Raises:
        ValueError: a stage's rows are not a multiple of `chunk_size` long, or too short for one of
            its tasks.
    """

    def __init__(
        self, config: RunConfig, corpus: Corpus, curriculum: Curriculum, *, chunk_size: int
    ) -> None:
        check_row_lengths(config.row_lengths, chunk_size)
        self.config, self.corpus, self.curriculum = config, corpus, curriculum
        self.chunk_size = chunk_size
        self._check_tasks()

    def _check_tasks(self) -> None:
        """Make a row of every task: before training, not when it comes to a later stage."""
        for number, stage in enumerate(self.config.stages):
            for each, mix in enumerate(stage.tasks):
                try:
                    mix.task.training_row(
                        self.corpus,
                        seed=self.config.seed,
                        index=0,
                        length=stage.length,
                        chunk_size=self.chunk_size,
                    )
                except ValueError as error:
                    raise ValueError(f"stages.{number}.tasks.{each}: {error}") from error

    def rows(self, step: int) -> Batch:
        """All rows of a step."""
        stage, training = self.curriculum.stage_at(step), self.config.training
        made = batch(
            [(item.task, item.weight) for item in stage.tasks],
            self.corpus,
            seed=self.config.seed,
            index=step,
            batch_size=training.rows_per_step(stage.length),
            length=stage.length,
            chunk_size=self.chunk_size,
        )
        answer, first, text = needle_masks(made["answer_mask"])
        weights = share(answer)
        weights += training.first_token_weight * share(first)
        weights += training.text_loss_weight * share(text)
        return {**made, "token_weights": weights}


class TextSteps:
    """Rows of a prepared corpus, as often through it as the steps take; the loss is their mean."""

    def __init__(self, rows: TokenRows, *, rows_per_step: int) -> None:
        self.data, self.rows_per_step = rows, rows_per_step

    def rows(self, step: int) -> Batch:
        """All rows of a step."""
        first = step * self.rows_per_step
        made = [self.data[index] for index in range(first, first + self.rows_per_step)]
        stacked = {name: torch.stack([row[name] for row in made]) for name in made[0]}
        return {**stacked, "token_weights": share(predicted(stacked["labels"]))}


class SummarySteps:
    """Documents and summaries; the loss is the mean over the tokens of the summaries.

    Args:
        batches: the rows.
        closes_prompts: whether the chunk that a prompt leaves open is closed, as `generate` of the
            same model does.
    """

    def __init__(self, batches: SummaryBatches, *, closes_prompts: bool = True) -> None:
        self.data, self.closes_prompts = batches, closes_prompts

    def rows(self, step: int) -> Batch:
        """All rows of a step."""
        made = self.adapted(self.data[step])
        return {**made, "token_weights": share(predicted(made["labels"]))}

    def adapted(self, made: Batch) -> Batch:
        """A row, or several, as the model reads it: with the ends of prompts, or without."""
        return {
            name: each for name, each in made.items() if name != "chunk_ends" or self.closes_prompts
        }


def needle_masks(answer_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) bool: tokens of answers, the first of each, and all others that are predicted.

    The first token of an answer is the one that no earlier token of it gives away.
    """
    first = answer_mask.clone()
    first[:, 1:] &= ~answer_mask[:, :-1]
    text = ~answer_mask
    # Nothing predicts the first token of a row.
    text[:, 0] = False
    return answer_mask, first, text


def predicted(labels: Tensor) -> Tensor:
    """(B, T) bool: the tokens that a model is asked to predict."""
    mask = labels != IGNORED
    mask[:, 0] = False
    return mask


def share(mask: Tensor) -> Tensor:
    """Weights with which a sum over a mask is a mean: float32 of its shape."""
    return mask.float() / max(int(mask.sum()), 1)


def first_part(items: list[Any]) -> Any:
    """The only item: an item is a batch already."""
    (item,) = items
    return item
