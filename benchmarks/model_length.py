"""Part of `model.py`: prefill and decoding by length, beside full attention of the same size."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

import devices
from common import print_table
from decoding import Decoding, Steps, closing_tokens, time_decoding
from drt import DecodingGraph, DRTConfig, DRTForCausalLM
from drt.memory.base import InferenceMemory
from length_models import (
    SEGMENT_SIZE,
    Baseline,
    Ours,
    Step,
    Tier,
    check,
    full_attention,
    load_model,
    new_memory,
    num_parameters,
    random_bytes,
)
from length_report import short

LARGE = DRTConfig(
    vocab_size=50257,
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=24,
    num_attention_heads=16,
    retrieval_groups=[12],
    retrieval_topk=8,
    chunk_size=64,
    sliding_window=512,
)
"""The model on a GPU: 24 layers, half of them upper ones, 351 M parameters."""

TIERS: tuple[Tier, ...] = ("device", "host")
NUM_CHUNKS = 2
"""Chunks decoded in a repeat."""
NUM_CHECKED = 2
"""Chunks that the decoding graph must decode as ordinary steps do: captures and replays."""
FULL = "Llama"
CUDA_LENGTHS = (1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 20)
CPU_LENGTHS = (1 << 11, 1 << 13, 1 << 15)
NUM_SAMPLES = 3


class Reader(Protocol):
    """A model that reads a prompt and goes on from it."""

    @property
    def name(self) -> str:
        """For the table."""
        ...

    def prefill(self, ids: Tensor) -> Tensor:
        """Read the (1, n) prompt; logits (1, 1, vocab_size) after it."""
        ...

    def branch(self) -> Step:
        """A way to go on."""
        ...

    def num_bytes(self) -> dict[Tier, int]:
        """Bytes of what is kept of the text."""
        ...


class Drt(Ours):
    """Ours, as `generate` reads: all but the last token without logits."""

    def __init__(self, model: DRTForCausalLM, memory: InferenceMemory, tier: Tier) -> None:
        super().__init__(model, memory)
        self.name = f"DRT {tier}"

    def prefill(self, ids: Tensor) -> Tensor:
        """`read`, and the last token."""
        self.model.read(ids[:, :-1], self.state, segment_size=SEGMENT_SIZE)
        return self.model(ids[:, -1:], past_key_values=self.state, logits_to_keep=1).logits


class Graphed:
    """Goes on from where a DRT stands, with its plain steps in a decoding graph."""

    is_bounded = False

    def __init__(self, ours: Ours, graph: DecodingGraph) -> None:
        self.ours = ours
        self.model = ours.model
        self.name = f"{ours.name}, graph"
        self.graph = graph
        self.read, self.num_bytes, self.full_logits = ours.read, ours.num_bytes, ours.full_logits

    def branch(self) -> Step:
        """A fork of the state, which takes the graph from the fork before."""
        self.graph.detach()
        state = self.ours.state.fork()
        self.graph.attach(state)
        return lambda ids: self.model(ids, past_key_values=state, logits_to_keep=1).logits


class Full(Baseline):
    """Full attention: the prompt in one forward, which needs no mask."""

    def prefill(self, ids: Tensor) -> Tensor:
        """In one forward."""
        return self._forward(ids, self.cache)

    def branch(self) -> Step:
        """On its own cache: two of them might not fit, and some tokens more change nothing."""
        return lambda ids: self._forward(ids, self.cache)


@dataclass
class Line:
    """What was measured of one contestant after one prompt."""

    length: int
    name: str
    prefill: list[float] = field(default_factory=list)
    """Seconds of each sample; none for a contestant that goes on where another stands."""
    peak: int | None = None
    """Bytes that the prefill needs at its peak beyond all weights."""
    kept: int | None = None
    """Bytes kept of the text."""
    decoding: Decoding | None = None
    failure: str | None = None
    """Why there is nothing."""


class Field:
    """The contestants' models, on one device and of one dtype, and who of them is out."""

    def __init__(self, model: DRTForCausalLM, *, dtype: torch.dtype, budget: float) -> None:
        self.model = model
        self.dtype = dtype
        self.budget = budget
        self.graph = DecodingGraph(model)
        self.llama = full_attention(model).model
        self.llama.to(dtype)  # type: ignore[arg-type]
        self.out: dict[str, str] = {}

    def makers(self) -> dict[str, Callable[[], Drt | Full]]:
        """New contestants that have read nothing."""
        makers: dict[str, Callable[[], Drt | Full]] = {
            f"DRT {tier}": partial(self._drt, tier) for tier in TIERS
        }
        return {**makers, FULL: lambda: Full(FULL, self.llama, segment_size=SEGMENT_SIZE)}

    def _drt(self, tier: Tier) -> Drt:
        memory = new_memory(tier, model=self.model, dtype=self.dtype, folder=Path())
        return Drt(self.model, memory, tier)

    def check(self) -> dict[str, float]:
        """In float32, before any clock: reading and a step are one forward; the deviations."""
        deviations = {name: check(make()) for name, make in self.makers().items()}
        graphed = Graphed(self._drt("device"), self.graph)
        deviations[graphed.name] = max(check(graphed), self._check_steps(graphed))
        self.graph.detach()
        return deviations

    def _check_steps(self, graphed: Graphed) -> float:
        """After two chunks, step by step, the graph has come to where ordinary steps come."""
        count = NUM_CHECKED * self.model.config.chunk_size
        ids = random_bytes(count, seed=2).to(self.model.device)
        logits = []
        for branch in (graphed.ours.branch(), graphed.branch()):
            out = [branch(token) for token in ids.split(1, dim=1)]
            logits.append(out[-1])
        # As in `check`.
        torch.testing.assert_close(*logits, rtol=0, atol=1e-3)
        return float((logits[0] - logits[1]).abs().max())


