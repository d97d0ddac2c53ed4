"""`drt generate CHECKPOINT "prompt"`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drt.checkpoints import load_drt
from drt.cli.text import read_text

NAME = "generate"
HELP = "Go on from a prompt of any length."
EPILOG = "Example: drt generate runs/demo/drt - --max-new-tokens 100 < book.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("checkpoint", type=Path, help="folder of a run or of a saved model")
    parser.add_argument("prompt", help="the text to go on from; - for standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens to generate [64]")
    parser.add_argument("--num-return-sequences", type=int, default=1, help="how many texts [1]")
    parser.add_argument("--num-beams", type=int, default=1, help="beams of beam search [1: none]")
    parser.add_argument(
        "--temperature", type=float, help="sample at this temperature, not greedily"
    )
    parser.add_argument("--top-p", type=float, help="sample from this share of the probability")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling [0]")


def run(options: argparse.Namespace) -> None:
    """Generate; a single text is printed while it comes."""
    import torch
    from transformers import TextStreamer

    from drt.data.tokenization import encode

    for name in ("max_new_tokens", "num_beams", "num_return_sequences"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if options.temperature is not None and not options.temperature > 0:
        raise ValueError(f"temperature must be above 0, got {options.temperature}")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {options.top_p}")
    prompt = read_text(options.prompt)
    checkpoint = load_drt(options.checkpoint)
    ids = torch.from_numpy(encode(checkpoint.tokenizer, prompt))[None]
    if not ids.shape[1]:
        raise ValueError("the prompt is empty")
    torch.manual_seed(options.seed)
    single = options.num_return_sequences == options.num_beams == 1
    shown: Any = {"skip_prompt": True, "skip_special_tokens": True}
    streamer = TextStreamer(checkpoint.tokenizer, **shown) if single else None
    with checkpoint.autocast():
        made = checkpoint.model.generate(
            ids.to(checkpoint.model.device),
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.max_new_tokens,
            num_beams=options.num_beams,
            num_return_sequences=options.num_return_sequences,
            streamer=streamer,
            **_sampling(options),
        )
    if not single:
        for row in made[:, ids.shape[1] :]:
            print(checkpoint.tokenizer.decode(row, skip_special_tokens=True))
            print("---")


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """What generate is told about sampling."""
    chosen = {"temperature": options.temperature, "top_p": options.top_p}
    given = {name: value for name, value in chosen.items() if value is not None}
    return {"do_sample": bool(given), **given}
