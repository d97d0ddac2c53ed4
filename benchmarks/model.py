"""What does the model cost: a training step, reading a long prompt, and decoding after it?

    python benchmarks/model.py [--device cpu|cuda] [--quick] [--part train|length] [--compile]
                               [--json PATH]

Training: forward and backward, with and without AdamW, of the 128M model on rows of 16K tokens,
with one and two retrieval groups, relative to the sliding-window model of the same decoder; beside
them that model with two more layers, and ours with the operator's reference in place of its kernel.
The paper (arXiv 2410.01651) counts 1.22 and 1.24 with its kernel, 1.45 without it, and 1.15 for two
layers more.

Length: prefill and decoding of a 351M model from 8K to 1M tokens, its memory on the device and in
host memory, with the decoding graph and with ordinary steps, beside transformers' Llama (full
attention) of as many parameters with its DynamicCache. Weights and texts are random.

On a CPU the models and lengths are tiny, so that the run takes a minute or two: it shows that
everything works, and ratios of small models.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import devices
import model_length
import model_train
from common import hardware_line, parser, write_json
from drt.cli.lengths import length

PARTS = ("train", "length")


def options() -> argparse.ArgumentParser:
    arguments = parser(__doc__)
    devices.add_option(arguments)
    add = arguments.add_argument
    add("--part", choices=PARTS, help="default both")
    add("--compile", action="store_true", help="compile each layer for the training step")
    add("--lengths", type=length, nargs="+", help="tokens of the prompts, such as 8K 1M")
    add("--budget-seconds", type=float, default=120.0, help="of one measurement; default 120")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options().parse_args(argv)
    device = devices.choose(arguments.device)
    print(hardware_line(), flush=True)
    results: dict[str, Any] = {"device": device.type}

    def save(part: str, found: dict[str, Any]) -> None:
        results[part] = found
        write_json(arguments.json, results)

    quick, budget = arguments.quick, arguments.budget_seconds
    if arguments.part in (None, "train"):
        compiled = arguments.compile
        save("train", model_train.run(device, quick=quick, compiled=compiled, budget=budget))
        devices.release()
    if arguments.part in (None, "length"):
        model_length.run(
            device,
            lengths=arguments.lengths,
            quick=quick,
            budget=budget,
            save=partial(save, "length"),
        )


if __name__ == "__main__":
    main()
