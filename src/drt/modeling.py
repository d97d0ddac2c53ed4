"""The model, top to bottom. Start here.

Training, prefill in any segments and decoding are this one forward with a different state; see
docs/method.md for the equations and for each deviation from arXiv 2410.01651.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from drt.arguments import (
    check_columns,
    check_ids,
    check_labels,
    check_mask,
    check_state,
    loss_kwargs,
    make_marks,
)
from drt.block_retrieval import chunks_of_blocks
from drt.cache import check_trains_without
from drt.chunking import ChunkRules, Cursor, Marks, SegmentLayout, plan_segment
from drt.configuration import DRTConfig
from drt.generation import DRTGeneration
from drt.layers import (
    ChunkEncoder,
    DRTDecoderLayer,
    DRTRMSNorm,
    EncodedChunks,
    LandmarkProjection,
    Rotary,
    landmark_projection,
    rotary_factors,
)
from drt.loss import LanguageModelHead, LanguageModelHeadMixin, predict
from drt.memory import ChunkMemory, TrainingMemory
from drt.reading_ahead import DRTReading
from drt.retrieval import Retrieval
from drt.saved_state import load_state, model_fingerprint, save_state
from drt.state import DRTState


@dataclass
class DRTModelOutput:
    """What `DRTModel` returns."""

    hidden: Tensor
    """(B, P, E) last-layer outputs at content and landmark positions, before the final norm."""
    layout: SegmentLayout
    """Which of the P positions are content, and where each token's prediction is read."""
    retrievals: tuple[Retrieval, ...]
    """Per group, what the landmarks of this segment retrieved."""


@dataclass
class DRTCausalLMOutput(CausalLMOutputWithPast):
    """What `DRTForCausalLM` returns: `loss`, `logits`, `past_key_values` and what was asked for."""

    retrievals: tuple[Retrieval, ...] | None = None
    """Per group a `Retrieval` of the chunks closed in this call; only with `output_retrievals`."""
    token_losses: Tensor | None = None
    """(B, T - 1) of predicting labels 1 .. T - 1, each from the content before it, 0 at -100 and at
    padding; only with `output_token_losses`."""


class DRTPreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    config: DRTConfig
    config_class = DRTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DRTDecoderLayer", "DRTEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A state cannot be rolled back, so assisted decoding is refused.
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DRTModel) and module.landmark is not None:
            init.normal_(module.landmark, mean=0.0, std=self.config.initializer_range)
            module.align_projections()
        if isinstance(module, LandmarkProjection):
            init.orthogonal_(module.weight)


