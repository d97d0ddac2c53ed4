"""Callbacks beside those of a run: to look at its steps, or to end it in the middle."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback

from drt.training import run
from drt.training.trainer import RunTrainer


class StoppedError(Exception):
    pass


class StopAfter(TrainerCallback):
    """Raises after a step, before anything of it is written, as Ctrl-C would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise StoppedError


def add_callback(callback: TrainerCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give it to every run that begins."""
    add = run._replace_callbacks

    def with_callback(trainer: RunTrainer, *rest: Any) -> None:
        add(trainer, *rest)
        trainer.add_callback(callback)

    monkeypatch.setattr(run, "_replace_callbacks", with_callback)
