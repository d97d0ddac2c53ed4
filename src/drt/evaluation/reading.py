"""A text that a causal language model has read so far, and what the model makes of it.

One interface for every model that is compared: a DRT reads into its state and chunk memory, any
other causal language model of transformers into its `past_key_values`.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from drt.configuration import DecoderConfig
from drt.loss import losses_of_logits
from drt.memory import ChunkMemory
from drt.modeling import DRTForCausalLM
from drt.retrieval import Retrieval

NewMemory = Callable[[], AbstractContextManager[ChunkMemory]]
"""Makes the memory that a DRT reads a text into, and lets it go at the end."""

# 256 MiB of float32: losses need the logits of a segment, reading does not.
_LOGITS_AT_ONCE = 1 << 26

# Any of these in a configuration says that positions are rotations, of which there is no last one.
_ROTARY_FIELDS = ("rope_parameters", "rope_theta", "rotary_dim")


class Answer(NamedTuple):
    """What a model said after a question."""

    token_ids: list[int]
    """Greedily generated tokens."""
    retrievals: tuple[Retrieval, ...]
    """Per group, what the landmark at the question's end retrieved, (1, 1, K) tensors; empty for a
    model that retrieves nothing."""


class PositionLimit(NamedTuple):
    """How many tokens a model was made for."""

    num_tokens: int
    """`max_position_embeddings` of its configuration."""
    is_hard: bool
    """Whether there is no position beyond; rotary positions go on, untrained."""


def position_limit(config: PreTrainedConfig) -> PositionLimit | None:
    """The tokens that a model was made for; None where it has no limit, as models of DRT have none.

    Args:
        config: of a causal language model of transformers.
    """
    # There, max_position_embeddings is the length of a training row, for information.
    if isinstance(config, DecoderConfig):
        return None
    of_text = config.get_text_config()
    limit = getattr(of_text, "max_position_embeddings", None)
    if limit is None:
        return None
    is_rotary = any(getattr(of_text, name, None) is not None for name in _ROTARY_FIELDS)
    return PositionLimit(limit, not is_rotary)


def check_length(config: PreTrainedConfig, num_tokens: int, *, beyond_limit: bool = False) -> None:
    """Refuse a text that is longer than a model's positions.

    Args:
        config: of a causal language model of transformers.
        num_tokens: tokens that it is to read, answers among them.
        beyond_limit: whether rotary positions may go on.

    Raises:
        ValueError: it is too long.
    """
    limit = position_limit(config)
    if limit is None or num_tokens <= limit.num_tokens or (beyond_limit and not limit.is_hard):
        return
    way_out = "" if limit.is_hard else "; beyond_limit lets its rotary positions go on, untrained"
    raise ValueError(
        f"a {config.model_type} has {limit.num_tokens} positions (max_position_embeddings), "
        f"{num_tokens} tokens need more{way_out}"
    )


class Reading(ABC):
    """A text read so far by a model, one row; what follows is predicted from all of it.

    Made by `start_reading`. Pieces of any length make the same reading, to rounding. As a context
    manager it lets its memory go at the end; forks must not be used after that.
    """

    def __init__(self, model: Any, *, segment_size: int) -> None:
        self.model, self.segment_size = model, segment_size
        self.num_tokens = 0
        """Tokens read."""
        self._held = ExitStack()
        # (V,) logits of the token that comes next; None before the first.
        self._next: Tensor | None = None

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """Read on.

        Args:
            ids: (T,) int64, any T; read in segments, in bounded memory where the model bounds it.

        Raises:
            ValueError: ids of another shape or dtype, or more tokens than the model has positions.
        """
        ids = self._checked(ids)
        if len(ids):
            self._next = self._read(ids)
            self.num_tokens += len(ids)

    @torch.no_grad()
    def losses(self, ids: Tensor) -> Tensor:
        """Read on, and return what each token cost.

        Args:
            ids: (T,) int64, any T.

        Returns:
            (T,) float32 nats of each token given everything before it. The first token of an empty
            reading has no prediction: its loss is 0, and the caller counts it out.

        Raises:
            ValueError: as `read`.
        """
        ids = self._checked(ids)
        losses = torch.zeros(len(ids), device=ids.device)
        done = 0
        for part in ids.split(self._scored_at_once) if len(ids) else ():
            here = losses[done : done + len(part)]
            logits = self._forward(part)
            if self._next is not None:
                here[:1] = losses_of_logits(self._next[None], part[:1])
            if len(part) > 1:
                here[1:] = losses_of_logits(logits[:-1], part[1:])
            # Not a view, which would hold the logits of the whole segment.
            self._next = logits[-1].clone()
            self.num_tokens += len(part)
            done += len(part)
        return losses

    @torch.no_grad()
    def answer(self, question_ids: Tensor, num_tokens: int) -> Answer:
        """Ask, and generate greedily; the reading stays as it was.

        Args:
            question_ids: (T,) int64, at least one.
            num_tokens: tokens to generate, at least one; nothing ends the answer sooner.

        Raises:
            ValueError: no question, no token to generate, or as `read`.
        """
        question_ids = self._checked(question_ids, extra=num_tokens - 1)
        if not len(question_ids) or num_tokens < 1:
            raise ValueError(
                f"an answer needs a question and a length of 1 or more, got {len(question_ids)} "
                f"tokens of question and num_tokens = {num_tokens}"
            )
        branch = self.fork()
        logits, retrievals = branch._ask(question_ids)
        said = [int(logits.argmax())]
        while len(said) < num_tokens:
            logits = branch._forward(question_ids.new_tensor(said[-1:]), keep=1)[-1]
            said.append(int(logits.argmax()))
        return Answer(said, retrievals)

    def fork(self) -> Self:
        """A reading that goes on from here on its own; this one stays as it was."""
        other = copy.copy(self)
        # What is held stays the first reading's to let go.
        other._held = ExitStack()
        other._part()
        return other

    def close(self) -> None:
        """Let the memory go that was made for this reading."""
        self._held.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _part(self) -> None:
        """Replace what is shared with the reading that this is a fork of."""

    @abstractmethod
    def _read(self, ids: Tensor) -> Tensor:
        """Read (T,) tokens, T at least 1; (V,) logits of the next."""

    @abstractmethod
    def _forward(self, ids: Tensor, *, keep: int = 0) -> Tensor:
        """Read (T,) tokens in one forward; (T, V) logits, or the last `keep`."""

    def _ask(self, ids: Tensor) -> tuple[Tensor, tuple[Retrieval, ...]]:
        """Read a question; (V,) logits of the answer's first token, and what was retrieved."""
        return self._read(ids), ()

    @property
    def _scored_at_once(self) -> int:
        size = self.model.config.get_text_config().vocab_size
        return max(min(self.segment_size, _LOGITS_AT_ONCE // size), 1)

    def _checked(self, ids: Tensor, *, extra: int = 0) -> Tensor:
        """(T,) ids on the model's device, if the model has positions for them and `extra` more."""
        if ids.dim() != 1 or ids.dtype != torch.int64:
            raise ValueError(f"ids must be (T,) int64, got {tuple(ids.shape)} {ids.dtype}")
        return ids.to(self.model.device)


class DRTReading(Reading):
    """A reading by a `DRTForCausalLM`: the memory of chunks grows, nothing else does."""

    def __init__(
        self, model: DRTForCausalLM, *, segment_size: int, new_memory: NewMemory | None
    ) -> None:
        super().__init__(model, segment_size=segment_size)
        memory = None if new_memory is None else self._held.enter_context(new_memory())
        self.state = model.new_state(memory=memory)
        """What the model remembers."""

    def _part(self) -> None:
        self.state = self.state.fork()

    def _read(self, ids: Tensor) -> Tensor:
        hidden = self.model.read(ids[None], self.state, segment_size=self.segment_size)
        return self.model.lm_head(hidden)[0, -1]

    def _forward(self, ids: Tensor, *, keep: int = 0) -> Tensor:
        out = self.model(ids[None], past_key_values=self.state, logits_to_keep=keep)
        return out.logits[0]

    def _ask(self, ids: Tensor) -> tuple[Tensor, tuple[Retrieval, ...]]:
        # What does not fit into one segment is text; the question ends in the last one.
        if len(ids) > self.segment_size:
            self._read(ids[: -self.segment_size])
        ids = ids[-self.segment_size :][None]
        ends = torch.zeros_like(ids, dtype=torch.bool)
        ends[:, -1] = True
        out = self.model(
            ids,
            past_key_values=self.state,
            chunk_ends=ends,
            logits_to_keep=1,
            output_retrievals=True,
        )
        retrievals = tuple(Retrieval(*(part[:, -1:] for part in r)) for r in out.retrievals or ())
        return out.logits[0, -1], retrievals


class CachedReading(Reading):
    """A reading by any other causal language model: what it holds is up to its cache."""

    def __init__(self, model: Any, *, segment_size: int, beyond_limit: bool) -> None:
        super().__init__(model, segment_size=segment_size)
        known = inspect.signature(model.forward).parameters
        if "past_key_values" not in known:
            raise ValueError(
                f"{type(model).__name__} does not take past_key_values, so it cannot read a text "
                "in pieces"
            )
        self.beyond_limit = beyond_limit
        self._keeps_logits = "logits_to_keep" in known
        self._cache: Any = None

    def _part(self) -> None:
        self._cache = copy.deepcopy(self._cache)

    def _read(self, ids: Tensor) -> Tensor:
        *before, last = ids.split(self.segment_size)
        for part in before:
            self._forward(part, keep=1)
        # Not a view: some models compute all logits.
        return self._forward(last, keep=1)[-1].clone()

    def _forward(self, ids: Tensor, *, keep: int = 0) -> Tensor:
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        out = self.model(ids[None], past_key_values=self._cache, use_cache=True, **options)
        if out.past_key_values is None:
            raise ValueError(f"{type(self.model).__name__} returned no past_key_values")
        self._cache = out.past_key_values
        return out.logits[0, -keep:]

    def _checked(self, ids: Tensor, *, extra: int = 0) -> Tensor:
        ids = super()._checked(ids)
        total = self.num_tokens + len(ids) + extra
        check_length(self.model.config, total, beyond_limit=self.beyond_limit)
        return ids


def start_reading(
    model: Any,
    *,
    segment_size: int = 4096,
    new_memory: NewMemory | None = None,
    beyond_limit: bool = False,
) -> Reading:
    """Begin to read a text.

    Args:
        model: a `DRTForCausalLM`, or any causal language model of transformers with a cache; in
            evaluation mode.
        segment_size: tokens of one forward; bounds the working memory.
        new_memory: makes the memory of a DRT, until `close`; None = on the model's device. Other
            models keep what they keep in their cache.
        beyond_limit: whether a model with rotary positions may read on beyond its
            `max_position_embeddings`.

    Raises:
        ValueError: a segment of no tokens, a model in training mode, or one that has no cache.
    """
    if segment_size < 1:
        raise ValueError(f"segment_size must be at least 1, got {segment_size}")
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: call model.eval() first")
    if isinstance(model, DRTForCausalLM):
        return DRTReading(model, segment_size=segment_size, new_memory=new_memory)
    return CachedReading(model, segment_size=segment_size, beyond_limit=beyond_limit)