class DRTModel(DRTPreTrainedModel):
    """Lower layers, chunk encoder, and retrieval groups of upper layers."""

    _layer_class = DRTDecoderLayer

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        lower = config.num_lower_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self._layer_class(config, upper=number >= lower)
            for number in range(config.num_hidden_layers)
        )
        self.norm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        groups = config.retrieval_groups
        self.landmark = nn.Parameter(torch.empty(config.hidden_size)) if groups else None
        self.chunk_encoder = ChunkEncoder(config) if groups else None
        self.query_norms = nn.ModuleList(
            DRTRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in groups
        )
        self.query_projs = nn.ModuleList(landmark_projection(config) for _ in groups)
        # Attributes of a config are slow to read, and these are read at every step.
        self.lower_layers = range(lower)
        self.layers_of_groups = _layers_of_groups(config)
        self.retrieval_topk = config.retrieval_topk
        self.uses_rope = config.position_embedding == "rope"
        self.rules = ChunkRules(
            chunk_size=config.chunk_size if groups else None,
            landmark_starts_block=config.retrieval_onset == "landmark",
            excluded_window=config.sliding_window if config.exclude_window_chunks else 0,
        )
        self.gradient_checkpointing = False
        self.post_init()

    def align_projections(self) -> None:
        """Make queries and landmarks begin as one projection.

        Scores are then those of the unprojected model, up to the random projection: what is alike
        scores high from the start. Two projections of their own would have to find that first.
        """
        if self.config.landmark_size is None or self.chunk_encoder is None:
            return
        start = self.chunk_encoder.landmark_proj
        assert isinstance(start, LandmarkProjection)
        for projection in self.query_projs:
            assert isinstance(projection, LandmarkProjection)
            init.copy_(projection.weight, start.weight)

    def forward(
        self,
        embeddings: Tensor,
        state: DRTState | None = None,
        *,
        input_ids: Tensor | None = None,
        marks: Marks | None = None,
        generator: torch.Generator | None = None,
        memory_only: bool = False,
    ) -> DRTModelOutput:
        """Read one segment.

        Args:
            embeddings: (B, T, E) content embeddings.
            state: what was read before; extended in place. None = the rows start here.
            input_ids: (B, T) int64, what the embeddings are of, for retrievers that read text.
            marks: padding, chunk ends and documents among the T columns; None = none.
            generator: source of the Gumbel noise, used in training mode only.
            memory_only: stop below the upper layers. The memory is complete; what the upper
                layers of later segments see of this one is not.
        """
        layout, cursors = self._layout(embeddings, state, marks or Marks())
        landmark = None if self.landmark is None else self.landmark.to(embeddings.dtype)
        hidden = layout.to_positions(embeddings, landmark)
        rotary = self._rotary(layout, hidden, state)
        layers = list(self.layers)
        for number in self.lower_layers:
            hidden = layers[number](hidden, rotary, layout, _window(state, number))
        closed = self._encode_closed(hidden, input_ids, layout, state)
        memory = self._remember(closed, layout, state, generator)
        retrievals: list[Retrieval] = []
        if memory is not None and not memory_only:
            for group, numbers in enumerate(self.layers_of_groups):
                retrieval = self._retrieve(group, hidden, closed, layout, memory)
                chunks = chunks_of_blocks(group, retrieval, layout, memory, state)
                for number in numbers:
                    window = _window(state, number)
                    hidden = layers[number](hidden, rotary, layout, window, chunks)
                retrievals.append(retrieval)
        if state is not None:
            state.cursors = cursors
        return DRTModelOutput(hidden, layout, tuple(retrievals))

    def _layout(
        self, embeddings: Tensor, state: DRTState | None, marks: Marks
    ) -> tuple[SegmentLayout, list[Cursor]]:
        """Where this segment's landmarks go, and where the rows stand after it."""
        cursors = [Cursor()] * embeddings.shape[0] if state is None else state.cursors
        count, device = embeddings.shape[1], embeddings.device
        return plan_segment(cursors, count, rules=self.rules, marks=marks, device=device)

    def _rotary(
        self, layout: SegmentLayout, hidden: Tensor, state: DRTState | None
    ) -> Rotary | None:
        if not self.uses_rope:
            return None
        first = layout.first_positions if state is None else state.next_positions(layout)
        count = layout.num_positions
        return rotary_factors(first, count, config=self.config, device=hidden.device)

    def _encode_closed(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        layout: SegmentLayout,
        state: DRTState | None,
    ) -> EncodedChunks | None:
        """Encode the chunks that this segment closes; None = it closes none."""
        if self.chunk_encoder is None:
            return None
        if state is None:
            closed, _ = layout.split_chunks(hidden, hidden[:, :0])
        else:
            closed = state.extend_opened(hidden, layout)
        if not layout.num_closed:
            return None
        lengths = layout.chunk_lengths
        on_device = None if lengths is None else lengths.to(hidden.device, non_blocking=True)
        return self.chunk_encoder(closed, on_device)

    def _remember(
        self,
        closed: EncodedChunks | None,
        layout: SegmentLayout,
        state: DRTState | None,
        generator: torch.Generator | None,
    ) -> ChunkMemory | None:
        """The memory, with the chunks that this segment closes appended."""
        if self.chunk_encoder is None:
            return None
        if state is None:
            memory = TrainingMemory(noise=self._noise, generator=generator)
        else:
            memory = state.memory
        if closed is not None:
            memory.append(*closed, layout.chunk_lengths)
        return memory

    @property
    def _noise(self) -> float:
        """Scale of the Gumbel noise on the scores that choose chunks."""
        return self.config.retrieval_noise if self.training else 0.0

    def _retrieve(
        self,
        group: int,
        hidden: Tensor,
        closed: EncodedChunks | None,
        layout: SegmentLayout,
        memory: ChunkMemory,
    ) -> Retrieval:
        """What each landmark of the segment retrieves for one group."""
        topk = self.retrieval_topk
        if closed is None:
            scores = hidden.new_zeros(hidden.shape[0], 0, topk, dtype=torch.float32)
            return Retrieval(scores.long(), scores, scores)
        queries = self.query_norms[group](layout.take_landmarks(hidden))
        queries = self.query_projs[group](queries)
        return memory.search(queries, layout.limits, topk=topk, firsts=layout.firsts)


