"""What `generate` of transformers must do otherwise for a model that reads into a `DRTState`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.utils import GenerationMixin

from drt.decoding_graph import DecodingGraph
from drt.state import DRTState


class DRTGeneration(GenerationMixin):
    """`generate` with a `DRTState`: greedy, sampling, beams, several returns, unequal prompts."""

    @torch.no_grad()
    def generate(
        self, *args: Any, decoding_graph: DecodingGraph | bool = False, **kwargs: Any
    ) -> Any:
        """As `generate` of transformers, with these differences.

        * `past_key_values` may be a `DRTState` that has read something. The prompt is then what
          comes after that, and nothing of it is given again. Afterwards the state holds prompt and
          answer, to be continued; with beams or several returns it is left as it was.
        * At the prompt's end the open chunk is closed (`DRTConfig.close_prompt_chunk`).
        * Prompts of unequal length may be padded on either side, told by `attention_mask`.
        * With `decoding_graph=True`, steps that close no chunk run in fixed buffers, on a GPU as a
          replayed CUDA graph. A `DecodingGraph` of as many rows as are generated, given instead,
          keeps what it captured for later calls. Results are the same. Not with beams, which move
          the whole state at every step.

        Raises:
            ValueError: the prompt begins with what the state has read, a prompt is empty, the mask
                is narrower than the prompts, another kind of cache or `use_cache=False` is asked
                for, `chunk_ends`, `document_ids` or `labels` are given, `prefill_chunk_size` is
                below 1, or a decoding graph that cannot be had or does not fit.
        """
        given = kwargs.get("past_key_values")
        if given is not None:
            _check_given(given, args, kwargs)
        rows = _Run(decoding_graph)
        previous = _RUN.set(rows)
        try:
            # Any: pyright cannot know what this class is mixed into.
            parent: Any = super()
            out = parent.generate(*args, **kwargs)
        finally:
            _RUN.reset(previous)
            rows.detach_graph()
        if given is not None and rows.in_place:
            last = (out if isinstance(out, Tensor) else out.sequences)[:, -1:]
            # The loop ends without reading the last token.
            model: Any = self
            model(last, attention_mask=rows.mask(last), past_key_values=given, logits_to_keep=1)
        return out

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        """The criteria, and a note of which rows they have stopped."""
        parent: Any = super()
        return _NotingCriteria(parent._get_stopping_criteria(*args, **kwargs))

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Give `generate` a `DRTState` where transformers would make a cache of its own."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not "
                "supported: a DRT keeps a DRTState"
            )
        if not generation_config.use_cache:
            raise ValueError("use_cache=False is not supported: a DRT generates with a DRTState")
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_state(batch_size)  # type: ignore[attr-defined]

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        is_first_iteration: bool = True,
    ) -> Any:
        """Read the prompts, close their last chunks, and only then repeat the rows.

        Beams and several returns thus cost one reading, and share its memory.
        """
        beams, returns = generation_config.num_beams, generation_config.num_return_sequences
        if beams > 1 and _RUN.get().graph:
            raise ValueError(
                f"num_beams={beams} cannot have a decoding_graph: beams move the whole state at "
                "every step"
            )
        copies = max(beams, returns)
        for name in ("chunk_ends", "document_ids", "labels"):
            if model_kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} cannot be given to generate: read the text into a state with the "
                    "model itself, and generate from that"
                )
        prompt = _Prompt.of(input_ids, model_kwargs, copies)
        state: DRTState = model_kwargs["past_key_values"]
        if copies > 1:
            state = state.fork()
        out = self._read_prompt(prompt, state, generation_config.prefill_chunk_size)
        if copies > 1:
            state.batch_repeat_interleave(copies)
            out.logits = out.logits.repeat_interleave(copies, dim=0)
        # It has been read; kept, it would grow by a copy a token.
        model_kwargs["attention_mask"] = None
        model_kwargs.pop("inputs_embeds", None)
        _RUN.get().attach_graph(self, state)
        _RUN.get().in_place = copies == 1
        _RUN.get().are_beams = beams > 1
        return out

    def _read_prompt(self, prompt: _Prompt, state: DRTState, segment_size: int | None) -> Any:
        """All but the last token without logits, the last one with them."""
        if segment_size is not None and segment_size < 1:
            raise ValueError(f"prefill_chunk_size must be at least 1, got {segment_size}")
        model: Any = self
        ids, embeddings, mask = prompt
        ends = None
        if model.config.close_prompt_chunk and model.config.retrieval_groups:
            given: Any = embeddings if ids is None else ids
            ends = torch.zeros(given.shape[:2], dtype=torch.bool)
            ends[:, -1] = True
        if embeddings is not None:
            size, out = segment_size or embeddings.shape[1], None
            for begin in range(0, embeddings.shape[1], size):
                part = slice(begin, begin + size)
                out = model(
                    inputs_embeds=embeddings[:, part],
                    attention_mask=None if mask is None else mask[:, part],
                    past_key_values=state,
                    chunk_ends=None if ends is None else ends[:, part],
                    logits_to_keep=1,
                )
            return out
        assert ids is not None
        before = None if mask is None else mask[:, :-1]
        size = {} if segment_size is None else {"segment_size": segment_size}
        model.read(ids[:, :-1], state, attention_mask=before, **size)
        last = None if ends is None else ends[:, -1:]
        return model(ids[:, -1:], past_key_values=state, chunk_ends=last, logits_to_keep=1)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: DRTState | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The last token of each row; none for rows that have come to their end."""
        model: Any = self
        last = input_ids[:, -1:].to(model.device)
        # transformers hands on what its stopping criteria wanted.
        for name in ("tokenizer", "assistant_tokenizer"):
            kwargs.pop(name, None)
        return {
            **kwargs,
            "input_ids": last,
            "past_key_values": past_key_values,
            "attention_mask": _RUN.get().mask(last),
        }


