"""How long does it take to find the best chunks of a long memory, exactly?

    python benchmarks/search.py [--quick] [--json PATH]

Top 8 of N landmarks of width L for n queries that may see all of them, as `DeviceMemory.search`
does it: float32, and a bfloat16 scan that ranks 32 candidates in float32, against one product with
torch.topk over all scores. Landmarks and queries are standard normal, in slabs of 4096. Recall:
the share of the float64 best that is found. One torch thread, CPU time of the process, variants
in turn. Then what a decoding step of a small memory costs beside the scan, and a disk's checksums.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import hardware_line, measure, parser, print_table, ratio, write_json
from drt.memory import DeviceMemory, DiskMemory
from drt.memory.search import OVERFETCH, Best, Bounds, rescored, search_tiles

TOPK = 8
SLAB = 4096
# One row of scores for each query: at n = 64 and N = 524288, 134 MB.
CASES = list(product((262144, 524288), (32, 96, 768), (1, 64)))
QUICK = [(65536, 32, 1), (65536, 96, 64)]


class Case(NamedTuple):
    slabs: list[Tensor]
    rounded: list[Tensor]
    queries: Tensor
    bounds: Bounds


def make_case(count: int, width: int, num_queries: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    landmarks = torch.randn(count, width, generator=generator)
    queries = torch.randn(num_queries, width, generator=generator) / width**0.5
    firsts = torch.zeros(num_queries, dtype=torch.int64)
    bounds = Bounds(firsts, torch.full_like(firsts, count))
    slabs = [slab.clone() for slab in landmarks.split(SLAB)]
    return Case(slabs, [slab.bfloat16() for slab in slabs], queries, bounds)


def float32(case: Case) -> Best:
    return search_tiles(case.slabs, case.queries, case.bounds, topk=TOPK)


def bfloat16(case: Case) -> Best:
    queries = case.queries.bfloat16()
    found = search_tiles(case.rounded, queries, case.bounds, topk=OVERFETCH * TOPK)
    return rescored(case.slabs, case.queries, found, topk=TOPK)


def whole(case: Case, landmarks: Tensor) -> Best:
    return Best(*(case.queries @ landmarks.t()).topk(TOPK))


def recall(found: Best, case: Case) -> float:
    """Share of the float64 product's best that were found."""
    queries = case.queries.double()
    scores = torch.cat([queries @ slab.double().t() for slab in case.slabs], 1)
    wanted = scores.topk(TOPK).indices
    return float((found.indices[:, :, None] == wanted[:, None]).any(1).float().mean())


def run_case(count: int, width: int, num_queries: int, repeats: int) -> list[Any]:
    case = make_case(count, width, num_queries)
    landmarks = torch.cat(case.slabs)
    variants: dict[str, Callable[[], object]] = {
        "whole": partial(whole, case, landmarks),
        "float32": partial(float32, case),
        "bfloat16": partial(bfloat16, case),
    }
    samples = measure(variants, repeats=repeats)
    times = [f"{1e3 * median(samples[name]):.2f}" for name in variants]
    ratios = [str(ratio(samples, name, to="whole")) for name in ("float32", "bfloat16")]
    found = [f"{recall(call(case), case):.4f}" for call in (float32, bfloat16)]
    return [count, width, num_queries, *times, *ratios, *found]


def step(memory: DeviceMemory | DiskMemory, chunk: list[Tensor], query: Tensor) -> None:
    """What a decoder asks of its memory at the end of a chunk."""
    memory.append(*chunk)
    limits = torch.full((1, 1), len(memory))
    memory.gather(memory.search(query, limits, topk=TOPK).indices)


def run_steps(repeats: int) -> list[list[Any]]:
    """Medians of a step of a memory of 64 chunks onwards, in microseconds."""
    shape, width = (32, 2, 24), 96
    chunk = [torch.randn(1, 1, width), torch.randn(1, 1, *shape), torch.randn(1, 1, *shape)]
    start = [x.expand(1, 64, *x.shape[2:]) for x in chunk]
    query = torch.randn(1, 1, width)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        disk = DiskMemory.create(folder, fingerprint={})
        unchecked = DiskMemory.create(f"{folder}/unchecked", fingerprint={}, verify_reads=False)
        memories = {"RAM": DeviceMemory(), "disk": disk, "disk, verify_reads=False": unchecked}
        for memory in memories.values():
            memory.append(*start)
        variants = {name: partial(step, m, chunk, query) for name, m in memories.items()}
        samples = measure(variants, repeats=repeats)
        rows = [[name, f"{1e6 * median(samples[name]):.0f}"] for name in memories]
        disk.close()
        unchecked.close()
    return rows


def run_reads(repeats: int) -> list[list[Any]]:
    """Medians of gathering 8 chunks of 196,608 bytes from files in the page cache, in ms."""
    shape, count = (64, 12, 64), 256
    keys = torch.randn(1, count, *shape).bfloat16()
    indices = torch.arange(0, count, count // TOPK)[None, None]
    with tempfile.TemporaryDirectory() as folder:
        memory = DeviceMemory()
        memory.append(torch.randn(1, count, 96), keys, keys)
        memory.save(folder, fingerprint={})
        checked, unchecked = (DiskMemory.open(folder, verify_reads=x) for x in (True, False))
        memories = {"RAM": memory, "disk": checked, "disk, verify_reads=False": unchecked}
        variants = {name: partial(m.gather, indices) for name, m in memories.items()}
        samples = measure(variants, repeats=repeats)
    return [[name, f"{1e3 * median(samples[name]):.2f}"] for name in memories]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    print(hardware_line())
    repeats = 5 if arguments.quick else 9
    header = ["N", "L", "n", "whole ms", "float32 ms", "bfloat16 ms"]
    header += ["float32 / whole", "bfloat16 / whole", "recall float32", "recall bfloat16"]
    cases = QUICK if arguments.quick else CASES
    searches = [run_case(*case, repeats) for case in cases]
    print_table(f"Top {TOPK} of N landmarks, medians of {repeats}", header, searches)
    steps, reads = run_steps(50 * repeats), run_reads(5 * repeats)
    print_table("A step of a small memory", ["memory", "us"], steps)
    print_table("Gathering 8 chunks of 196,608 bytes", ["memory", "ms"], reads)
    write_json(arguments.json, {"search": searches, "step": steps, "read": reads})


if __name__ == "__main__":
    main()
