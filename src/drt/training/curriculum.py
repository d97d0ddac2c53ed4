"""The curriculum: which stage a step belongs to, decided by the answer loss."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from drt.memory.files import write_whole
from drt.run_config import Stage

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
        """Write the progress as JSON, in full or not at all."""
        write_whole(path, json.dumps({"starts": self.starts, "average": self.average}))

    def load(self, path: Path) -> None:
        """Read what `save` wrote."""
        data = json.loads(path.read_text())
        self.starts, self.average = data["starts"], data["average"]
