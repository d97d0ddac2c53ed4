"""Next-token losses over a large vocabulary, from the logits of a few tokens at a time.

Logits of 65,536 tokens over 50,257 entries are 13 GB in float32. Here a chunk of tokens at a time
goes through the head, forward and again in backward, which keeps nothing but its inputs. The
gradient of the head is summed over the chunks in float32 and rounded once: sums in bfloat16, as
those of autograd over checkpointed chunks are, lose what the later chunks add. PyTorch's
`linear_cross_entropy` came after the oldest version that DRT supports, and returns losses of
bfloat16 inputs in bfloat16.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from drt.precision import sum_dtype, uses_autocast, without_autocast

IGNORED = -100
"""The label of a token that nobody is asked to predict."""


def next_tokens(labels: Tensor, content: Tensor | None = None) -> Tensor:
    """What each column predicts: the label of the next column of content.

    Args:
        labels: (B, T) int64.
        content: (B, T) bool, False at padding; None = no padding.

    Returns:
        (B, T) int64, `IGNORED` at padding and at the last content of each row.
    """
    moved = F.pad(labels, (0, 1), value=IGNORED)
    if content is None:
        return moved[:, 1:]
    length = labels.shape[1]
    columns = torch.arange(length, device=labels.device).where(content, length)
    # The first column of content from each column on, then after each.
    following = F.pad(columns.flip(1).cummin(1).values.flip(1), (0, 1), value=length)[:, 1:]
    return moved.gather(1, following).masked_fill(~content, IGNORED)


def losses_of_labels(losses: Tensor, content: Tensor | None = None) -> Tensor:
    """The losses of all columns but the first, each where its label stands.

    Args:
        losses: (B, T) losses where they were computed, of the `next_tokens` of each column.
        content: (B, T) bool, as in `next_tokens`.

    Returns:
        (B, T - 1) losses of predicting columns 1 .. T - 1 from the content before each, 0 at
        padding and where there is none before.
    """
    if content is None:
        return losses[:, :-1]
    columns = torch.arange(losses.shape[1], device=losses.device).where(content, -1)
    # The last column of content before each.
    before = columns.cummax(1).values[:, :-1]
    wanted = content[:, 1:] & (before >= 0)
    return losses.gather(1, before.clamp_min(0)).masked_fill(~wanted, 0.0)


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, in nats.

    Args:
        logits: (..., V) of any floating dtype; the softmax is float32, or float64 for float64.
        targets: (...) int64, below V or `IGNORED`.

    Returns:
        (...) losses in the dtype of the softmax, 0 where the target is ignored.
    """
    scores = logits.flatten(0, -2).log_softmax(-1, dtype=sum_dtype(logits))
    losses = F.nll_loss(scores, targets.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(targets.shape)


def mean_loss(
    losses: Tensor, targets: Tensor, *, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """The mean over the tokens to predict, or over `num_items_in_batch` if that is given.

    Args:
        losses: (B, T) losses, 0 where the target is ignored.
        targets: (B, T) int64.
        num_items_in_batch: tokens to predict in all micro-batches of a step.
    """
    if num_items_in_batch is None:
        return losses.sum() / (targets != IGNORED).sum()
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(losses.device)
    return losses.sum() / num_items_in_batch


def losses_of_head(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, chunk_size: int | None
) -> tuple[Tensor, Tensor | None]:
    """The loss of each token, and the logits unless they are never held all at once.

    Args:
        head: maps hidden states to logits; with a chunk size, a `LanguageModelHead`.
        hidden: (B, T, E).
        targets: (B, T) int64.
        chunk_size: tokens whose logits are held at once; None = all.

    Returns:
        (B, T) losses as `losses_of_logits`, and (B, T, V) logits or None.

    Raises:
        ValueError: targets of another shape, or a chunk size with another head, whose forward
            knows no targets.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels must be (B, T) = {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}"
        )
    if chunk_size is None:
        logits = head(hidden)
        return losses_of_logits(logits, targets), logits
    if not isinstance(head, LanguageModelHead):
        raise ValueError(
            f"loss_chunk_size = {chunk_size} needs the model's own head, lm_head is a "
            f"{type(head).__name__}; set config.loss_chunk_size = None"
        )
    return head(hidden, targets, chunk_size), None


class Predictions(NamedTuple):
    """What a head makes of hidden states; each is None where it was not asked for or not held."""

    logits: Tensor | None
    """(B, T, V)."""
    token_losses: Tensor | None
    """(B, T - 1) of predicting labels 1 .. T - 1, in nats, 0 at `IGNORED` and at padding."""
    loss: Tensor | None
    """Their mean, as `mean_loss`."""


def predict(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor | None,
    *,
    chunk_size: int | None,
    content: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
) -> Predictions:
    """Predict the token after each one: the end of every forward.

    Args:
        head: as in `losses_of_head`.
        hidden: (B, T, E), after the final norm.
        labels: (B, T) int64, the tokens themselves or `IGNORED`; None = logits only.
        chunk_size: as in `losses_of_head`, with labels; then there are no logits.
        content: (B, T) bool, False at padding, which predicts nothing and is not predicted; None =
            no padding.
        num_items_in_batch: as in `mean_loss`.

    Raises:
        ValueError: as `losses_of_head`.
    """
    if labels is None:
        return Predictions(head(hidden), None, None)
    if content is not None:
        content = content.to(hidden.device, non_blocking=True)
    targets = next_tokens(labels.to(hidden.device), content)
    losses, logits = losses_of_head(head, hidden, targets, chunk_size=chunk_size)
    loss = mean_loss(losses, targets, num_items_in_batch=num_items_in_batch)
    return Predictions(logits, losses_of_labels(losses, content), loss)


class LanguageModelHead(nn.Linear):
    """The output head: hidden states to logits or, a chunk of tokens at a time, to losses.

    The losses are computed inside the module, because what shards parameters (FSDP) gathers them
    around the forward of their module.
    """

    def __init__(self, hidden_size: int, vocab_size: int, **kwargs: Any) -> None:
        super().__init__(hidden_size, vocab_size, bias=False, **kwargs)

    @classmethod
    def of(cls, linear: nn.Linear) -> LanguageModelHead:
        """A head that shares the weight of a linear layer."""
        head = cls(linear.in_features, linear.out_features, device="meta")
        head.weight = linear.weight
        return head

    def forward(
        self, input: Tensor, targets: Tensor | None = None, chunk_size: int | None = None
    ) -> Tensor:
        """Logits, or losses where there are targets.

        Args:
            input: (..., E) hidden states.
            targets: (...) int64 token to predict from each, or `IGNORED`; None = logits.
            chunk_size: tokens whose logits are held at once; given with `targets`.

        Returns:
            (..., V) logits, or (...) losses as `losses_of_logits`.
        """
        if targets is None:
            return super().forward(input)
        assert chunk_size is not None
        dtype = _product_dtype(self.weight)
        return _ChunkedLosses.apply(input, self.weight, targets, chunk_size, dtype)


class LanguageModelHeadMixin:
    """Of models whose `lm_head` is a `LanguageModelHead`, with a resized vocabulary too."""

    lm_head: nn.Module

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another head; a plain linear layer, as resizing makes it, lends its weight."""
        if type(new_embeddings) is nn.Linear and new_embeddings.bias is None:
            new_embeddings = LanguageModelHead.of(new_embeddings)
        self.lm_head = new_embeddings


class _ChunkedLosses(torch.autograd.Function):
    """(..., E) hidden states, (V, E) head and (...) targets to (...) losses."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, size: int, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.size, ctx.dtype = size, dtype
        losses = hidden.new_empty(targets.shape, dtype=sum_dtype(weight))
        parts = (hidden.flatten(0, -2), targets.flatten(), losses.view(-1))
        head = weight.to(dtype)
        with without_autocast(hidden.device.type):
            for part, wanted, out in zip(*(x.split(size) for x in parts), strict=True):
                out.copy_(losses_of_logits(part.to(dtype) @ head.t(), wanted))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        # A mean over no token has an infinite gradient, and ignored tokens have none.
        grad = grad.masked_fill(targets == IGNORED, 0.0)
        head = weight.to(ctx.dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=sum_dtype(weight))
        parts = (hidden.flatten(0, -2), targets.flatten(), grad.flatten())
        outs = grad_hidden.view(-1, hidden.shape[-1])
        with without_autocast(hidden.device.type):
            for part, wanted, scale, out in zip(
                *(x.split(ctx.size) for x in (*parts, outs)), strict=True
            ):
                part = part.to(ctx.dtype)
                slopes = _slopes(part @ head.t(), wanted, scale).to(ctx.dtype)
                out.copy_(slopes @ head)
                if grad_weight is not None:
                    grad_weight += slopes.t() @ part
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None


def _slopes(logits: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the logits: (softmax - one-hot) * grad."""
    slopes = logits.softmax(-1, dtype=sum_dtype(logits))
    index = targets.clamp(min=0)[:, None]
    slopes.scatter_(1, index, slopes.gather(1, index) - 1)
    return slopes.mul_(grad[:, None])


def _product_dtype(weight: Tensor) -> torch.dtype:
    """What a linear layer of this weight multiplies in."""
    kind = weight.device.type
    if weight.dtype != torch.float64 and uses_autocast(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype
