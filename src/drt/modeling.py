"""The model, top to bottom. Start here.

Training, prefill in any segments and decoding are this one forward with a different state; see
docs/method.md for the equations and for each deviation from arXiv 2410.01651.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from drt.chunking import SegmentLayout
from drt.configuration import DRTConfig
from drt.layers import ChunkEncoder, DRTDecoderLayer, DRTRMSNorm, Rotary, rotary_factors
from drt.memory import ChunkMemory, TrainingMemory
from drt.retrieval import Retrieval, RetrievedChunks
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
    """What `DRTForCausalLM` returns: `loss`, `logits`, `past_key_values` and `retrievals`."""

    retrievals: tuple[Retrieval, ...] | None = None
    """Per group a `Retrieval` of the chunks closed in this call; only with `output_retrievals`."""


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


class DRTModel(DRTPreTrainedModel):
    """Lower layers, chunk encoder, and retrieval groups of upper layers."""

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        lower = config.num_lower_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DRTDecoderLayer(config, upper=number >= lower)
            for number in range(config.num_hidden_layers)
        )
        self.norm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        groups = config.retrieval_groups
        self.landmark = nn.Parameter(torch.empty(config.hidden_size)) if groups else None
        self.chunk_encoder = ChunkEncoder(config) if groups else None
        self.query_norms = nn.ModuleList(
            DRTRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in groups
        )
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        embeddings: Tensor,
        state: DRTState | None = None,
        *,
        generator: torch.Generator | None = None,
        memory_only: bool = False,
    ) -> DRTModelOutput:
        """Read one segment.

        Args:
            embeddings: (B, T, E) content embeddings.
            state: what was read before; extended in place. None = the rows start here.
            generator: source of the Gumbel noise, used in training mode only.
            memory_only: stop below the upper layers. The memory is complete; what the upper
                layers of later segments see of this one is not.
        """
        layout = self._layout(embeddings, state)
        hidden = embeddings
        if self.landmark is not None:
            hidden = layout.insert_landmarks(embeddings, self.landmark.to(embeddings.dtype))
        rotary = self._rotary(layout, hidden)
        for number in range(self.config.num_lower_layers):
            hidden = self.layers[number](hidden, rotary, _window(state, number))
        memory = self._remember(hidden, layout, state, generator)
        retrievals: list[Retrieval] = []
        if memory is not None and not memory_only:
            for group, numbers in enumerate(self._groups()):
                retrieval = self._retrieve(group, hidden, layout, memory)
                chunks = _chunks_of_blocks(group, retrieval, layout, memory, state)
                for number in numbers:
                    window = _window(state, number)
                    hidden = self.layers[number](hidden, rotary, window, layout, chunks)
                retrievals.append(retrieval)
        if state is not None:
            state.num_tokens += layout.length
        return DRTModelOutput(hidden, layout, tuple(retrievals))

    def _groups(self) -> Iterator[range]:
        """The layer numbers of each retrieval group."""
        first = self.config.num_lower_layers
        for size in self.config.retrieval_groups:
            yield range(first, first + size)
            first += size

    def _layout(self, embeddings: Tensor, state: DRTState | None) -> SegmentLayout:
        start = 0 if state is None else state.num_tokens
        if not self.config.retrieval_groups:
            return SegmentLayout.without_landmarks(start, embeddings.shape[1])
        onset = self.config.retrieval_onset == "landmark"
        size = self.config.chunk_size
        return SegmentLayout(start, embeddings.shape[1], size, onset, embeddings.device)

    def _rotary(self, layout: SegmentLayout, hidden: Tensor) -> Rotary | None:
        if self.config.position_embedding != "rope":
            return None
        first, count = layout.first_position, layout.num_positions
        return rotary_factors(first, count, config=self.config, device=hidden.device)

    def _remember(
        self,
        hidden: Tensor,
        layout: SegmentLayout,
        state: DRTState | None,
        generator: torch.Generator | None,
    ) -> ChunkMemory | None:
        """Encode the chunks that this segment closes and append them to the memory."""
        if self.chunk_encoder is None:
            return None
        if state is None:
            noise = self.config.retrieval_noise if self.training else 0.0
            memory, opened = TrainingMemory(noise=noise, generator=generator), None
        else:
            memory, opened = state.memory, state.opened
        if opened is None:
            opened = hidden[:, :0]
        closed, opened = layout.split_chunks(hidden, opened)
        if state is not None:
            state.opened = opened.detach().clone()
        if layout.num_closed:
            memory.append(*self.chunk_encoder(closed))
        return memory

    def _retrieve(
        self, group: int, hidden: Tensor, layout: SegmentLayout, memory: ChunkMemory
    ) -> Retrieval:
        """What each landmark of the segment retrieves for one group."""
        topk = self.config.retrieval_topk
        queries = self.query_norms[group](hidden[:, layout.landmark_positions])
        if layout.num_closed == 0:
            scores = queries.new_zeros(*queries.shape[:2], topk, dtype=torch.float32)
            return Retrieval(scores.long(), scores, scores)
        chunk = layout.first_chunk + torch.arange(layout.num_closed, device=hidden.device)
        return memory.search(queries, self._limits(chunk), topk=topk)

    def _limits(self, chunk: Tensor) -> Tensor:
        """Chunks before this number are candidates of the landmark that closes `chunk`."""
        inside = 1
        if self.config.exclude_window_chunks:
            inside = max(1, self.config.sliding_window // (self.config.chunk_size + 1))
        return (chunk + 1 - inside).clamp_min(0)


class DRTForCausalLM(DRTPreTrainedModel, GenerationMixin):
    """The Differentiable Retrieval-based Transformer with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The Trainer then hands `num_items_in_batch` to the loss.
    accepts_loss_kwargs = True

    def __init__(self, config: DRTConfig) -> None:
        super().__init__(config)
        self.model = DRTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_state(self, batch_size: int = 1, *, memory: ChunkMemory | None = None) -> DRTState:
        """An empty decoding state.

        Args:
            batch_size: rows that will be read side by side.
            memory: an empty memory to write to; None = slabs on the model's device.
        """
        return DRTState(self.config, batch_size, memory=memory)

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
        output_retrievals: bool = False,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> DRTCausalLMOutput:
        """Predict the next token of every content token.

        Args:
            input_ids: (B, T) int64 content tokens, any T; landmarks are inserted inside.
            attention_mask: (B, T) or (B, past + T) of ones. Without a state, rows may end in
                zeros: right padding, which no real token sees.
            past_key_values: the state that the tokens continue; extended in place.
            inputs_embeds: (B, T, E) in place of `input_ids`.
            labels: (B, T) int64, the input ids or -100; shifted inside.
            use_cache: whether to make a state when none is given; None = no.
            logits_to_keep: compute only the last n logits, or those at a (n,) index; 0 = all.
            output_retrievals: return what each group retrieved.
            generator: source of the Gumbel noise in training; None = torch's default.
            **kwargs: `num_items_in_batch` for the loss.

        Returns:
            `DRTCausalLMOutput` with logits (B, T, vocab_size).

        Raises:
            ValueError: padding that is not supported, ids or a state of a wrong shape, or an
                unknown argument.
        """
        loss_kwargs = _loss_kwargs(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        state = past_key_values
        if state is None and use_cache:
            state = self.new_state(embeddings.shape[0])
        _check_state(state, embeddings)
        _check_mask(attention_mask, state)
        out = self.model(embeddings, state, generator=generator)
        logits = self._logits(out, logits_to_keep)
        loss = None
        if labels is not None:
            vocab_size = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocab_size, **loss_kwargs)
        return DRTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=state,
            retrievals=out.retrievals if output_retrievals else None,
        )

    def _logits(self, out: DRTModelOutput, keep: int | Tensor) -> Tensor:
        positions = out.layout.prediction_positions
        chosen = positions[-keep:] if isinstance(keep, int) and keep else positions
        if isinstance(keep, Tensor):
            chosen = positions[keep]
        return self.lm_head(self.model.norm(out.hidden.index_select(1, chosen)))

    @torch.no_grad()
    def read(self, input_ids: Tensor, state: DRTState, *, segment_size: int = 4096) -> None:
        """Read a text of any length into a state, in segments, without logits.

        Layers whose work no later token can see are left out. Only the lower layers and the chunk
        encoder write to the memory, so the upper layers run over just the tail of the text; a
        model without retrieval groups reads nothing but its tail. The state is exact to rounding.

        Args:
            input_ids: (B, T) int64 content tokens.
            state: the state to extend.
            segment_size: tokens of one forward; bounds the working memory.
        """
        if segment_size < 1:
            raise ValueError(f"segment_size must be at least 1, got {segment_size}")
        length = input_ids.shape[1]
        tail = max(length - self._reach(), 0)
        first = 0
        if tail and self.config.retrieval_groups:
            state.forget_layers(self.config.num_lower_layers)
        elif tail:
            state.forget_layers(0)
            state.num_tokens += tail
            first = tail
        for begin, end in _segments(first, length, tail, segment_size):
            embeddings = self.model.embed_tokens(input_ids[:, begin:end])
            _check_state(state, embeddings)
            self.model(embeddings, state, memory_only=end <= tail)

    def _reach(self) -> int:
        """Tokens before a position that the layers above the memory can see from it."""
        config = self.config
        groups = len(config.retrieval_groups)
        layers = config.num_upper_layers if groups else config.num_hidden_layers
        # A layer looks back W - 1 positions; a retrieval is a chunk old at most when it is used.
        retrievals = (groups + 1) * (config.chunk_size + 1) if groups else 0
        return layers * (config.sliding_window - 1) + retrievals

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
        if (generation_config.num_beams or 1) > 1:
            raise NotImplementedError(
                f"num_beams={generation_config.num_beams}: beam search is not supported yet"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            rows = batch_size * (generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = self.new_state(rows)


def _window(state: DRTState | None, number: int) -> Any:
    return None if state is None else state.windows[number]


def _segments(begin: int, length: int, tail: int, size: int) -> Iterator[tuple[int, int]]:
    """Segments of at most `size` tokens from `begin` to `length`, cut once more at `tail`."""
    while begin < length:
        limit = tail if begin < tail else length
        end = min(begin + size, limit)
        yield begin, end
        begin = end


def _chunks_of_blocks(
    group: int,
    retrieval: Retrieval,
    layout: SegmentLayout,
    memory: ChunkMemory,
    state: DRTState | None,
) -> RetrievedChunks | None:
    """The chunks that each block of the segment attends to; the state keeps the last one's.

    Block 0 goes on with the retrieval that was current before the segment, block b uses what the
    segment's b-th landmark retrieved.
    """
    current = None if state is None else state.current[group]
    if layout.num_closed == 0:
        return current
    chunks = memory.gather(retrieval.indices)
    new = RetrievedChunks(chunks.keys, chunks.values, chunks.indices, retrieval.weights)
    blocks = _prepend(current, new)
    if state is not None:
        last = memory.gather(retrieval.indices[:, -1:])
        weights = retrieval.weights[:, -1:]
        state.current[group] = RetrievedChunks(last.keys, last.values, last.indices, weights)
    used = layout.num_blocks
    return blocks._replace(indices=blocks.indices[:, :used], weights=blocks.weights[:, :used])


def _prepend(current: RetrievedChunks | None, new: RetrievedChunks) -> RetrievedChunks:
    """The blocks of `new` after the one of `current`; none retrieves nothing."""
    if current is None:
        none = new.indices.new_full((new.indices.shape[0], 1, new.indices.shape[2]), -1)
        indices = torch.cat([none, new.indices], dim=1)
        weights = torch.cat([new.weights.new_zeros(none.shape), new.weights], dim=1)
        return new._replace(indices=indices, weights=weights)
    shifted = new.indices + current.keys.shape[1] * (new.indices >= 0)
    return RetrievedChunks(
        _cat_head_major(current.keys, new.keys),
        _cat_head_major(current.values, new.values),
        torch.cat([current.indices, shifted], dim=1),
        torch.cat([current.weights, new.weights], dim=1),
    )


def _cat_head_major(first: Tensor, second: Tensor) -> Tensor:
    """Concatenate (B, M, S, G, D) along M and keep the storage head-major."""
    return torch.cat([first.transpose(2, 3), second.transpose(2, 3)], dim=1).transpose(2, 3)


def _check_state(state: Any, embeddings: Tensor) -> None:
    if state is None:
        return
    if not isinstance(state, DRTState):
        raise ValueError(
            f"past_key_values must be a DRTState, got {type(state).__name__}; "
            "make one with model.new_state(batch_size)"
        )
    if state.rows != embeddings.shape[0]:
        raise ValueError(f"the state has {state.rows} rows, the input has {embeddings.shape[0]}")


def _check_mask(mask: Tensor | None, state: DRTState | None) -> None:
    """Refuse padding that a real token could see."""
    if mask is None or bool(mask.all()):
        return
    if mask.dim() != 2:
        raise ValueError(f"attention_mask must be (B, T), got shape {tuple(mask.shape)}")
    if state is not None:
        raise ValueError(
            "padded rows cannot be read into a state: pass prompts of equal length, or one by one"
        )
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("attention_mask has zeros before ones: only right padding is supported")


def _loss_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the loss reads among `kwargs`; anything else that asks for something is refused."""
    wanted = dict(kwargs)
    found = {key: wanted.pop(key) for key in ("num_items_in_batch",) if key in wanted}
    # transformers passes these by itself; both are how this model answers anyway.
    if wanted.pop("return_dict", True) is False:
        raise ValueError("return_dict=False is not supported")
    unknown = [key for key, value in wanted.items() if value not in (None, False)]
    if unknown:
        raise ValueError(f"DRTForCausalLM.forward does not know the arguments {unknown}")
    return found
