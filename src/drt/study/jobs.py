"""The work of a study: each run trained once and measured once, wherever it was stopped before."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from drt import hardware
from drt.checkpoints import load_checkpoint
from drt.configuration import DRTConfig
from drt.data.tokenization import tokenizer_fingerprint
from drt.evaluation import tasks
from drt.evaluation.needles import common_chunk_size
from drt.evaluation.reading import position_limit
from drt.evaluation.tasks import make_task
from drt.flops import flops_if_known
from drt.memory.files import write_whole
from drt.run_config import CONFIG_FILE, FINAL_FOLDER, RunConfig, read_mapping
from drt.study.config import Measurement, StudyConfig, run_config, run_folder
from drt.training import train
from drt.training.folder import changes_since, initial_config, is_finished, training_seconds
from drt.training.materials import Planned, check_data, plan_of, plan_run
from drt.training.run import check_processes

RESULTS_FILE = "results.json"
"""In a run's folder: a list of what was measured, with what settings and on what hardware."""

FACTS_FILE = "facts.json"
"""In a run's folder: how large the model is, what a token of training takes, and how long the
whole training took."""

LOG_FILE = "log.txt"


class Job(NamedTuple):
    """One run of a row."""

    row: str
    """The row's name."""
    seed: int
    """The run's seed."""


def plan_jobs(study: StudyConfig) -> list[Job]:
    """All runs: every row with the first seed, then with the next, so that tables fill evenly."""
    return [Job(row, seed) for seed in study.seeds for row in study.trained]


def results_of(study: StudyConfig, job: Job, folder: Path) -> dict[str, Any]:
    """What has been measured of a run with the study's settings, by measurement."""
    return {name: each["record"] for name, each in _measured(study, job, folder)}


def hardware_of(study: StudyConfig, job: Job, folder: Path) -> list[str]:
    """What that was measured on, measurement by measurement."""
    return [each["hardware"] for _, each in _measured(study, job, folder)]


