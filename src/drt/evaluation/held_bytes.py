"""How many bytes a reading holds, whatever kind of cache its model keeps."""

from __future__ import annotations

from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedConfig

from drt.memory.base import InferenceMemory

# They are the model's, or code.
_OPAQUE = (nn.Module, PreTrainedConfig, type, ModuleType, FunctionType, MethodType, str, bytes)


def held_bytes(root: Any) -> dict[str, int]:
    """Bytes of all tensors and arrays that can be reached from an object, by where they are.

    Storage that several tensors share counts once, and in full, whatever part of it they show.
    Parameters of modules do not count. A chunk memory counts as it does itself.

    Args:
        root: a `Reading`, which holds the logits of the next token beside its cache; a cache; or
            any object.

    Returns:
        Bytes on the "device", in the "host"'s memory and on "disk", as
        `InferenceMemory.bytes_by_tier`: what is on a CPU is the host's.
    """
    total = {"device": 0, "host": 0, "disk": 0}
    waiting, seen, storages = [root], set(), set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen or isinstance(found, _OPAQUE):
            continue
        seen.add(id(found))
        if isinstance(found, InferenceMemory):
            for tier, size in found.bytes_by_tier().items():
                total[tier] += size
        elif isinstance(found, Tensor):
            _add_storage(found, storages, total)
        elif isinstance(found, np.ndarray):
            total["host"] += found.nbytes if found.base is None else 0
            waiting.append(found.base)
        else:
            waiting += _parts(found)
    return total


def _add_storage(tensor: Tensor, storages: set[Any], total: dict[str, int]) -> None:
    storage = tensor.untyped_storage()
    key = storage.data_ptr(), storage.device
    if key not in storages:
        storages.add(key)
        total["host" if storage.device.type == "cpu" else "device"] += storage.nbytes()


def _parts(found: Any) -> list[Any]:
    """What an object is made of."""
    if isinstance(found, dict):
        return [*found.keys(), *found.values()]
    if isinstance(found, list | tuple | set | frozenset):
        return list(found)
    names = [name for cls in type(found).__mro__ for name in getattr(cls, "__slots__", ())]
    slots = [getattr(found, name) for name in names if hasattr(found, name)]
    return [*getattr(found, "__dict__", {}).values(), *slots]
