"""`drt train CONFIG`."""

from __future__ import annotations

import argparse
import os

from drt.shipped import find_config

NAME = "train"
HELP = "Train a model from a YAML configuration."
EPILOG = "Example: drt train configs/demo.yaml training.num_steps=500 output_dir=runs/short"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key: training.num_steps=500"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    again.add_argument("--overwrite", action="store_true", help="remove an earlier run first")


def run(options: argparse.Namespace) -> None:
    """Train and say where the model is."""
    from transformers.utils.logging import disable_progress_bar

    from drt.training import load_config, train

    # Bars for saving would only hide the one that matters.
    disable_progress_bar()
    config = load_config(find_config(options.config), options.overrides)
    final = train(config, resume=options.resume, overwrite=options.overwrite)
    # torchrun starts one of these a process, and tells each its number.
    if os.environ.get("RANK", "0") == "0":
        print(f"model: {final}\nlosses: {config.output_dir}/metrics.jsonl")