def _measured(study: StudyConfig, job: Job, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The study's measurements of a run, by name, as they are stored."""
    stored = _stored(run_folder(folder, job.row, job.seed))
    for name, measurement in study.measurements_of(job.row).items():
        for each in stored:
            if each["measurement"] == _as_stored(measurement):
                yield name, each


def _stored(here: Path) -> list[dict[str, Any]]:
    """All that was ever measured of a run, maybe with other settings or by another study."""
    file = here / RESULTS_FILE
    return json.loads(file.read_text()) if file.is_file() else []


def _as_stored(measurement: Measurement) -> dict[str, Any]:
    """What JSON makes of it: keys that are texts, lists."""
    return json.loads(json.dumps(asdict(measurement)))


def check_jobs(study: StudyConfig, folder: Path, *, num_processes: int = 1) -> None:
    """Refuse, before hours of training, what would fail after them.

    Args:
        study: the study.
        folder: where its runs are kept.
        num_processes: processes that train a run.

    Raises:
        ValueError: a row or a measurement has a wrong setting or no data, a model cannot be as its
            row says, or there is a run that was trained with another configuration than its row has
            now.
        ImportError: a measurement needs a library that is not installed.
    """
    base = read_mapping(Path(study.base))
    _check_same_tokens(study)
    checked: list[Any] = []
    planned: dict[str, Planned] = {}
    chunk_sizes: dict[str, int] = {}
    for row in study.trained:
        try:
            config = run_config(study, base, row, study.seeds[0], folder)
            runs = (Job(row, seed) for seed in study.seeds)
            if not all(_is_trained(study, run, folder) for run in runs):
                check_processes(config, num_processes)
            plan = _plan(study, base, row, planned)
            chunk_sizes[row] = common_chunk_size([plan.model_config])
            # Rows that are alike in these can do the same measurements.
            of_text = plan.model_config.get_text_config()
            alike = (tokenizer_fingerprint(plan.tokenizer), chunk_sizes[row])
            alike += (position_limit(plan.model_config), isinstance(of_text, DRTConfig))
            alike += (getattr(of_text, "bos_token_id", None),)
            for measurement in study.measurements_of(row).values():
                if (measurement, alike) not in checked:
                    task = make_task(measurement.task, measurement.settings)
                    tasks.check_data(task)
                    tasks.check_model(task, plan.tokenizer, plan.model_config)
                    checked.append((measurement, alike))
            # Rows of a study mostly share their data.
            data = (config.text, config.summaries, config.training, config.tokenizer)
            of_needles = (config.stages, config.chunk_size, config.model.get("chunk_size"))
            data += (config.corpus, config.evaluation, *of_needles) if config.stages else ()
            if data not in checked:
                check_data(config, plan)
                checked.append(data)
        except ValueError as error:
            raise ValueError(f"row {row!r}: {error}") from error
    _check_same_questions(study, {chunk_sizes[row] for row in study.rows})
    for job in plan_jobs(study):
        check_configuration(study, base, job, folder)


def _is_trained(study: StudyConfig, job: Job, folder: Path) -> bool:
    """Whether a run is trained, or its model not needed any more."""
    return is_finished(run_folder(folder, *job)) or is_done(study, job, folder)


def _plan(study: StudyConfig, base: dict[str, Any], row: str, known: dict[str, Planned]) -> Planned:
    """What a row's model will be."""
    if row not in known:
        config = run_config(study, base, row, study.seeds[0], Path())
        source, initial = study.initial_row(row), None
        if source is not None:
            initial = _plan(study, base, source, known)
        elif config.initial is not None:
            initial = plan_of(config.initial)
        known[row] = plan_run(config, initial)
    return known[row]


def _check_same_tokens(study: StudyConfig) -> None:
    """Refuse perplexities of rows beside each other that are of other tokens."""
    for name, made in study.measurements.items():
        first: dict[str, Any] = {}
        for row in study.rows if made.task == "perplexity" else ():
            task: Any = make_task(made.task, study.measurements_of(row)[name].settings)
            first = first or task.scored
            if task.scored != first:
                raise ValueError(
                    f"{name!r} scores other tokens of row {row!r}, {task.scored}, than of the "
                    f"first row, {first}"
                )


def _check_same_questions(study: StudyConfig, sizes: set[int]) -> None:
    """Refuse questions that would end elsewhere for some rows, whose chunks are of these sizes."""
    for row in study.rows if len(sizes) > 1 else ():
        for name, measurement in study.measurements_of(row).items():
            task = make_task(measurement.task, measurement.settings)
            if getattr(task, "chunk_size", 0) is None:
                raise ValueError(
                    f"{name!r} has no chunk_size, and rows have chunks of {sorted(sizes)} tokens: "
                    "their questions would end elsewhere"
                )


def check_configuration(
    study: StudyConfig, base: dict[str, Any], job: Job, folder: Path
) -> RunConfig:
    """The configuration of a run, which must be that with which it was begun, if it was.

    What may differ is said in `differences`.

    Raises:
        ValueError: it was begun with another one; some differences are named.
    """
    config = run_config(study, base, job.row, job.seed, folder)
    file = Path(config.output_dir) / CONFIG_FILE
    if not file.is_file():
        return config
    initial, source = initial_config(config), study.initial_row(job.row)
    if source is not None:
        initial = run_config(study, base, source, job.seed, folder)
    other = changes_since(file.parent, config, initial)
    if other:
        raise ValueError(
            f"row {job.row!r}, seed {job.seed}, was trained with another configuration: "
            f"{'; '.join(other[:3])}. Remove {file.parent}, or give the row another name"
        )
    return config


def is_done(study: StudyConfig, job: Job, folder: Path) -> bool:
    """Whether nothing is left to do for a run.

    A model that has been measured may be removed, unless a run that is not done begins with it.
    """
    here = run_folder(folder, job.row, job.seed)
    if job.row in study.rows:
        measured = len(results_of(study, job, folder)) == len(study.measurements_of(job.row))
        if not (measured and (here / FACTS_FILE).is_file()):
            return False
    followers = [row for row in study.trained if study.initial_row(row) == job.row]
    used = all(is_done(study, Job(row, job.seed), folder) for row in followers)
    return is_finished(here) or (used and (job.row in study.rows or bool(followers)))


def run_job(study: StudyConfig, job: Job, folder: Path) -> None:
    """Train a run and measure it, as far as that was not done before.

    Under torchrun all processes train, and the first one measures. While another study works on
    the run, this one waits.

    Raises:
        ValueError: the run's configuration is another than the one it was trained with.
    """
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    with alone(job, folder):
        _run_job(study, job, folder)


@contextmanager
def alone(job: Job, folder: Path) -> Iterator[None]:
    """Wait until no other process works on a run: that of a study that was killed may still do so.

    Processes that train the run together wait together, and the first one of them keeps others out.

    Args:
        job: the run.
        folder: where the study's runs are kept.
    """
    here = run_folder(folder, job.row, job.seed)
    here.parent.mkdir(parents=True, exist_ok=True)
    # Beside the run's folder, which a new run wants empty. It ends with the process.
    with here.with_name(f"{here.name}.lock").open("w") as file:
        is_first, waits = PartialState().is_main_process, False
        # Asked for again and again: those who wait for one that waits would run out of time.
        while not _told_by_first(is_first and _try_lock(file)):
            if is_first and not waits:
                print(f"another process works on {here}: waiting until it has ended", flush=True)
            waits = True
            time.sleep(0.5)
        yield


def _try_lock(file: Any) -> bool:
    """Lock a file, unless somebody else has; whether that was done."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told_by_first(value: bool) -> bool:
    """What the first process says, in all of them."""
    told = [value]
    broadcast_object_list(told)
    return told[0]


def _run_job(study: StudyConfig, job: Job, folder: Path) -> None:
    config = check_configuration(study, read_mapping(Path(study.base)), job, folder)
    here = Path(config.output_dir)
    done, trained = is_done(study, job, folder), is_finished(here)
    begun = (here / CONFIG_FILE).is_file()
    # The first process writes the run's files as soon as it trains: by now all have looked.
    PartialState().wait_for_everyone()
    if done:
        return
    if not trained:
        if (here / FACTS_FILE).is_file():
            print(f"{here} was measured and has no model any more: it is trained again", flush=True)
        train(config, resume=begun, title=f"train {job.row} {job.seed}")
    if not PartialState().is_main_process or is_done(study, job, folder):
        return
    checkpoint = load_checkpoint(here / FINAL_FOLDER)
    if not (here / FACTS_FILE).is_file():
        facts = {**_facts(checkpoint.model, config), "seconds": training_seconds(here)}
        write_whole(here / FACTS_FILE, json.dumps(facts))
    done = results_of(study, job, folder)
    for name, measurement in study.measurements_of(job.row).items():
        if name not in done:
            task = make_task(measurement.task, measurement.settings)
            record = task.evaluate(checkpoint, title=f"{job.row} {job.seed}: {name}")
            new = {
                "measurement": _as_stored(measurement),
                "hardware": hardware.describe(),
                "record": record,
            }
            write_whole(here / RESULTS_FILE, json.dumps([*_stored(here), new], indent=1))


def facts_of(job: Job, folder: Path) -> dict[str, Any]:
    """Size, operations and time of a finished run."""
    return json.loads((run_folder(folder, job.row, job.seed) / FACTS_FILE).read_text())


def _facts(model: Any, config: RunConfig) -> dict[str, Any]:
    """Size of a model, and operations of a forward and backward a token of a training row."""
    flops = flops_if_known(model, config.train_length)
    per_token = None if flops is None else flops / config.train_length
    return {"parameters": model.num_parameters(), "flops_per_token": per_token}


def run_all(
    study: StudyConfig,
    folder: Path,
    *,
    num_workers: int,
    num_processes: int = 1,
    command: Callable[[Job], list[str]],
) -> Iterator[tuple[Job, float, int]]:
    """Run what is left to do, several runs at a time, each in a process of its own.

    Args:
        study: the study.
        folder: where its runs are kept.
        num_workers: runs at a time.
        num_processes: processes that train a run.
        command: the command line of a job's process.

    Yields:
        Each job that has ended, its wall seconds and its exit status.
    """
    waiting = [job for job in plan_jobs(study) if not is_done(study, job, folder)]
    running: dict[Job, tuple[Any, float]] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) < num_workers and _is_ready(study, job, folder):
                    waiting.remove(job)
                    process = _start(command(job), job, folder, shares=num_workers * num_processes)
                    running[job] = (process, time.monotonic())
            if not running:
                # What the rest begin with has failed.
                return
            time.sleep(0.5)
            for job, (process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[job]
                    yield job, time.monotonic() - begun, process.returncode
    finally:
        for process, _ in running.values():
            process.terminate()


def _is_ready(study: StudyConfig, job: Job, folder: Path) -> bool:
    source = study.initial_row(job.row)
    return source is None or is_finished(run_folder(folder, source, job.seed))


def _start(command: list[str], job: Job, folder: Path, *, shares: int) -> Any:
    here = run_folder(folder, job.row, job.seed)
    log = here.parent / f"{here.name}-{LOG_FILE}"
    log.parent.mkdir(parents=True, exist_ok=True)
    # Processes side by side would each take all cores otherwise.
    threads = max(hardware.usable_cores() // shares, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with log.open("a") as file:
        return subprocess.Popen(
            [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
