"""One process of benchmarks/length.py: one model with one memory, read from end to end."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from common import resident_bytes
from decoding import Decoding, Steps, closing_tokens, time_decoding
from drt import DRTConfig, DRTForCausalLM
from drt.memory import DiskMemory
from drt.memory.base import InferenceMemory
from drt.precision import autocast
from length_models import (
    Baseline,
    Contestant,
    Ours,
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
        make = partial(new_memory, job.tier, model=model)
        memory = make(dtype=DTYPES[job.dtype], folder=folder / "memory")
        exact = make(dtype=torch.float32, folder=folder / "checked")
        deviations = {"DRT": check(Ours(model, exact))}
        exact.close()
        baselines = _baselines(job, model)
        if job.full_attention:
            deviations |= {baseline.name: check(baseline) for baseline in _baselines(job, model)}
        stack.enter_context(autocast("bfloat16" if job.bfloat16 else "float32", model.device))
        ours = Ours(model, memory)
        rows = _read(job, ours, baselines)
        reload = _reload(ours, memory) if isinstance(memory, DiskMemory) else {}
    parameters = {"DRT": num_parameters(model)}
    parameters |= {baseline.name: num_parameters(baseline.model) for baseline in baselines}
    return {
        "job": asdict(job),
        "parameters": parameters,
        "deviations": deviations,
        "rows": [asdict(row) for row in rows],
        "reload": reload,
    }


def _baselines(job: Job, model: DRTForCausalLM) -> list[Baseline]:
    return [sliding_window(model), *([full_attention(model)] if job.full_attention else [])]


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
    closes = closing_tokens(length, config.chunk_size, num_chunks=NUM_CHUNKS)
    steps = Steps(closes, num_chunks=NUM_CHUNKS, device=ours.model.device)
    decoding = time_decoding(contestants, steps, repeats=job.repeats, budget=job.budget)
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


def _reload(ours: Ours, memory: DiskMemory) -> dict[str, dict[str, float]]:
    """Save the state and load it again, from the medium and then from the page cache."""
    folder, model = memory.folder, ours.model
    save = _wall_seconds(lambda: model.save_state(ours.state, folder))
    memory.close()
    _forget_files(folder)
    cold = reload_seconds(model, folder)
    return {"save": {"sync": save}, "cold": cold, "warm": reload_seconds(model, folder)}


def reload_seconds(model: DRTForCausalLM, folder: Path) -> dict[str, float]:
    """Wall seconds to load a state, and from there to the first token of an answer.

    The model is in memory already; its fingerprint is computed within.
    """
    start = time.perf_counter()
    state, _ = model.load_state(folder)
    loaded = time.perf_counter()
    question = random_bytes(40, seed=4)
    ends = torch.zeros_like(question, dtype=torch.bool)
    ends[:, -1] = True
    out = model(question, past_key_values=state, chunk_ends=ends, logits_to_keep=1)
    assert 0 <= int(out.logits.argmax()) < model.config.vocab_size
    return {"load": loaded - start, "first answer token": time.perf_counter() - loaded}


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
