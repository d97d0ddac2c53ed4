"""The curriculum: which stage a step belongs to, decided by the answer loss."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from drt.configuration import DRTConfig
from drt.data import Corpus, batch
from drt.run_config import RunConfig, Stage

# Batches are made ahead of the step they are for: a new stage begins this many steps later, so
# that a batch never depends on how far ahead it was made. Resuming is exact because of it.
LEAD_STEPS = 4
# Steps for a stage's own loss to replace that of the stage before in the average.
SETTLING_STEPS = 40
SMOOTHING = 0.95


@dataclass
class Curriculum:
    """The stages and the step at which each began."""

    stages: list[Stage]
    starts: list[int] = field(default_factory=lambda: [0])
    """First step of each stage reached so far."""
    average: float | None = None
    """Exponential average of the answer loss in the current stage."""

    def stage_at(self, step: int) -> Stage:
        """The stage of a step."""
        return self.stages[sum(start <= step for start in self.starts) - 1]

    def observe(self, step: int, answer_loss: float) -> None:
        """Take in the loss of a finished step; begin the next stage when it is low enough."""
        first = self.starts[-1]
        if step < first:
            return
        old = answer_loss if self.average is None else self.average
        self.average = SMOOTHING * old + (1 - SMOOTHING) * answer_loss
        last_stage = len(self.starts) == len(self.stages)
        if last_stage or step - first < SETTLING_STEPS:
            return
        if self.average < self.stages[len(self.starts) - 1].advance_below:
            self.starts.append(step + LEAD_STEPS)
            self.average = None

    def save(self, path: Path) -> None:
        """Write the progress as JSON."""
        path.write_text(json.dumps({"starts": self.starts, "average": self.average}))

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        self.starts, self.average = data["starts"], data["average"]


class NeedleBatches(Dataset[dict[str, Tensor]]):
    """Step number -> the whole batch of that step, a function of (seed, step, stage) alone."""

    def __init__(self, config: RunConfig, corpus: Corpus, curriculum: Curriculum) -> None:
        self.config, self.corpus, self.curriculum = config, corpus, curriculum
        self.chunk_size = config.model.get("chunk_size", DRTConfig.chunk_size)

    def __len__(self) -> int:
        return self.config.training.num_steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if not 0 <= step < len(self):
            raise IndexError(step)
        stage = self.curriculum.stage_at(step)
        made = batch(
            [(item.task, item.weight) for item in stage.tasks],
            self.corpus,
            seed=self.config.seed,
            index=step,
            batch_size=self.config.training.tokens_per_step // stage.length,
            length=stage.length,
            chunk_size=self.chunk_size,
        )
        return {**made, "step": torch.tensor(step)}
