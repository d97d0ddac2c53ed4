"""`drt eval CHECKPOINT...`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from drt.cli.lengths import length

NAME = "eval"
HELP = "Measure models on a task, side by side: needles at several context lengths, and others."
EPILOG = (
    "Settings of needles and babi that are not given come from the first run's configuration. "
    "drt eval --list-tasks shows all tasks and settings. "
    "Example: drt eval runs/demo/drt runs/demo/baseline --task multi --lengths 1024 64K"
)
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="folder of a run or of any saved causal language model, or its name on the hub",
    )
    parser.add_argument(
        "--task", default=ALL, help="what to measure; all = single and multi, the default"
    )
    parser.add_argument("--list-tasks", action="store_true", help="list tasks with their settings")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="key=value",
        dest="settings",
        help="change settings of the task: depths=[0,0.5,1] task.num_keys=8",
    )
    parser.add_argument(
        "--lengths", type=length, nargs="+", help="context lengths in tokens: 1024 64K 16M"
    )
    parser.add_argument("--questions", type=int, help="questions per length and task")
    parser.add_argument("--corpus", help="haystack: text file, folder, .jsonl or .jsonl.xz")
    parser.add_argument("--memory", choices=("host", "disk"), help="where chunks are kept")
    parser.add_argument(
        "--memory-dtype",
        choices=("computed", "float32", "bfloat16", "int8"),
        help="how keys and values are stored",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        help="of matrix products, and of the weights of models that drt has not trained "
        "[as in the run's configuration; float32 for others]",
    )
    parser.add_argument("--seed", type=int, help="seed of the examples")
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--figure", type=Path, help="also draw the records, say to a .png")


def run(options: argparse.Namespace) -> None:
    """Evaluate and print a table for each task."""
    from drt.checkpoints import locate_model
    from drt.evaluation.tasks import check_data, describe_tasks, for_models

    if options.list_tasks:
        print(describe_tasks())
        return
    models = _by_name(options.checkpoints)
    sources = [locate_model(model) for model in models.values()]
    tasks = {name: for_models(task, sources) for name, task in _tasks(options, sources).items()}
    _check_files(options.json, options.figure)
    _check_figure(options.figure, tasks)
    for task in tasks.values():
        check_data(task)
    records: dict[str, dict[str, Any]] = {}
    try:
        _evaluate(tasks, models, records, options)
    finally:
        # What was measured before an error or an interruption is shown too.
        measured = {name: _of_task(name, records) for name in tasks}
        shown = [tasks[name].table(found) for name, found in measured.items() if found]
        if shown:
            print("\n\n".join(shown))
    if options.figure:
        for name, task in tasks.items():
            task.draw(_of_task(name, records), options.figure)


def _by_name(checkpoints: list[str]) -> dict[str, str]:
    """What each checkpoint is called in tables -> where it is."""
    from drt.run_config import FINAL_FOLDER

    if not checkpoints:
        raise ValueError("name at least one CHECKPOINT")
    if len(set(checkpoints)) < len(checkpoints):
        raise ValueError(f"a checkpoint is named twice among {' '.join(checkpoints)}")
    paths = [Path(text).resolve() if Path(text).is_dir() else Path(text) for text in checkpoints]
    short = [path.parent.name if path.name == FINAL_FOLDER else path.name for path in paths]
    names = short if len(set(short)) == len(short) else checkpoints
    return dict(zip(names, checkpoints, strict=True))


def _tasks(options: argparse.Namespace, sources: list[Path]) -> dict[str, Any]:
    """The tasks to evaluate, by name."""
    from drt.evaluation.comparison import needle_evaluations
    from drt.evaluation.tasks import make_task, parse_settings
    from drt.run_config import EvaluationConfig

    run = _first_run(sources)
    evaluation = EvaluationConfig() if run is None else run.evaluation
    if options.task == ALL and options.lengths:
        # The longest length for several needles holds for these too.
        evaluation = replace(evaluation, lengths=options.lengths)
    if options.task != ALL:
        # Asked for by its name, "multi" has these settings at any lengths.
        evaluation = replace(evaluation, multi_up_to=max(evaluation.lengths, default=0))
    needles = needle_evaluations(evaluation)
    own = {name: asdict(task) for name, task in needles.items()}
    own["needle"] = {key: value for key, value in own["single"].items() if key != "task"}
    own["babi"] = {key: own["single"][key] for key in ("memory", "memory_dtype", "segment_size")}
    haystack = {} if run is None or run.corpus is None else {"corpus": run.corpus}
    made = {}
    for name in needles if options.task == ALL else (options.task,):
        below = {**own[name], **haystack} if name in own else {}
        above = _shortcuts(options, name), parse_settings(options.settings)
        made[name] = make_task(name, below, *above)
    return made


def _first_run(sources: list[Path]) -> Any:
    """The configuration of the first model that `drt train` made; None = there is none."""
    from drt.run_config import CONFIG_FILE, load_config

    files = (source / CONFIG_FILE for source in sources)
    found = next((file for file in files if file.is_file()), None)
    return None if found is None else load_config(found)


def _shortcuts(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """The settings that have an option of their own."""
    from drt.evaluation.tasks import task_class

    known = {item.name for item in fields(task_class(name))}
    wanted = {key: getattr(options, key) for key in ("corpus", "memory", "memory_dtype")}
    if options.task != ALL:
        wanted["lengths"] = options.lengths
    wanted["questions"] = options.questions
    if "questions_longest" in known:
        wanted["questions_longest"] = options.questions
    if options.seed is not None:
        wanted |= {"seeds": [options.seed]} if "seeds" in known else {"seed": options.seed}
    return {key: value for key, value in wanted.items() if value is not None}


def _check_files(*files: Path | None) -> None:
    """Refuse files that cannot be written, before anything is measured."""
    import os

    for file in files:
        if file is None:
            continue
        if not file.parent.is_dir():
            raise ValueError(f"there is no folder {file.parent} to write {file.name} to")
        # /dev/stdout may lead to a regular file, which would be replaced under what is written.
        if file.exists() and (not file.is_file() or file.absolute().is_relative_to("/dev")):
            raise ValueError(f"{file} is no regular file: name one, which is written anew")
        if not os.access(file.resolve().parent, os.W_OK):
            raise ValueError(f"{file} cannot be written: no permission")


def _check_figure(figure: Path | None, tasks: Mapping[str, Any]) -> None:
    """Refuse a figure that cannot be drawn, before anything is measured."""
    if figure is None:
        return
    if len(tasks) > 1:
        raise ValueError(f"--figure draws one task: choose one of {', '.join(tasks)} with --task")
    for name, task in tasks.items():
        if not hasattr(task, "draw"):
            raise ValueError(f"task {name} has no figure")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if figure.suffix.removeprefix(".").lower() not in kinds:
        raise ValueError(f"--figure {figure}: its ending must be one of {', '.join(kinds)}")


def _evaluate(
    tasks: Mapping[str, Any],
    models: Mapping[str, str],
    records: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """Fill in model name -> task -> record, and write all to the file that was named after each."""
    import json

    from drt import hardware
    from drt.checkpoints import load_checkpoint
    from drt.memory.files import write_whole

    for name, where in models.items():
        checkpoint = load_checkpoint(where, precision=options.precision)
        for task in tasks:
            record = tasks[task].evaluate(checkpoint, title=f"{name}, {task}")
            records.setdefault(name, {})[task] = record
            if options.json is not None:
                content = {"hardware": hardware.describe(), "models": records}
                write_whole(options.json.resolve(), json.dumps(content, indent=2) + "\n")
        # Not held while the next one loads.
        del checkpoint


def _of_task(task: str, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: record[task] for name, record in records.items() if task in record}
