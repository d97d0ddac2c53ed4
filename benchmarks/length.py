"""What does length cost?

    python benchmarks/length.py [--max-length 16M] [--models demo 128m] [--output FOLDER]

Prefill, decoding, retrieval, resident memory and bytes kept as a text grows, for each memory tier,
beside transformers' Mistral (sliding window) and Llama (full attention) of the same sizes with
their own caches. The text is random bytes, the weights are random or a checkpoint's. Each tier has
a process of its own, one torch thread, and reads the text once. At each milestone a fork decodes
four chunks token by token, in turn with Mistral, and with Llama in one process more. Ours reads in
segments of 16384 tokens. The others' masks are dense, so they read in the shorter segments that are
best for them: Llama in 1024, Mistral in two windows.
On a machine without a GPU the device tier and the host tier are the same memory.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common import hardware_line, parser, run_worker, write_json
from drt.cli.lengths import length
from length_models import CONFIGURATIONS, TIERS
from length_report import draw, report
from length_worker import DTYPES, Job, run

FIRST_LENGTH = 1 << 14
QUICK_LENGTH = 1 << 16


def milestones(longest: int) -> list[int]:
    """16K, 64K, 256K, ... and the longest itself."""
    lengths = [FIRST_LENGTH]
    while lengths[-1] * 4 < longest:
        lengths.append(lengths[-1] * 4)
    return sorted({*(x for x in lengths if x <= longest), longest})


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__, has_workers=True)
    add = arguments.add_argument
    add("--max-length", type=length, default=1 << 20, help="such as 16M; default 1M")
    add("--lengths", type=length, nargs="+", help="milestones, in place of 16K, 64K, ...")
    add("--models", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    add("--tiers", nargs="*", choices=TIERS, default=list(TIERS))
    add("--no-llama", action="store_true", help="leave out the process with full attention")
    add("--checkpoint", help="folder of a trained model, in place of the demo's random weights")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of what memories store")
    add("--bfloat16", action="store_true", help="multiply matrices in bfloat16")
    add("--budget-seconds", type=float, default=120.0, help="of one row; default 120")
    add("--repeats", type=int, default=5, help="of the decoding")
    add("--folder", help="where memories on disk are written; default the system's")
    add("--output", type=Path, default=Path("runs/bench"), help="default runs/bench")
    return arguments


def jobs(arguments: argparse.Namespace, model: str) -> list[Job]:
    """The processes of a model: one a tier, and one with Llama."""
    longest = min(arguments.max_length, QUICK_LENGTH) if arguments.quick else arguments.max_length
    lengths = sorted(arguments.lengths or milestones(longest))
    tiers = [(tier, False) for tier in arguments.tiers]
    if not arguments.no_llama:
        tiers.append(("device", True))
    return [
        Job(
            model=model,
            tier=tier,
            full_attention=full,
            lengths=lengths,
            folder=arguments.folder or tempfile.gettempdir(),
            checkpoint=arguments.checkpoint if model == "demo" else None,
            dtype=arguments.dtype,
            bfloat16=arguments.bfloat16,
            budget=arguments.budget_seconds,
            repeats=2 if arguments.quick else arguments.repeats,
        )
        for tier, full in tiers
    ]


def main() -> None:
    arguments = options().parse_args()
    torch.set_num_threads(1)
    if arguments.worker is not None:
        print(json.dumps(run(Job(**json.loads(arguments.worker)))))
        return
    print(hardware_line(), flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Any]] = {}
    for model in arguments.models:
        for job in jobs(arguments, model):
            results.setdefault(model, []).append(run_worker(asdict(job), environment={}))
            for path in (arguments.output / "length.json", arguments.json):
                write_json(path, {"models": results})
    text = "\n\n".join(f"## {name}\n\n{report(found)}" for name, found in results.items())
    print(f"\n{text}", flush=True)
    (arguments.output / "length.md").write_text(f"{hardware_line()}\n\n{text}\n")
    draw(results, arguments.output / "length.png")


if __name__ == "__main__":
    main()
