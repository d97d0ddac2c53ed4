"""`drt ask CHECKPOINT --memory DIR "question"`."""

from __future__ import annotations

import argparse
from pathlib import Path

from drt.checkpoints import load_drt
from drt.cli.text import read_text

NAME = "ask"
HELP = "Go on from a memory with a question, and show which passages were retrieved for it."
EPILOG = (
    'The question is taken as it stands: end it as the model expects, say with "The answer is ".'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a run or of a saved model")
    parser.add_argument("question", help="the text to go on from; - for standard input")
    parser.add_argument("--memory", type=Path, required=True, help="folder of the memory")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest answer [32]")
    parser.add_argument("--stop", help="end the answer before this text")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(options: argparse.Namespace) -> None:
    """Ask and print."""
    import json
    from dataclasses import asdict

    from drt.asking import ask

    question = read_text(options.question)
    checkpoint = load_drt(options.checkpoint)
    with checkpoint.autocast():
        reply = ask(
            checkpoint.model,
            checkpoint.tokenizer,
            options.memory,
            question,
            max_new_tokens=options.max_new_tokens,
            stop=options.stop,
        )
    if options.json:
        print(json.dumps(asdict(reply), ensure_ascii=False))
        return
    if not reply.is_complete:
        print(
            f"note: {options.memory} has not been read to its end: answer and passages are near "
            "the model's own, not exact; drt read goes on with it"
        )
    print(reply.answer)
    for passage in reply.passages:
        where = f"{passage.source or 'the question'} bytes {passage.start}-{passage.end}"
        print(f"\n{passage.weight:.3f}  group {passage.group}, chunk {passage.chunk}, {where}")
        print("    " + passage.text.replace("\n", "\n    "))
