"""The folder of a run: what it holds, and whether a run may begin in it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from drt.run_config import CONFIG_FILE, FINAL_FOLDER, RunConfig, load_config

METRICS_FILE = "metrics.jsonl"


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end."""
    return (folder / FINAL_FOLDER / CONFIG_FILE).is_file()


def training_seconds(folder: Path) -> float:
    """Wall seconds that the run in this folder has trained, over all its restarts."""
    lines = (folder / METRICS_FILE).read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


def check_folder(folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run, or anything else."""
    if (folder / CONFIG_FILE).is_file():
        if not (resume or overwrite):
            raise ValueError(
                f"{folder} holds an earlier run: resume it, overwrite it or choose another folder"
            )
        if not overwrite:
            check_same_run(folder, config)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of this program")


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run that was trained with another configuration.

    What it is asked afterwards, its `evaluation`, may differ. So may its micro-batches, with which
    another number of processes makes as many parts of a step.
    """
    file = folder / CONFIG_FILE
    found = load_config(file)
    training = replace(found.training, num_micro_batches=config.training.num_micro_batches)
    if replace(found, evaluation=config.evaluation, training=training) != config:
        raise ValueError(
            f"the run in {folder} has another configuration, see {file}: "
            "overwrite it or choose another folder"
        )
