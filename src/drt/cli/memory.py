"""`drt memory info|verify|export DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "memory"
HELP = "Look at a memory on disk, check every byte of it, or export it to safetensors."
EPILOG = "Example: drt memory export memories/books exported/books"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("info", "sizes, counts and what made it"),
        ("verify", "read everything and compare checksums"),
        ("export", "write landmarks, keys, values and lengths as safetensors"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("memory", type=Path, help="folder of the memory")
        if name == "export":
            action.add_argument("target", type=Path, help="folder to write to")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    import json

    from drt.memory import DiskMemory, export_safetensors

    with DiskMemory.open(options.memory) as memory:
        if options.action == "info":
            print(json.dumps(memory.info(), indent=2, default=str))
        elif options.action == "verify":
            memory.verify()
            print(f"{options.memory}: all {len(memory):,} chunks are intact")
        else:
            export_safetensors(memory, options.target)
            print(f"{options.target}: {len(memory):,} chunks")
