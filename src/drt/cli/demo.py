"""`drt demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from drt.cli.lengths import length
from drt.shipped import find_config

NAME = "demo"
HELP = "Train a DRT and a sliding-window model, and ask both in contexts of up to a million tokens."
EPILOG = (
    "Training that was stopped goes on where it was when the same command is given again; the "
    "questions are asked from the first one on."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a key of both runs: seed=1"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of results")
    parser.add_argument("--config", default="demo", help="configuration of the DRT")
    parser.add_argument(
        "--baseline", default="demo-baseline", help="configuration of the sliding-window model"
    )
    parser.add_argument("--corpus", help="haystack: text file, folder, .jsonl or .jsonl.xz")
    parser.add_argument(
        "--max-length",
        type=length,
        help="ask for the single needle in longer contexts too, each four times the last: 16M",
    )
    parser.add_argument("--overwrite", action="store_true", help="train again from nothing")


def run(options: argparse.Namespace) -> None:
    """Run the main job, print the table and name the files."""
    from transformers.utils.logging import disable_progress_bar

    from drt.demo import BASELINE, DRT, run_demo
    from drt.evaluation.comparison import format_table
    from drt.training import load_config

    # Bars for saving and loading 2 MB would only hide those that matter.
    disable_progress_bar()
    overrides = list(options.overrides)
    if options.max_length:
        overrides.append(f"evaluation.lengths={_longer(options)}")
    if options.corpus:
        # Quoted: a name is no YAML.
        overrides.append(f"corpus={json.dumps(options.corpus, ensure_ascii=False)}")
    configs: dict[str, Any] = {
        DRT: load_config(find_config(options.config), overrides),
        BASELINE: load_config(find_config(options.baseline), overrides),
    }
    results = run_demo(configs, options.output, overwrite=options.overwrite)
    print(format_table(results["models"]))
    print(f"{results['seconds']['total']:,.0f} s, peak {results['peak_rss_bytes'] / 2**30:.2f} GiB")
    for name in ("results.json", "figure.png", "report.html"):
        print(options.output / name)


def _longer(options: argparse.Namespace) -> list[int]:
    """The configured lengths and those up to the longest that was asked for."""
    from drt.training import load_config

    lengths = sorted(load_config(find_config(options.config), options.overrides).evaluation.lengths)
    while lengths[-1] < options.max_length:
        lengths.append(min(4 * lengths[-1], options.max_length))
    return lengths
