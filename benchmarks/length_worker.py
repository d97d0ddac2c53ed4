"""One process of benchmarks/length.py: one model with one memory, read from end to end."""

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from common import resident_bytes
from drt import DRTConfig
from drt.memory import DiskMemory
from drt.memory.base import InferenceMemory
from drt.precision import autocast
from length_models import (
    Baseline,
    Contestant,
    Ours,
    Step,
    Tier,
    check,
    full_attention,
    load_model,
    new_memory,
    num_parameters,
    random_bytes,
    sliding_window,
)

NUM_CHUNKS = 4
"""Chunks decoded in a repeat."""

NUM_QUERIES = 20
"""Searches and gathers that are timed."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    model: str
    """A name of `CONFIGURATIONS`."""
    tier: Tier
    """Where the memory is."""
    full_attention: bool
    """Whether Llama and Mistral read everything too; else Mistral reads what fills its cache."""
    lengths: list[int]
    """Milestones in tokens, ascending."""
    folder: str
    """Where a memory on disk may write."""
    checkpoint: str | None = None
    """Trained model in place of random weights."""
    dtype: str = "bfloat16"
    """In which the memory stores keys and values, a name of `DTYPES`."""
    bfloat16: bool = False
    """Whether to multiply matrices in bfloat16."""
    budget: float = 120.0
    """Seconds for the reading of one row of the table, and for its decoding."""
    repeats: int = 5
    """Repeats of the decoding, fewer where they take longer than the budget."""


@dataclass(frozen=True)
class Reading:
    """A stretch that was read, from the last milestone to this one."""

    tokens: int
    """How many; fewer than to the milestone if the budget ended."""
    cpu: float
    """Seconds of the process."""
    wall: float
    """Seconds."""


@dataclass
class Decoding:
    """CPU milliseconds a token, one sample a repeat."""

    mean: list[float] = field(default_factory=list)
    """Of all tokens of whole chunks."""
    plain: list[float] = field(default_factory=list)
    """Median of the tokens that close no chunk of ours."""
    landmark: list[float] = field(default_factory=list)
    """Mean of the tokens that close a chunk of ours."""

    def add(self, milliseconds: list[float], closes: list[bool]) -> None:
        """Take in a repeat, token by token."""
        pairs = list(zip(milliseconds, closes, strict=True))
        self.mean.append(mean(milliseconds))
        self.plain.append(median(time for time, closing in pairs if not closing))
        self.landmark.append(mean(time for time, closing in pairs if closing))


@dataclass
class Row:
    """What was measured at a milestone."""

    milestone: int
    """Tokens that were to be read."""
    length: int
    """Tokens that ours has read."""
    reading: dict[str, Reading]
    """By contestant that was reading."""
    decoding: dict[str, Decoding]
    """By contestant that has reached the milestone, or that keeps no more with length."""
    search_ms: list[float]
    """CPU milliseconds of `memory.search` of one query."""
    gather_ms: list[float]
    """CPU milliseconds of `memory.gather` of what it found."""
    resident: int
    """Resident bytes of the process."""
    num_bytes: dict[str, dict[Tier, int]]
    """By contestant that was decoding, and tier: what is kept of the text."""
    landmark_bytes: int
    """Bytes of the landmarks in the memory."""


def run(job: Job) -> dict[str, Any]:
    """Everything of one process."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=job.folder)))
        stack.enter_context(torch.inference_mode())
        model = load_model(job.model, job.checkpoint)
        config = model.config
        memory = new_memory(job.tier, dtype=DTYPES[job.dtype], folder=folder / "memory")
        exact = new_memory(job.tier, dtype=torch.float32, folder=folder / "checked")
        deviations = {"DRT": check(Ours(model, exact))}
        exact.close()
        baselines = _baselines(job, config)
        if job.full_attention:
            deviations |= {baseline.name: check(baseline) for baseline in _baselines(job, config)}
        stack.enter_context(autocast("bfloat16" if job.bfloat16 else "float32", model.device))
        rows = _read(job, Ours(model, memory), baselines)
        reload = {}
        if isinstance(memory, DiskMemory):
            reload = _reload(memory, config)
    parameters = {"DRT": num_parameters(model)}
    parameters |= {baseline.name: num_parameters(baseline.model) for baseline in baselines}
    return {
        "job": asdict(job),
        "parameters": parameters,
        "deviations": deviations,
        "rows": [asdict(row) for row in rows],
        "reload": reload,
    }


def _baselines(job: Job, config: DRTConfig) -> list[Baseline]:
    return [sliding_window(config), *([full_attention(config)] if job.full_attention else [])]


def _read(job: Job, ours: Ours, baselines: Sequence[Baseline]) -> list[Row]:
    """Read from milestone to milestone, and measure at each, until a budget ends."""
    rows: list[Row] = []
    readers: list[Contestant] = [ours]
    if job.full_attention:
        readers += baselines
    else:
        # With its cache full, Mistral decodes everywhere as it does here.
        for baseline in baselines:
            baseline.read(random_bytes(2 * ours.model.config.sliding_window, seed=0), budget=1e9)
    previous = 0
    for milestone in job.lengths:
        ids = random_bytes(milestone - previous, seed=milestone)
        reading = {x.name: _timed_reading(x, ids, job.budget) for x in readers}
        readers = [x for x in readers if reading[x.name].tokens == ids.shape[1]]
        del ids
        length = previous + reading["DRT"].tokens
        able = [ours, *(x for x in baselines if x in readers or x.is_bounded)]
        rows.append(_measure(job, ours, able, milestone=milestone, length=length, reading=reading))
        _progress(job, rows[-1])
        previous = milestone
        if ours not in readers or (job.full_attention and baselines[-1] not in readers):
            break
    return rows


