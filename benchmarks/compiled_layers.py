"""What does compiling the layers save of a training step on CPU, and what does it cost?

    python benchmarks/compiled_layers.py [--config PATH] [--quick] [--json PATH]

A step is forward, backward and optimizer of a run configuration, on its own batches of each stage:
rows, chunks closed early and precision as in training. Two models of the same weights, their layers
as they are and compiled by `compile_layers`, take the same batches in turn; one torch thread, CPU
time of the process. Compiling is counted apart: CPU time of this process and of the C++ compiler,
nothing cached, until all kinds of layers have their graphs.
"""

import os
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from common import hardware_line, measure, parser, print_table, ratio, write_json
from drt.architectures import make_config, make_model
from drt.data import load_corpus, load_tokenizer
from drt.data.tokenization import BYTES
from drt.precision import autocast
from drt.training import RunConfig, compile_layers, load_config
from drt.training.batches import NeedleSteps
from drt.training.curriculum import Curriculum
from drt.training.optimizer import MuonWithAdamW, split_parameters

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
# Steps in which sizes that were equal by chance are met again as different ones.
FIRST_STEPS = 3


class Training:
    """A model that takes one batch after the other."""

    def __init__(self, config: RunConfig, model: PreTrainedModel) -> None:
        self.config, self.model = config, model
        self.batches: Iterator[dict[str, Any]] = iter(())
        matrices, others = split_parameters(model)
        training = config.training
        self.optimizer = MuonWithAdamW(
            matrices,
            others,
            # Too low to move the two models apart.
            lr=1e-6,
            weight_decay=training.weight_decay,
            betas=(0.9, training.adam_beta2),
        )

    def step(self) -> None:
        batch = next(self.batches)
        given = {name: batch[name] for name in ("input_ids", "chunk_ends", "labels")}
        generator = torch.Generator().manual_seed(int(batch["step"]))
        with autocast(self.config.precision, self.model.device):
            out = self.model(**given, output_token_losses=True, generator=generator)
        (out.token_losses * batch["token_weights"][:, 1:]).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def batches_of(config: RunConfig, stage: int) -> list[dict[str, Any]]:
    corpus = load_corpus(config.corpus, load_tokenizer(config.tokenizer or BYTES))
    made = NeedleSteps(
        config, corpus, Curriculum([config.stages[stage]]), chunk_size=config.model["chunk_size"]
    )
    return [{**made.rows(step), "step": torch.tensor(step)} for step in range(20)]


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_stages(config: RunConfig, repeats: int) -> list[list[Any]]:
    tokenizer = load_tokenizer(config.tokenizer or BYTES)
    model_config = make_config(config.model, tokenizer)
    plain, compiled = (
        Training(config, make_model(model_config, seed=config.seed).train()) for _ in range(2)
    )
    compile_layers(compiled.model)
    rows = []
    for number, stage in enumerate(config.stages):
        batches = batches_of(config, number)
        for each in (plain, compiled):
            each.batches = (batches[n % len(batches)] for n in count())
        wall, start = time.monotonic(), cpu_seconds()
        for _ in range(FIRST_STEPS):
            compiled.step()
        compiling = f"{cpu_seconds() - start:.1f} ({time.monotonic() - wall:.1f})"
        for _ in range(FIRST_STEPS):
            plain.step()
        samples = measure({"plain": plain.step, "compiled": compiled.step}, repeats=repeats)
        times = [f"{1e3 * median(samples[name]):.0f}" for name in samples]
        graphs = counters["stats"]["unique_graphs"]
        shape = f"{config.training.rows_per_step(stage.length)} x {stage.length}"
        rows.append([shape, *times, str(ratio(samples, "compiled", to="plain")), compiling, graphs])
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--config", type=Path, default=CONFIG, help="run configuration")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    # In this process, where the time that the compiler takes can be counted.
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    print(hardware_line())
    rows = run_stages(load_config(arguments.config), 10 if arguments.quick else 20)
    header = ["rows x tokens", "plain ms", "compiled ms", "compiled / plain"]
    header += [f"first {FIRST_STEPS} steps, CPU s (wall s)", "graphs so far"]
    print_table("A training step, medians", header, rows)
    write_json(arguments.json, {"steps": rows})


if __name__ == "__main__":
    main()
