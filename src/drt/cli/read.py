"""`drt read CHECKPOINT FILE... --memory DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drt.checkpoints import Checkpoint, load_drt

NAME = "read"
HELP = "Read texts of any size into a memory on disk; a reading that was stopped goes on."
EPILOG = "Example: drt read runs/demo/drt books/ notes.txt --memory memories/books"
DTYPES = ("bfloat16", "float32", "int8", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a run or of a saved model")
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help='text file, folder, .jsonl with a "text" field, each also .xz; - for standard input',
    )
    parser.add_argument("--memory", type=Path, required=True, help="folder of the memory")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="how keys and values of a new memory are stored [bfloat16]"
    )
    parser.add_argument(
        "--segment-size", type=int, default=16384, help="tokens of one forward [16384]"
    )
    parser.add_argument(
        "--commit-seconds", type=float, default=10.0, help="how much a kill can undo [10]"
    )


def run(options: argparse.Namespace) -> None:
    """Read, show how far it is, and say what is there now."""
    from drt.data.reading import left_out
    from drt.data.streaming import list_inputs

    inputs = list_inputs(options.files)
    if note := left_out(Path(file) for file in options.files):
        print(note)
    checkpoint = load_drt(options.checkpoint)
    ingestion = _open(checkpoint, options)
    try:
        _read(ingestion, inputs, checkpoint)
        memory = ingestion.state.memory
        print(
            f"{options.memory}: {ingestion.state.num_tokens[0]:,} tokens in {len(memory):,} chunks"
        )
    finally:
        ingestion.close()


def _open(checkpoint: Checkpoint, options: argparse.Namespace) -> Any:
    import torch

    from drt.ingestion import Ingestion
    from drt.memory.manifest import Manifest
    from drt.saved_state import MANIFEST_FILE, STATE_FILE

    if options.dtype and (options.memory / MANIFEST_FILE).exists():
        stored = Manifest.read(options.memory).dtype
        if stored != options.dtype:
            raise ValueError(f"{options.memory} is stored in torch.{stored}, not {options.dtype}")
    # A memory that was begun keeps what it was begun with.
    chosen = options.dtype or (None if (options.memory / STATE_FILE).exists() else "bfloat16")
    return Ingestion(
        checkpoint.model,
        checkpoint.tokenizer,
        options.memory,
        dtype=None if chosen is None else getattr(torch, chosen),
        segment_size=options.segment_size,
        commit_seconds=options.commit_seconds,
    )


def _read(ingestion: Any, inputs: list[Any], checkpoint: Checkpoint) -> None:
    from tqdm import tqdm

    left = ingestion.remaining(inputs)
    names = {item.name for item in left}
    for item in inputs:
        if item.name not in names:
            print(f"{item.name} was read before")
    if not left:
        return
    if ingestion.unread is not None:
        print(f"going on in {ingestion.unread.source}")
    sizes = [item.size for item in left]
    total = None if None in sizes else sum(sizes)
    with tqdm(total=total, unit="B", unit_scale=True, desc="read", mininterval=1.0) as bar:

        def show(progress: Any) -> None:
            bar.n = progress.bytes
            rate = progress.tokens / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix(tokens=f"{progress.tokens:,}", per_second=f"{rate:,.0f}", refresh=False)
            bar.update(0)

        with checkpoint.autocast():
            ingestion.read(inputs, on_progress=show)