def _timed_reading(contestant: Contestant, ids: Tensor, budget: float) -> Reading:
    cpu, wall = time.process_time(), time.perf_counter()
    tokens = contestant.read(ids, budget=budget)
    return Reading(tokens, time.process_time() - cpu, time.perf_counter() - wall)


def _measure(
    job: Job,
    ours: Ours,
    contestants: Sequence[Contestant],
    *,
    milestone: int,
    length: int,
    reading: dict[str, Reading],
) -> Row:
    """All of a row but the reading."""
    config, memory = ours.model.config, ours.memory
    # Chunks close at multiples of their size, and milestones need not be such.
    closes = [
        (length + n + 1) % config.chunk_size == 0 for n in range(NUM_CHUNKS * config.chunk_size)
    ]
    decoding = time_decoding(contestants, closes, repeats=job.repeats, budget=job.budget)
    search, gather = time_retrieval(memory, config)
    width = config.landmark_size or config.hidden_size
    return Row(
        milestone=milestone,
        length=length,
        reading=reading,
        decoding=decoding,
        search_ms=search,
        gather_ms=gather,
        resident=resident_bytes(),
        num_bytes={x.name: x.num_bytes() for x in contestants},
        landmark_bytes=len(memory) * width * memory.options.landmark_dtype.itemsize,
    )


def time_decoding(
    contestants: Sequence[Contestant], closes: list[bool], *, repeats: int, budget: float
) -> dict[str, Decoding]:
    """Decode token by token from where each stands, a chunk in turn.

    Args:
        contestants: who.
        closes: for each token of a repeat, whether it closes a chunk of ours.
        repeats: repeats.
        budget: seconds after which no repeat begins.
    """
    found = {x.name: Decoding() for x in contestants}
    ids = random_bytes(len(closes), seed=2)
    start = time.perf_counter()
    for number in range(-1, repeats):
        branches = {x.name: x.branch() for x in contestants}
        times: dict[str, list[float]] = {name: [] for name in branches}
        # The first repeat is a warm-up of one chunk.
        parts = ids.split(len(closes) // NUM_CHUNKS, dim=1)[: 1 if number < 0 else None]
        gc.disable()
        for part in parts:
            for name, step in branches.items():
                times[name] += _step_times(step, part)
        gc.enable()
        if number >= 0:
            for name, milliseconds in times.items():
                found[name].add(milliseconds, closes)
            if time.perf_counter() - start > budget:
                break
    return found


def _step_times(step: Step, ids: Tensor) -> list[float]:
    """CPU milliseconds of each of the (1, n) tokens."""
    times = []
    for token in ids.split(1, dim=1):
        start = time.process_time()
        step(token)
        times.append(1e3 * (time.process_time() - start))
    return times


def time_retrieval(memory: InferenceMemory, config: DRTConfig) -> tuple[list[float], list[float]]:
    """CPU milliseconds of each search, and of gathering what it found."""
    searches, gathers = [], []
    for query, limit in _queries(memory, config, NUM_QUERIES + 1):
        start = time.process_time()
        found = memory.search(query, limit, topk=config.retrieval_topk)
        middle = time.process_time()
        memory.gather(found.indices)
        searches.append(1e3 * (middle - start))
        gathers.append(1e3 * (time.process_time() - middle))
    # The first is a warm-up.
    return searches[1:], gathers[1:]


def _queries(memory: InferenceMemory, config: DRTConfig, count: int) -> list[tuple[Tensor, Tensor]]:
    """Random queries (1, 1, L), each with its limits (1, 1)."""
    generator = torch.Generator().manual_seed(3)
    shape = (1, 1, config.landmark_size or config.hidden_size)
    limits = torch.tensor([[len(memory)]])
    return [(torch.randn(shape, generator=generator), limits) for _ in range(count)]


def _reload(memory: DiskMemory, config: DRTConfig) -> dict[str, dict[str, float]]:
    """Close the memory and read it back, from the medium and then from the page cache."""
    folder = memory.folder
    close = _wall_seconds(memory.close)
    _forget_files(folder)
    cold = reload_seconds(folder, config=config)
    return {"close": {"sync": close}, "cold": cold, "warm": reload_seconds(folder, config=config)}


def reload_seconds(folder: Path, *, config: DRTConfig) -> dict[str, float]:
    """Wall seconds from a closed folder to the first retrieval.

    `drt.DRTState.load` and the first token of an answer belong here.
    """
    start = time.perf_counter()
    with DiskMemory.open(folder) as memory:
        opened = time.perf_counter()
        ((query, limit),) = _queries(memory, config, 1)
        memory.gather(memory.search(query, limit, topk=config.retrieval_topk).indices)
        return {"open": opened - start, "retrieve": time.perf_counter() - opened}


def _forget_files(folder: Path) -> None:
    """Ask the kernel to drop a folder's files, which are synced, from its page cache."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _progress(job: Job, row: Row) -> None:
    rate = row.reading["DRT"].tokens / row.reading["DRT"].wall
    text = f"{job.model}, {job.tier}, {row.length} tokens: {rate:.0f} tokens/s"
    for name, decoding in row.decoding.items():
        text += f", {name} {median(decoding.mean):.2f} ms/token"
    print(text, file=sys.stderr, flush=True)
