"""A run small enough for a test: two stages, 60 steps, a few seconds."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from drt.training import RunConfig, load_config


def small_run(folder: Path, model: dict[str, Any]) -> RunConfig:
    """A tiny model on short rows; the second stage begins as soon as it may."""
    task = {"kind": "single", "num_questions": 1, "num_digits": 2}
    data = {
        "output_dir": str(folder),
        "model": model,
        "training": {
            "num_steps": 60,
            "tokens_per_step": 256,
            "warmup_steps": 2,
            "log_every": 1,
            "save_every": 10,
            "evaluate_every": 0,
        },
        "stages": [
            {"length": 128, "advance_below": 100.0, "tasks": [{"task": task}]},
            {"length": 256, "tasks": [{"task": task}]},
        ],
        "evaluation": {
            "lengths": [128, 256],
            "questions": 4,
            "multi": {"kind": "multi", "num_keys": 2, "num_questions": 2, "num_digits": 2},
        },
    }
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_config(file)


@pytest.fixture
def run_config(tmp_path: Path, small_model: dict[str, Any]) -> RunConfig:
    return small_run(tmp_path / "run", small_model)
