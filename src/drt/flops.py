"""How many operations a training step takes, counted from a model without its numbers."""

from __future__ import annotations

import copy
import logging

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from drt.baselines.text_encoders import HASHED_NGRAMS
from drt.ops.flops import CPU_ATTENTION

# What costs operations that the model does not need, or draws random numbers.
_LEFT_OUT = {"loss_chunk_size": None, "early_close_rate": 0.0, "retrieval_noise": 0.0}

# A fixed retriever that reads text is no part of the model, and gets its tokenizer from outside:
# one that reads token ids stands in.
_REPLACED = {"retriever_name": HASHED_NGRAMS}


def flops_of_row(model: PreTrainedModel, length: int) -> int:
    """Operations of the forward and backward of one row.

    A multiplication and an addition are two operations. Those of matrix products and attention
    count, attention without regard to masks and its backward as five products, as PyTorch counts
    them; what gradient checkpointing, a loss in chunks or a kernel's tiles compute beside them does
    not. Nothing is computed and no random number drawn: the row runs through a model of the same
    configuration whose tensors have shapes only.

    Args:
        model: any causal language model; only its class and configuration are read.
        length: content tokens of the row.

    Raises:
        RuntimeError: the model asks for the numbers of a tensor.
    """
    config = copy.deepcopy(model.config)
    for name, value in {**_LEFT_OUT, **_REPLACED}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.random.fork_rng(devices=[]):
        twin = type(model)(config).train()
        ids = torch.zeros(1, length, dtype=torch.int64)
    return _count(twin, ids)


def _count(model: torch.nn.Module, ids: torch.Tensor) -> int:
    trained = [each for each in model.parameters() if each.requires_grad]
    # Outside of the mode, plans that the host makes keep their numbers.
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with torch.random.fork_rng(devices=[]), counter:
        loss = model(input_ids=ids, labels=ids).loss
        torch.autograd.grad(loss, trained, allow_unused=True)
    return counter.get_total_flops()


def flops_if_known(model: PreTrainedModel, length: int) -> int | None:
    """`flops_of_row`; None, said once, for a model that needs numbers to run."""
    try:
        return flops_of_row(model, length)
    except RuntimeError as error:
        name = type(model).__name__
        logging.getLogger(__name__).warning(
            "operations of a %s cannot be counted, so none are shown: %s", name, error
        )
        return None
