"""What callers hand to the model: checked, and brought to the host where layouts are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from drt.chunking import Marks
from drt.state import DRTState

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_columns(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, *, hidden_size: int
) -> Tensor:
    """The (B, T) ids or (B, T, E) embeddings, of which one must be given, in this shape."""
    if inputs_embeds is None and input_ids is not None:
        is_integer = input_ids.dtype in (torch.int32, torch.int64)
        if input_ids.dim() != 2 or not input_ids.shape[0] or not is_integer:
            raise ValueError(
                "input_ids must be (B, T) int64, B at least 1, got shape "
                f"{tuple(input_ids.shape)} {input_ids.dtype}"
            )
        return input_ids
    if inputs_embeds is None or input_ids is not None:
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    if inputs_embeds.shape[2:] != (hidden_size,) or not inputs_embeds.shape[0]:
        raise ValueError(
            f"inputs_embeds must be (B, T, {hidden_size}), B at least 1, got shape "
            f"{tuple(inputs_embeds.shape)}"
        )
    return inputs_embeds


def check_ids(input_ids: Tensor, *, vocab_size: int) -> None:
    """Refuse ids beyond the vocabulary, where the host can look at them without waiting."""
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    least, most = (int(bound) for bound in input_ids.aminmax())
    if least < 0 or most >= vocab_size:
        raise ValueError(f"input_ids must be 0 to {vocab_size - 1}, got {least} to {most}")


def check_state(state: Any, columns: Tensor) -> None:
    """Refuse what is no `DRTState`, one of other rows than (B, T) columns, or an unfinished one."""
    if state is None:
        return
    if not isinstance(state, DRTState):
        raise ValueError(
            f"past_key_values must be a DRTState, got {type(state).__name__}; "
            "make one with model.new_state(batch_size)"
        )
    if state.batch_size != columns.shape[0]:
        raise ValueError(f"the state has {state.batch_size} rows, the input has {columns.shape[0]}")
    state.check_finished()


def check_labels(
    labels: Tensor | None,
    columns: Tensor,
    logits_to_keep: int | Tensor,
    *,
    output_token_losses: bool,
) -> None:
    """Refuse losses without labels, and labels of another shape or without their logits."""
    if labels is None and output_token_losses:
        raise ValueError("output_token_losses=True needs labels")
    if labels is not None and (isinstance(logits_to_keep, Tensor) or logits_to_keep):
        raise ValueError(f"labels need all logits, got logits_to_keep = {logits_to_keep}")
    if labels is not None and labels.shape != columns.shape[:2]:
        raise ValueError(
            f"labels must be (B, T) = {tuple(columns.shape[:2])}, got {tuple(labels.shape)}"
        )


def check_mask(attention_mask: Tensor | None, columns: Tensor, state: DRTState | None) -> None:
    """Refuse a mask of other columns than those given, or than those and all that were read."""
    if attention_mask is None or attention_mask.dim() != 2:
        # `make_marks` refuses other ranks.
        return
    width, length = attention_mask.shape[1], columns.shape[1]
    before = 0 if state is None else state.num_columns
    if width not in (length, before + length):
        whole = f", and {before + length} with what the state has read" if before else ""
        raise ValueError(f"attention_mask has {width} columns, the input has {length}{whole}")


def make_marks(
    columns: Tensor,
    attention_mask: Tensor | None,
    chunk_ends: Tensor | None,
    document_ids: Tensor | None,
) -> Marks:
    """What is said of the (B, T) columns, on the host, where layouts are made."""
    batch, length = columns.shape[:2]
    content = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch:
            raise ValueError(
                f"attention_mask must be (B, T) = ({batch}, {length}) or (B, past + T), "
                f"got shape {tuple(attention_mask.shape)}"
            )
        if attention_mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} columns, the input has {length}"
            )
        content = _host(attention_mask[:, attention_mask.shape[1] - length :] != 0)
        content = None if content.all() else content
    for name, mark in (("chunk_ends", chunk_ends), ("document_ids", document_ids)):
        if mark is not None and mark.shape != (batch, length):
            raise ValueError(
                f"{name} must be (B, T) = ({batch}, {length}), got {tuple(mark.shape)}"
            )
    if chunk_ends is not None and chunk_ends.dtype != torch.bool:
        raise ValueError(f"chunk_ends must be bool, got {chunk_ends.dtype}")
    if document_ids is not None and document_ids.dtype not in _INTEGERS:
        raise ValueError(f"document_ids must be integers, got {document_ids.dtype}")
    return Marks(
        content,
        None if chunk_ends is None else _host(chunk_ends),
        None if document_ids is None else _host(document_ids),
    )


def _host(mark: Tensor) -> np.ndarray:
    return mark.detach().cpu().numpy()


def move_right(input_ids: Tensor, marks: Marks) -> tuple[Tensor, Marks]:
    """Move each row's padding before its content."""
    assert marks.content is not None
    order = np.argsort(marks.content, axis=1, kind="stable")
    index = torch.from_numpy(order).to(input_ids.device)
    moved = (mark if mark is None else np.take_along_axis(mark, order, axis=1) for mark in marks)
    return input_ids.gather(1, index), Marks(*moved)


def loss_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the loss reads among `kwargs`; anything else that asks for something is refused."""
    wanted = dict(kwargs)
    found = {key: wanted.pop(key) for key in ("num_items_in_batch",) if key in wanted}
    # transformers passes these by itself; both are how this model answers anyway.
    if wanted.pop("return_dict", True) is False:
        raise ValueError("return_dict=False is not supported")
    unknown = [key for key, value in wanted.items() if value is not None and value is not False]
    if unknown:
        raise ValueError(f"forward does not know the arguments {unknown}")
    return found
