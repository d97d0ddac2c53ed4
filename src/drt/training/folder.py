"""The folder of a run: what it holds, and whether a run may begin in it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from drt.run_config import CONFIG_FILE, FINAL_FOLDER, RunConfig, load_config

METRICS_FILE = "metrics.jsonl"

INITIAL_CONFIG_FILE = "initial.yaml"
"""In a run's folder: the configuration of the run that it began with, if that was one."""

# What is left of a run's configuration whose writing was cut short.
UNFINISHED = f"{CONFIG_FILE}.new"

# Keys of `training` that may change on the way: what is measured and saved, and how a step is
# computed. (Micro-batches draw other noise.)
FREE_TO_CHANGE = (
    *("num_micro_batches", "gradient_checkpointing", "log_every", "save_every", "evaluate_every"),
    *("tensorboard", "peak_tflops"),
)

# Keys of a run that may name a file or folder.
PATHS = ("text.corpus", "summaries.path", "corpus", "tokenizer", "initial")


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end."""
    return (folder / FINAL_FOLDER / CONFIG_FILE).is_file()


def training_seconds(folder: Path) -> float:
    """Wall seconds that the run in this folder has trained, over all its restarts."""
    return read_metrics(folder / METRICS_FILE)[-1]["seconds"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that was cut when its process ended is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    lines = path.read_text().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return records


def check_folder(folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run, or anything else."""
    if (folder / CONFIG_FILE).is_file():
        if not (resume or overwrite):
            raise ValueError(
                f"{folder} holds an earlier run: resume it, overwrite it or choose another folder"
            )
        if not overwrite:
            check_same_run(folder, config)
    elif folder.is_dir() and any(each.name != UNFINISHED for each in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of this program")


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run that was trained with another configuration.

    Raises:
        ValueError: it is another; some differences are named.
    """
    other = changes_since(folder, config, initial_config(config))
    if other:
        raise ValueError(
            f"the run in {folder} has another configuration ({'; '.join(other[:3])}), see "
            f"{CONFIG_FILE} and {INITIAL_CONFIG_FILE} there: overwrite it or choose another folder"
        )


def changes_since(folder: Path, config: RunConfig, initial: RunConfig | None) -> list[str]:
    """`differences` of the run in a folder, and of the run that it began with, to those of now.

    Args:
        folder: where the run is kept.
        config: what it would be trained with now.
        initial: what the run is trained with that it would begin with now; None = not known.
    """
    other = differences(load_config(folder / CONFIG_FILE), config)
    kept = folder / INITIAL_CONFIG_FILE
    if initial is not None and kept.is_file():
        other += [f"of the initial run, {each}" for each in differences(load_config(kept), initial)]
    return other


def initial_config(config: RunConfig) -> RunConfig | None:
    """The configuration of the run, or checkpoint, that a run begins with; None = there is none."""
    file = None if config.initial is None else Path(config.initial) / CONFIG_FILE
    return load_config(file) if file is not None and file.is_file() else None


def differences(before: RunConfig, now: RunConfig) -> list[str]:
    """Where two runs differ in what they are trained with: "key was .. and is ..", by key.

    Where they are kept may differ, what they are asked afterwards, their `evaluation`, and what is
    measured and saved on the way; so may gradient checkpointing, and their micro-batches, with
    which another number of processes makes as many parts of a step. Paths may be written in another
    way. Runs to begin with are the same ones by their last two names: the folder of a study may
    have moved.
    """
    old, new = _trained_with(before), _trained_with(now)
    return [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def _trained_with(config: RunConfig) -> dict[str, Any]:
    found = asdict(config)
    del found["evaluation"], found["output_dir"]
    for key in FREE_TO_CHANGE:
        del found["training"][key]
    flat = _flat(found)
    flat |= {key: os.path.normpath(flat[key]) for key in PATHS if flat.get(key)}
    if config.initial is not None:
        flat["initial"] = "/".join(Path(flat["initial"]).parts[-2:])
    return flat


def _flat(mapping: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat
