"""`drt eval CHECKPOINT`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from drt.checkpoints import find_model
from drt.cli.lengths import length

NAME = "eval"
HELP = "Ask a trained model for needles at several context lengths."
EPILOG = "Example: drt eval runs/demo/drt --lengths 1024 65536 --task multi"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a run or of a saved model")
    parser.add_argument(
        "--lengths", type=length, nargs="+", help="context lengths in tokens: 1024 64K 16M"
    )
    parser.add_argument("--task", choices=("single", "multi", "all"), default="all")
    parser.add_argument("--questions", type=int, help="questions per length and task")
    parser.add_argument("--corpus", help="haystack: text file, folder, .jsonl or .jsonl.xz")
    parser.add_argument("--memory", choices=("host", "disk"), help="where chunks are kept")
    parser.add_argument(
        "--memory-dtype",
        choices=("computed", "float32", "bfloat16", "int8"),
        help="how keys and values are stored",
    )
    parser.add_argument("--seed", type=int, help="seed of the examples")
    parser.add_argument("--json", type=Path, help="also write the scores to this file")


def run(options: argparse.Namespace) -> None:
    """Evaluate and print the table."""
    import json

    from drt.data import load_corpus, load_tokenizer
    from drt.evaluation import comparison
    from drt.modeling import DRTForCausalLM
    from drt.precision import autocast

    folder = find_model(options.checkpoint)
    config = _run_config(folder)
    model = DRTForCausalLM.from_pretrained(folder)
    corpus = load_corpus(options.corpus or config.corpus, load_tokenizer(str(folder)))
    tasks = comparison.TASKS if options.task == "all" else (options.task,)
    evaluation = _evaluation(options, config.evaluation)
    with autocast(config.precision, model.device):
        scores = comparison.score_by_length(
            model, corpus, evaluation, title="evaluate", tasks=tasks
        )
    record = {"parameters": model.num_parameters(), **comparison.as_records(scores)}
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    print(comparison.format_table({folder.parent.name or folder.name: record}))


def _run_config(folder: Path) -> Any:
    """The configuration that the model was trained with."""
    from drt.run_config import CONFIG_FILE, load_config

    return load_config(folder / CONFIG_FILE)


def _evaluation(options: argparse.Namespace, evaluation: Any) -> Any:
    """The run's evaluation with what the command line changes."""
    changes: dict[str, Any] = {}
    if options.lengths:
        changes["lengths"] = options.lengths
    if options.questions is not None:
        changes |= {"num_questions": options.questions, "num_questions_longest": options.questions}
    if options.memory:
        changes["memory"] = options.memory
    if options.memory_dtype:
        changes["memory_dtype"] = options.memory_dtype
    if options.seed is not None:
        changes["seed"] = options.seed
    return replace(evaluation, **changes)