def run(
    device: torch.device,
    *,
    lengths: Sequence[int] | None,
    quick: bool,
    budget: float,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Measure and print a table.

    Args:
        device: where.
        lengths: tokens of the prompts; None = those of the device.
        quick: the first two of them.
        budget: seconds that a prefill, and the decoding after it, may take.
        save: is given all samples so far, after each length.
    """
    defaults = CUDA_LENGTHS if device.type == "cuda" else CPU_LENGTHS
    chosen = sorted(lengths or (defaults[:2] if quick else defaults))
    lines: list[Line] = []
    # Outside of inference mode, in which a change of dtype would untie tied weights.
    model = make_model(device)
    precise = Field(model, dtype=torch.float32, budget=budget)
    with torch.inference_mode():
        deviations = precise.check()
    del precise
    devices.release()
    dtype = inference_dtype(device)
    contestants = Field(model.to(dtype), dtype=dtype, budget=budget)  # type: ignore[arg-type]
    parameters = {"DRT": num_parameters(model), FULL: num_parameters(contestants.llama)}
    with torch.inference_mode():
        warm_up(contestants, chosen[0], device)
        for length in chosen:
            lines += measure_length(contestants, length, lines, device)
            print(f"{short(length)} tokens done", flush=True)
            save(
                {
                    "parameters": parameters,
                    "dtype": str(dtype),
                    "deviations": deviations,
                    "lines": [asdict(line) for line in lines],
                }
            )
    report(lines, parameters, dtype, device)


def make_model(device: torch.device) -> DRTForCausalLM:
    """Random weights: the large model on a GPU, the demo's on a CPU."""
    if device.type != "cuda":
        return load_model("demo", None)
    torch.manual_seed(0)
    with device:
        return DRTForCausalLM(LARGE).eval()


def inference_dtype(device: torch.device) -> torch.dtype:
    """Of weights, activations and memory."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def warm_up(contestants: Field, length: int, device: torch.device) -> None:
    """Compile and choose what the clock must not see."""
    ids = random_bytes(length, seed=0).to(device)
    for make in contestants.makers().values():
        make().prefill(ids)


def measure_length(
    contestants: Field, length: int, lines: Sequence[Line], device: torch.device
) -> list[Line]:
    """One line a contestant: prefill one by one, then decoding in turn."""
    ids = random_bytes(length, seed=length).to(device)
    found: list[Line] = []
    readers: list[Reader] = []
    for name, make in contestants.makers().items():
        expected = expected_seconds(name, length, lines)
        if name not in contestants.out and expected > contestants.budget:
            contestants.out[name] = f"over {contestants.budget:.0f} s"
        line = Line(length, name, failure=contestants.out.get(name))
        found.append(line)
        if line.failure is None:
            reader = measure_prefill(make, ids, line, device, budget=contestants.budget / 4)
            if reader is None:
                contestants.out[name] = line.failure or ""
            else:
                readers.append(reader)
    found += decode(contestants, readers, found, length, device)
    devices.release()
    return found


def expected_seconds(name: str, length: int, lines: Sequence[Line]) -> float:
    """Of a prefill, from the length before: linear for ours, quadratic for full attention."""
    before = [line for line in lines if line.name == name and line.prefill]
    if not before:
        return 0.0
    growth = length / before[-1].length
    return median(before[-1].prefill) * (growth**2 if name == FULL else growth)


def measure_prefill(
    make: Callable[[], Drt | Full],
    ids: Tensor,
    line: Line,
    device: torch.device,
    *,
    budget: float,
) -> Drt | Full | None:
    """Fill in the prefill of a line, and return who stands at its end; None if it did not fit."""
    start = time.perf_counter()
    reader: Drt | Full | None = None
    for number in range(NUM_SAMPLES):
        if number and time.perf_counter() - start > budget:
            break
        # The one before goes first: two might not fit.
        reader = None
        devices.release()
        reader = make()
        try:
            taken, peak = _timed_prefill(reader, ids, device)
        except torch.OutOfMemoryError:
            line.failure = "out of memory"
            return None
        line.prefill.append(taken)
        line.peak = peak
    assert reader is not None
    line.kept = sum(reader.num_bytes().values())
    return reader


def _timed_prefill(reader: Reader, ids: Tensor, device: torch.device) -> tuple[float, int]:
    taken: list[float] = []

    def call() -> None:
        taken.append(devices.seconds(partial(reader.prefill, ids), device))

    peak = devices.peak_above(call, device)
    return taken[0], peak


def decode(
    contestants: Field,
    readers: list[Reader],
    lines: Sequence[Line],
    length: int,
    device: torch.device,
) -> list[Line]:
    """Fill in the decoding; lines of their own for those that decode with a graph."""
    step = random_bytes(1, seed=1).to(device)
    # One that has read may still have no room for a step.
    able = devices.runnable({x.name: partial(_one_step, x, step) for x in readers})
    contestants.out |= able.failures
    readers = [x for x in readers if x.name in able.variants]
    for line in lines:
        line.failure = line.failure or able.failures.get(line.name)
    closes = closing_tokens(length, contestants.model.config.chunk_size, num_chunks=NUM_CHUNKS)
    steps = Steps(closes, num_chunks=NUM_CHUNKS, device=device)
    graphed = [Graphed(x, contestants.graph) for x in readers if isinstance(x, Drt)]
    found = {**time_decoding(readers, steps, repeats=3, budget=contestants.budget)}
    for one in graphed:
        # One at a time: they share the graph.
        found |= time_decoding([one], steps, repeats=3, budget=contestants.budget)
        contestants.graph.detach()
    for line in lines:
        line.decoding = found.get(line.name)
    return [Line(length, one.name, decoding=found[one.name]) for one in graphed]


def _one_step(reader: Reader, ids: Tensor) -> None:
    reader.branch()(ids)


def report(
    lines: Sequence[Line],
    parameters: dict[str, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """The table of all lengths."""
    full = {line.length: line for line in lines if line.name == FULL}
    sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in parameters.items())
    print_table(
        f"Prefill and decoding, B 1, {dtype}, {sizes} parameters; medians; "
        f"{devices.clock(device)}. A decoded token: mean over whole chunks, its plain and its "
        f"landmark steps; {FULL}'s DynamicCache is copied at every token",
        [
            *("tokens", "who", "prefill ms", "tokens/s", f"/ {FULL}"),
            *("decode ms", "plain", "landmark", f"/ {FULL}", "peak MiB", "kept MiB"),
        ],
        [_cells(line, full[line.length]) for line in sorted(lines, key=lambda x: x.length)],
    )


def _cells(line: Line, full: Line) -> list[str]:
    if line.failure is not None and not line.prefill:
        return [short(line.length), line.name, line.failure, *[""] * 8]
    cells = [short(line.length), line.name, "", "", "", "", "", "", "", "", ""]
    if line.prefill:
        taken = median(line.prefill)
        cells[2:4] = [f"{1e3 * taken:,.0f}", f"{line.length / taken:,.0f}"]
        if full.prefill:
            cells[4] = f"{taken / median(full.prefill):.3f}"
    if line.decoding is not None:
        times = [median(x) for x in (line.decoding.mean, line.decoding.plain)]
        cells[5:7] = [f"{x:.2f}" for x in times]
        if line.name != FULL:
            cells[7] = f"{median(line.decoding.landmark):.2f}"
        if full.decoding is not None:
            cells[8] = f"{times[0] / median(full.decoding.mean):.3f}"
    elif line.failure is not None:
        cells[5] = line.failure
    if line.peak is not None and line.kept is not None:
        cells[9:11] = [f"{line.peak / 2**20:,.0f}", f"{line.kept / 2**20:,.0f}"]
    return cells