class _Run:
    """A call of `generate`: what takes its plain steps, and which rows of the batch have ended.

    `generate` fills rows that have ended with padding until all have.
    """

    def __init__(self, graph: DecodingGraph | bool) -> None:
        if not isinstance(graph, (DecodingGraph, bool)):
            raise ValueError(
                f"decoding_graph must be a DecodingGraph, True or False, got {graph!r}"
            )
        self.graph = graph
        """What takes the plain steps; True = one is to be made, False = the ordinary forward."""
        self._is_attached = False
        self.in_place = False
        """Whether the state that was given is the one that is extended."""
        self.are_beams = False
        """Whether rows are beams, which go on until the end."""
        self._ended: Tensor | None = None
        self._ended_before: Tensor | None = None

    def attach_graph(self, model: Any, state: DRTState) -> None:
        """Have the decoding graph that was asked for take the steps of this state."""
        if self.graph is True:
            self.graph = DecodingGraph(model, state.batch_size)
        if self.graph:
            if self.graph.model is not model:
                raise ValueError("the decoding_graph was made for another model")
            self.graph.attach(state)
            self._is_attached = True

    def detach_graph(self) -> None:
        """Leave the state to the ordinary forward."""
        if self._is_attached and isinstance(self.graph, DecodingGraph):
            self.graph.detach()

    def note(self, stopped: Tensor) -> None:
        """(B,) bool: the rows that the token just sampled has stopped."""
        self._ended_before = self._ended
        self._ended = stopped if self._ended is None else self._ended | stopped

    def mask(self, last: Tensor) -> Tensor | None:
        """(B, 1) last tokens -> (B, 1) bool, False where the token is padding; None = nowhere."""
        # A row alone ends the generation when it ends.
        if self.are_beams or self._ended_before is None or last.shape[0] == 1:
            return None
        return ~self._ended_before[:, None]


_RUN: ContextVar[_Run] = ContextVar("run")


class _NotingCriteria(StoppingCriteriaList):
    """Stopping criteria that tell the running `generate` which rows they stop."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        stopped = super().__call__(input_ids, scores, **kwargs)
        _RUN.get().note(stopped)
        return stopped


def _check_given(given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse caches of others, and a prompt that would be read twice."""
    if not isinstance(given, DRTState):
        raise ValueError(f"past_key_values must be a DRTState, got {type(given).__name__}")
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    mask = kwargs.get("attention_mask")
    # A mask of more columns says that these ids are not all there is.
    if ids is not None and (mask is None or mask.shape[1] <= ids.shape[1]):
        given.check_new(ids)


class _Prompt(NamedTuple):
    """What is to be read, one row a prompt, content at the right."""

    ids: Tensor | None
    """(B, T), or None where embeddings were given."""
    embeddings: Tensor | None
    """(B, T, E), or None."""
    mask: Tensor | None
    """(B, T), or None without padding."""

    @classmethod
    def of(cls, input_ids: Tensor, model_kwargs: dict[str, Any], copies: int) -> _Prompt:
        """Undo the repetition of rows, and check the prompts."""
        embeddings = model_kwargs.get("inputs_embeds")
        mask = model_kwargs.get("attention_mask")
        given = input_ids if embeddings is None else embeddings
        given, length = given[::copies], given.shape[1]
        if mask is None:
            _checked(None, length)
            return cls(given, None, None) if embeddings is None else cls(None, given, None)
        mask = mask[::copies]
        if mask.shape[0] != given.shape[0] or mask.shape[1] < length:
            raise ValueError(
                f"attention_mask has {mask.shape[0]} rows of {mask.shape[1]} columns, the prompt "
                f"has {given.shape[0]} rows of {length}"
            )
        mask = _checked(mask[:, mask.shape[1] - length :], length)
        assert mask is not None
        # Prompts padded at the right end where the others do.
        order = (mask != 0).int().sort(dim=1, stable=True).indices
        mask = mask.gather(1, order)
        if embeddings is None:
            return cls(given.gather(1, order), None, mask)
        return cls(None, given.gather(1, order[..., None].expand_as(given)), mask)


def _checked(mask: Tensor | None, length: int) -> Tensor | None:
    if length == 0:
        raise ValueError("the prompt is empty: there is no token to go on from")
    if mask is not None and not bool((mask != 0).any(1).all()):
        row = int((mask != 0).any(1).int().argmin())
        raise ValueError(f"prompt {row} has no token: its attention_mask is all 0")
    return mask
