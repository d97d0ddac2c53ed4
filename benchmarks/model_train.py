"""Part of `model.py`: what a training step costs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import devices
from common import print_table, ratio
from drt import DRTConfig, DRTForCausalLM
from drt.ops.gca import api
from drt.precision import autocast, uses_bfloat16
from drt.run_config import load_config
from drt.shipped import find_config
from length_models import num_parameters, random_bytes

BASELINE = "sliding window"
REFERENCE = "DRT x1, reference"
CHECKED_LENGTH = 512


class Setting(NamedTuple):
    """What is trained on what."""

    configuration: str
    """A run configuration whose model has one group, or two of one size."""
    vocab_size: int
    length: int
    """Tokens of a row."""
    batches: tuple[int, ...]
    """Rows of a batch: the first that fits."""
    repeats: int


CUDA = Setting("paper-128m", 50257, 16384, (8, 4, 2, 1), 10)
CUDA_QUICK = CUDA._replace(batches=(2, 1), repeats=4)
CPU = Setting("demo", 258, 2048, (2,), 5)
CPU_QUICK = Setting("demo", 258, 512, (1,), 3)


@dataclass
class Trained:
    """A model under training."""

    model: DRTForCausalLM
    optimizer: torch.optim.Optimizer
    backend: str | None = None
    """Of grouped cross-attention; None = the best."""

    def step(self, ids: Tensor, *, update: bool) -> None:
        """Forward and backward of the (B, T) ids, and an update of the weights if wanted."""
        try:
            with gca_backend(self.backend):
                with autocast("auto", ids.device):
                    loss = self.model(ids, labels=ids).loss
                loss.backward()
            if update:
                self.optimizer.step()
        finally:
            # After a step that did not fit, too: the next one needs the room.
            self.model.zero_grad(set_to_none=True)


@contextmanager
def gca_backend(name: str | None) -> Iterator[None]:
    """Inside, this is the default backend of the operator, which no setting of a model chooses."""
    default = api.default_backend
    if name is not None:
        api.default_backend = lambda query, key: name
    try:
        yield
    finally:
        api.default_backend = default


def configurations(setting: Setting) -> dict[str, DRTConfig]:
    """The models by name, from one decoder."""
    fields = {
        "vocab_size": setting.vocab_size,
        **load_config(find_config(setting.configuration)).model,
    }
    layers_above = sum(fields["retrieval_groups"])

    def config(**changes: Any) -> DRTConfig:
        return DRTConfig(**{**fields, **changes})

    return {
        BASELINE: config(retrieval_groups=[]),
        "sliding window + 2 layers": config(
            retrieval_groups=[], num_hidden_layers=fields["num_hidden_layers"] + 2
        ),
        "DRT x1": config(retrieval_groups=[layers_above]),
        "DRT x2": config(retrieval_groups=[layers_above // 2] * 2),
        REFERENCE: config(retrieval_groups=[layers_above]),
    }


def make_trained(
    config: DRTConfig, device: torch.device, *, backend: str | None, compiled: bool
) -> Trained:
    """A model with random weights in training mode, float32 as autocast wants them."""
    torch.manual_seed(0)
    with device:
        model = DRTForCausalLM(config).train()
    if compiled:
        compile_layers(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    return Trained(model, optimizer, backend)


def compile_layers(model: DRTForCausalLM) -> None:
    """Compile each decoder and encoder layer by itself, whole."""
    # Lower and upper layers of five models, with and without gradients, are kinds of one function.
    torch._dynamo.config.recompile_limit = 64
    encoder = model.model.chunk_encoder
    for layer in [*model.model.layers, *([] if encoder is None else encoder.layers)]:
        layer.compile(fullgraph=True)


@torch.no_grad()
def check_correctness(setting: Setting, device: torch.device) -> float:
    """The loss with the best backend is that with the reference; returns the difference."""
    torch.manual_seed(0)
    with device:
        model = DRTForCausalLM(configurations(setting)["DRT x1"]).eval()
    ids = random_bytes(CHECKED_LENGTH, seed=1).to(device)
    found = model(ids, labels=ids).loss
    with gca_backend("reference"):
        wanted = model(ids, labels=ids).loss
    # Float32 sums in another order, through all layers.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    return float((found - wanted).abs())


def run(device: torch.device, *, quick: bool, compiled: bool, budget: float) -> dict[str, Any]:
    """Measure and print the table; returns all samples in seconds."""
    setting = _setting(device, quick=quick)
    deviation = check_correctness(setting, device)
    models = {
        name: make_trained(
            config, device, backend="reference" if name == REFERENCE else None, compiled=compiled
        )
        for name, config in configurations(setting).items()
    }
    batch, peaks, failures = largest_batch(models, setting, device)
    ids = _ids(batch, setting, device)
    found: dict[str, Any] = {}
    for name, update in (("step", False), ("step + AdamW", True)):
        calls = _calls(models, ids, update=update)
        able = {key: call for key, call in calls.items() if key not in failures}
        found[name] = devices.sample(able, device, repeats=setting.repeats, budget=budget)
    parameters = {name: num_parameters(trained.model) for name, trained in models.items()}
    results = {
        "configuration": setting.configuration,
        "length": setting.length,
        "batch": batch,
        "compiled": compiled,
        "precision": "bfloat16 autocast" if uses_bfloat16("auto") else "float32",
        "loss_deviation": deviation,
        "parameters": parameters,
        "peak_bytes": peaks,
        "failures": failures,
        "seconds": found,
    }
    report(results, device)
    return results


def _setting(device: torch.device, *, quick: bool) -> Setting:
    if device.type == "cuda":
        return CUDA_QUICK if quick else CUDA
    return CPU_QUICK if quick else CPU


def _ids(batch: int, setting: Setting, device: torch.device) -> Tensor:
    return random_bytes(batch * setting.length, seed=0).view(batch, -1).to(device)


def _calls(
    models: dict[str, Trained], ids: Tensor, *, update: bool
) -> dict[str, Callable[[], object]]:
    return {name: partial(trained.step, ids, update=update) for name, trained in models.items()}


def largest_batch(
    models: dict[str, Trained], setting: Setting, device: torch.device
) -> tuple[int, dict[str, int], dict[str, str]]:
    """The first batch with which all but the reference fit; peak bytes, and what does not fit.

    The reference gathers copies: a batch that it fits in would be small for the others.
    """
    for batch in setting.batches:
        calls = _calls(models, _ids(batch, setting, device), update=True)
        # With the optimizer's state in place, peaks are those of the step alone.
        able = devices.runnable(calls)
        if not able.failures.keys() - {REFERENCE}:
            break
    if BASELINE in able.failures:
        raise RuntimeError(f"{batch} rows of {setting.length} tokens do not fit: {able.failures}")
    again = _calls(models, _ids(batch, setting, device), update=False)
    peaks = {name: devices.peak_above(again[name], device) for name in able.variants}
    return batch, peaks, able.failures


def report(results: dict[str, Any], device: torch.device) -> None:
    """Tokens a second and ratios to the sliding-window model."""
    tokens = results["batch"] * results["length"]
    rows = []
    for name, count in results["parameters"].items():
        row = [name, f"{count / 1e6:.2f}"]
        if name in results["failures"]:
            rows.append([*row, results["failures"][name], *[""] * 4])
            continue
        for samples in results["seconds"].values():
            row += [f"{tokens / median(samples[name]):,.0f}"]
            row += [str(ratio(samples, name, to=BASELINE))]
        rows.append([*row, f"{results['peak_bytes'][name] / 2**20:,.0f}"])
    compiled = ", layers compiled" if results["compiled"] else ""
    print_table(
        f"Training, {results['configuration']}, {results['batch']} rows of {results['length']} "
        f"tokens, {results['precision']}{compiled}; medians (range); {devices.clock(device)}",
        [
            *("model", "parameters, M", "step: tokens/s", f"time / {BASELINE}"),
            *("with AdamW: tokens/s", f"time / {BASELINE}", "peak MiB of a step"),
        ],
        rows,
    )
