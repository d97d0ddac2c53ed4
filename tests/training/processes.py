"""Functions run in several processes that know of each other, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

TIMEOUT = 120.0
"""Seconds after which processes that still run are taken for hanging."""


def run_processes(function: Callable[[int], None], count: int, folder: Path) -> list[int]:
    """Call `function(rank)` in `count` forked processes joined over gloo; what each exits with.

    What a process printed or raised is in `folder`, in rank0.txt and so on. 0 = it returned, 1 = it
    raised, negative = it was killed by that signal.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_run, args=(function, rank, count, port, folder))
        for rank in range(count)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join(TIMEOUT)
    hanging = [each for each in started if each.is_alive()]
    for each in hanging:
        each.kill()
        each.join()
    said = "\n".join((folder / f"rank{rank}.txt").read_text() for rank in range(count))
    assert not hanging, f"{len(hanging)} of {count} processes hang:\n{said}"
    return [each.exitcode or 0 for each in started]


def _run(function: Callable[[int], None], rank: int, count: int, port: int, folder: Path) -> None:
    output = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Those of the parent may be pytest's.
    sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
    if count > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(count),
            LOCAL_WORLD_SIZE=str(count),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    # What the parent knows of processes is of the parent alone.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(1)
    code = 0
    try:
        function(rank)
    except BaseException:
        traceback.print_exc()
        code = 1
    # Without the clean-up of pytest, which is the parent's.
    sys.stdout.flush()
    os._exit(code)
