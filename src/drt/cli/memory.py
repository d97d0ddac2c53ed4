"""`drt memory info|verify|repair|export DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "memory"
HELP = "Look at a memory on disk, check or repair it, or export it to safetensors."
EPILOG = "Example: drt memory export memories/books exported/books"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("info", "sizes, counts and what made it"),
        ("verify", "compare the checksums of all chunks and of the state, and count the log"),
        ("repair", "cut a memory back to the chunks before its first damaged one, for good"),
        ("export", "write landmarks, keys, values and lengths as safetensors"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("memory", type=Path, help="folder of the memory")
        if name == "export":
            action.add_argument("target", type=Path, help="folder to write to")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    import json

    from drt.memory import DiskMemory, export_safetensors, repair_memory

    if _has_no_chunk(options.memory):
        if options.action == "export":
            raise ValueError(f"{options.memory} has no chunk yet: there is nothing to export")
        if options.action == "info":
            print(json.dumps({"folder": str(options.memory), "chunks": 0}, indent=2))
        else:
            print(f"{options.memory}: a reading has begun, and no chunk is full yet")
        return
    if options.action == "repair":
        left = repair_memory(options.memory)
        print(f"{options.memory}: {left:,} chunks are intact and left")
        _verify_state(options.memory, left)
        return
    with DiskMemory.open(options.memory) as memory:
        if options.action == "info":
            print(json.dumps(memory.info(), indent=2, default=str))
        elif options.action == "verify":
            memory.verify()
            _verify_state(options.memory, len(memory))
            print(f"{options.memory}: all {len(memory):,} chunks are intact")
        else:
            export_safetensors(memory, options.target)
            print(f"{options.target}: {len(memory):,} chunks")


def _has_no_chunk(folder: Path) -> bool:
    """Whether a folder holds a sound state alone: the files of a memory come with a chunk."""
    from drt.saved_state import MANIFEST_FILE, STATE_FILE, saved_cursor

    if (folder / MANIFEST_FILE).exists() or not (folder / STATE_FILE).exists():
        return False
    return saved_cursor(folder)[0].chunks == 0


def _verify_state(folder: Path, num_chunks: int) -> None:
    """Whether the saved state and the log of passages, if there are such, go with the chunks."""
    from drt.ingestion import Notes
    from drt.passages import CHUNKS_FILE, PassageLog
    from drt.saved_state import STATE_FILE, saved_cursor

    if not (folder / STATE_FILE).exists():
        print(f"{folder}: there is no {STATE_FILE}, only the memory")
        return
    cursor, notes = saved_cursor(folder)
    if cursor.chunks > num_chunks:
        raise ValueError(f"{folder} holds {num_chunks} chunks, its state goes with {cursor.chunks}")
    if not (folder / CHUNKS_FILE).exists():
        return
    with PassageLog(folder) as log:
        log.check_holds(
            num_tokens=cursor.tokens,
            num_chunks=cursor.chunks,
            num_sources=Notes.of(notes).num_sources,
        )
