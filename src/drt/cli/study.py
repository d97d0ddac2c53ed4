"""`drt study NAME`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from drt.shipped import find_config

NAME = "study"
HELP = "Train and measure all models of a table, and write its page."
EPILOG = (
    "A study that was stopped goes on where it was when the same command is given again. "
    "Example: drt study perplexity-1m corpus=data/pg19-bytes --workers 2"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("study", help="a YAML file, or the name of a shipped study")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="a parameter or another key: seeds=[0]"
    )
    parser.add_argument("--output", type=Path, help="folder of the runs; one in runs/studies")
    parser.add_argument("--page", type=Path, help="the page that is written; docs/results/NAME.md")
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at a time, which share the cores"
    )
    parser.add_argument(
        "--processes", type=int, default=1, help="processes that train one run, say one a GPU"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--page-only", action="store_true", help="only write the page of what is there"
    )
    what.add_argument(
        "--only",
        nargs=2,
        metavar=("ROW", "SEED"),
        help="only train and measure this run, in this process",
    )


def run(options: argparse.Namespace) -> None:
    """Do what is left of the study, then write its page."""
    from drt.study import Job, load_study, run_job
    from drt.study.config import slug
    from drt.study.report import write_page

    path = find_config(options.study, folder="studies")
    study = load_study(path, options.overrides)
    name = slug(study.runs) if study.runs else path.stem
    folder = options.output or Path("runs/studies") / name
    if options.only:
        row, seed = options.only
        if row not in study.trained or not seed.isdecimal():
            raise ValueError(f"no run {row!r} {seed!r}: rows are {', '.join(study.trained)}")
        run_job(study, Job(row, int(seed)), folder)
        return
    failed = [] if options.page_only else _run_all(study, folder, options)
    page = options.page or Path("docs/results") / f"{path.stem}.md"
    problems = [f"{len(failed)} runs failed: {'; '.join(failed)}"] if failed else []
    try:
        write_page(study, folder, page, command=_command(options))
        print(f"page: {page}\nruns: {folder}")
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))


def _run_all(study: Any, folder: Path, options: argparse.Namespace) -> list[str]:
    """Run what is left; which runs failed."""
    from drt.study.jobs import check_jobs, plan_jobs, run_all
    from drt.study.report import Results, find_problems

    for name in ("workers", "processes"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    check_jobs(study, folder, num_processes=options.processes)
    failed, is_checked = [], False
    print(f"{len(plan_jobs(study))} runs in {folder}, what they say in <row>/seed-<n>-log.txt")
    for job, seconds, status in run_all(
        study,
        folder,
        num_workers=options.workers,
        num_processes=options.processes,
        command=lambda job: _words(job, folder, options),
    ):
        print(f"{job.row}, seed {job.seed}: {'done' if status == 0 else 'failed'}, {seconds:.0f} s")
        if status:
            failed.append(f"{job.row} {job.seed}, exit status {status}")
        elif job.row in study.rows and not is_checked:
            # Said as soon as there is a record: the page comes when all is trained.
            for problem in find_problems(Results(study, folder)):
                print(f"note: {problem}")
            is_checked = True
    return failed


def _words(job: Any, folder: Path, options: argparse.Namespace) -> list[str]:
    """The command line of one run, for this Python."""
    several = ["-m", "torch.distributed.run", "--standalone"]
    return [
        *([*several, "--nproc-per-node", str(options.processes)] if options.processes > 1 else []),
        *("-m", "drt.cli.main", "study", options.study, *options.overrides),
        *("--output", str(folder), "--only", job.row, str(job.seed)),
    ]


def _command(options: argparse.Namespace) -> str:
    words = ["drt", "study", options.study, *options.overrides]
    for name, default in (("output", None), ("page", None), ("workers", 1), ("processes", 1)):
        value = getattr(options, name)
        if value != default:
            words += [f"--{name}", str(value)]
    return shlex.join(words)
