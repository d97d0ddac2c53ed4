"""Compiling the layers of a model for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from drt.layers import DRTDecoderLayer, DRTEncoderLayer

RECOMPILE_LIMIT = 64
"""Graphs that PyTorch may make of the layers of all models of a process; its own limit is 8.

All layers count as one function to it. With `dynamic=True` a model makes one graph for each kind of
layer, and again for each kind of input: a grid or not, documents or not, with gradient or without.
"""


def compile_layers(model: nn.Module, *, dynamic: bool | None = True, **options: Any) -> None:
    """Compile each decoder and encoder layer of a model in place, for training.

    A layer is one graph (`fullgraph=True`), made in the first step that runs it, and layers of one
    kind share it. Only what training runs is compiled: in evaluation mode, and where a state is
    extended, the layers run as they are. Names of weights, checkpoints and hooks stay the same; a
    copy of the model, or one that is loaded, is not compiled.

    Raises `torch._dynamo.config.recompile_limit`, for the whole process, to `RECOMPILE_LIMIT` if it
    is lower: past the limit, PyTorch raises `FailOnRecompileLimitHit`.

    Args:
        model: anything that holds `DRTDecoderLayer`s.
        dynamic: True for graphs that serve rows of any number and length, and chunks closed
            anywhere; False for graphs of one shape, a new one for each, where all batches are
            alike; None for a graph of the first shape and then one of any.
        **options: of `torch.compile`, say `mode` or `backend`.

    Raises:
        ValueError: the model has no such layers, or `fullgraph` is among the options.
    """
    if "fullgraph" in options:
        raise ValueError(
            f"fullgraph is {options['fullgraph']}; layers are always compiled as one graph"
        )
    layers = [x for x in model.modules() if isinstance(x, (DRTDecoderLayer, DRTEncoderLayer))]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no DRT layers to compile")
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=dynamic, **options)