def _layers_of_groups(config: DRTConfig) -> list[range]:
    """The layer numbers of each retrieval group."""
    first, groups = config.num_lower_layers, []
    for size in config.retrieval_groups:
        groups.append(range(first, first + size))
        first += size
    return groups


class DRTForCausalLM(
    LanguageModelHeadMixin, DRTPreTrainedModel, DRTReading, DRTGeneration, GenerationMixin
):
    """The Differentiable Retrieval-based Transformer with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The Trainer then hands `num_items_in_batch` to the loss.
    accepts_loss_kwargs = True
    _model_class = DRTModel

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        self.model = self._model_class(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def new_state(self, batch_size: int = 1, *, memory: ChunkMemory | None = None) -> DRTState:
        """An empty decoding state.

        Args:
            batch_size: rows that will be read side by side.
            memory: an empty memory to write to; None = a `DeviceMemory`.

        Raises:
            ValueError: no rows, or a memory that holds chunks; `load_state` goes on from these.
        """
        return DRTState(self.config, batch_size, memory=memory)

    def fingerprint(self) -> str:
        """A hash of the weights, by which saved states know their model; computed at each call."""
        return model_fingerprint(self)

    def save_state(
        self,
        state: DRTState,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, str] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Save a state of one row, memory and all, to be continued in another process.

        Args:
            state: what this model has read.
            folder: where to. A memory that lives there already is committed, not copied.
            fingerprint: what else to check when it is loaded, say {"tokenizer": ...}.
            notes: anything that JSON can hold, given back by `load_state`.

        Raises:
            ValueError: the state has several rows, the folder holds another memory, its memory was
                created there with a fingerprint that does not name this model, or an error has
                interrupted what last read into the state.
            OSError: the folder cannot be written.
        """
        state.check_finished()
        marks = {"model": self.fingerprint(), **(fingerprint or {})}
        save_state(state, folder, fingerprint=marks, notes=notes)

    def load_state(
        self,
        folder: str | Path,
        *,
        writable: bool = False,
        fingerprint: Mapping[str, str] | None = None,
    ) -> tuple[DRTState, dict[str, Any]]:
        """Load what `save_state` wrote; keys and values stay on disk until they are retrieved.

        Args:
            folder: where it is.
            writable: whether what is read from here on goes to the folder; else it stays in memory.
            fingerprint: what must have been given to `save_state`.

        Returns:
            The state, and the notes that were saved with it.

        Raises:
            MemoryFormatError: nothing of the kind is there, it is damaged, or of another model.
            BlockingIOError: it is to be written and somebody else is writing.
        """
        marks = {"model": self.fingerprint(), **(fingerprint or {})}
        return load_state(
            folder, self.config, fingerprint=marks, device=self.device, writable=writable
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DRTState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        chunk_ends: Tensor | None = None,
        document_ids: Tensor | None = None,
        output_retrievals: bool = False,
        output_token_losses: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> DRTCausalLMOutput:
        """Predict the next token of every content token.

        Args:
            input_ids: (B, T) int64 content tokens, any T; landmarks are inserted inside.
            attention_mask: (B, T), or (B, past + T) of which the last T count, with the columns
                that the state has read; 0 = padding, which may be anywhere and is as if it were
                not there, in the loss too.
            past_key_values: the state that the tokens continue; extended in place. After an error
                on the way it is refused, as it holds an unknown part of them.
            inputs_embeds: (B, T, E) in place of `input_ids`.
            labels: (B, T) int64, the input ids or -100; shifted inside, to the content before
                each. Needs all logits.
            use_cache: whether to make a state when none is given; None = no.
            logits_to_keep: compute only the last n logits, or those at a (n,) index; 0 = all.
            chunk_ends: (B, T) bool; the open chunk closes after these tokens although it is not
                full. The end of a prompt, of a turn, of a question.
            document_ids: (B, T) of any integers; where the id changes a document begins, which
                neither sees nor retrieves what came before. Its first token is predicted from
                there unless its label is -100. None = the document goes on.
            output_retrievals: return what each group retrieved.
            output_token_losses: return the loss of each token; needs `labels`.
            generator: source of the Gumbel noise in training, and of chunks closed early; None =
                torch's default.
            **kwargs: `num_items_in_batch` for the loss.

        Returns:
            `DRTCausalLMOutput` with logits (B, T, vocab_size); at padding they mean nothing. They
            are None where there are labels, in training mode with `config.loss_chunk_size` set.

        Raises:
            ValueError: ids, labels, masks or a state of a wrong shape, an unfinished state, ids
                beyond the vocabulary, an unknown argument, or a state in training mode with
                gradients.
        """
        extra = loss_kwargs(kwargs)
        columns = check_columns(input_ids, inputs_embeds, hidden_size=self.config.hidden_size)
        check_labels(labels, columns, logits_to_keep, output_token_losses=output_token_losses)
        state = past_key_values
        check_trains_without(state, self, use_cache=use_cache)
        if state is None and use_cache:
            state = self.new_state(columns.shape[0])
        check_state(state, columns)
        check_mask(attention_mask, columns, state)
        marks = make_marks(columns, attention_mask, chunk_ends, document_ids)
        # From here to `end_reading` an error leaves the state unfinished.
        if state is not None and input_ids is None:
            state.begin_reading(columns.shape[1])
        elif state is not None and input_ids is not None:
            check_ids(input_ids, vocab_size=self.config.vocab_size)
            state.note_ids(input_ids)
            graph = state.decoding_graph
            is_bare = labels is None and not output_retrievals and isinstance(logits_to_keep, int)
            if graph is not None and is_bare and graph.covers(input_ids, marks):
                logits = graph.step(input_ids, marks)
                state.end_reading()
                return DRTCausalLMOutput(logits=logits, past_key_values=state)  # type: ignore[arg-type]
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.training and state is None and self._closes_early:
            marks = self._close_some_early(marks, embeddings, generator)
        out = self.model(embeddings, state, input_ids=input_ids, marks=marks, generator=generator)
        hidden = self._predictions(out, logits_to_keep)
        chunk_size = self.config.loss_chunk_size if self.training else None
        content = None if marks.content is None else torch.from_numpy(marks.content)
        found = predict(
            self.lm_head, hidden, labels, chunk_size=chunk_size, content=content, **extra
        )
        if state is not None:
            state.end_reading()
        return DRTCausalLMOutput(
            loss=found.loss,
            logits=found.logits,
            past_key_values=state,
            retrievals=out.retrievals if output_retrievals else None,
            token_losses=found.token_losses if output_token_losses else None,
        )

    def _predictions(self, out: DRTModelOutput, keep: int | Tensor) -> Tensor:
        """What the head reads: (B, T or n, E)."""
        kept = slice(-keep if keep else None, None) if isinstance(keep, int) else keep
        return self.model.norm(out.layout.take_predictions(out.hidden, kept))

    @property
    def _closes_early(self) -> bool:
        return self.config.early_close_rate > 0 and bool(self.config.retrieval_groups)

    def _close_some_early(
        self, marks: Marks, embeddings: Tensor, generator: torch.Generator | None
    ) -> Marks:
        """Close chunks at random, so that training knows chunks of every length."""
        device = torch.device("cpu") if generator is None else generator.device
        drawn = torch.rand(embeddings.shape[:2], generator=generator, device=device)
        ends = (drawn < self.config.early_close_rate / self.config.chunk_size).cpu().numpy()
        if marks.chunk_ends is not None:
            ends |= marks.chunk_ends
        return marks._replace(chunk_ends=ends)


def _window(state: DRTState | None, number: int) -> Any:
    return None if state is None else state.windows[number]
