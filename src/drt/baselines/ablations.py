"""DRT with one of its ideas left out or replaced, and RPT's architecture with a fixed retriever.

Each field of `AblationConfig` is one such change. As they stand, the model is a DRT, bit for bit.
More ablations are fields of `DRTConfig`: `retrieval_noise: 0`, `softmax_plus_one: false`, other
`retrieval_groups`, `retrieval_topk` or `sliding_window`, `num_encoder_layers: 0`.

The row "RPT with Contriever" of the paper is

    retriever: fixed, retriever_name: facebook/contriever, mixing: joint, bypass: false

Of RPT (arXiv 2306.13421) this has the frame: a decoder whose lower half's outputs are encoded chunk
by chunk, bidirectionally; one retrieval a chunk, by the chunk just read, among the earlier ones of
the same text; upper layers that attend to all tokens of the retrieved chunks at once, in the
residual stream. It has no retriever trained on the scores of a reference language model (here the
retriever is frozen), so no scheduled sampling either, and no gate on neighbours. A neighbour is the
retrieved chunk alone, where RPT appends the chunk that follows it; attention to it has no positions
and softmax-plus-one, where RPT's has rotary ones and a learned null key.
"""

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn

from drt.baselines.joint_attention import JointCrossAttention
from drt.baselines.random_retrieval import (
    draw_by_count,
    draw_freely,
    retrieve_at_random,
    weigh_uniformly,
)
from drt.baselines.text_encoders import HASHED_NGRAMS, TextEncoder, encoder_for, hashed_ngrams
from drt.chunking import SegmentLayout
from drt.configuration import DRTConfig
from drt.layers import DRTDecoderLayer, EncodedChunks, Rotary
from drt.memory import ChunkMemory, TrainingMemory
from drt.modeling import DRTForCausalLM, DRTModel
from drt.retrieval import Retrieval, RetrievedChunks
from drt.state import DRTState, WindowCache


@strict
class AblationConfig(DRTConfig):
    """Configuration of `AblationForCausalLM`: that of a DRT, and what is other.

    Raises:
        ValueError: as `DRTConfig`, a scale that is not positive, or `landmark_size` with a
            retriever that has no projections.
    """

    model_type = "drt_ablation"

    retriever: Literal["learned", "random", "fixed"] = "learned"
    """Who chooses chunks: DRT's retriever; chance; or a frozen encoder of the chunks' texts, by
    which the text of the chunk just closed is alike. The last two get no gradient and no noise."""
    retriever_seed: int = 0
    """Seed of the random retriever outside of training."""
    retriever_name: str = HASHED_NGRAMS
    """Encoder of the fixed retriever: "hashed-ngrams", "wordllama", or a sentence encoder of
    transformers by folder or hub name, such as "facebook/contriever"."""
    retriever_scale: int | float = 20.0
    """By which the fixed retriever multiplies cosines before the softmax that gives its weights."""
    retriever_weights: Literal["scores", "uniform"] = "scores"
    """Weights of what the fixed retriever found; in joint mixing they are not used."""
    mixing: Literal["grouped", "joint"] = "grouped"
    """Attention to the retrieved chunks: a softmax in each, mixed by the retrieval weights; or one
    over the tokens of all, as in RETRO and RPT, to which a learned retriever adds log weights."""
    bypass: bool = True
    """Whether what is retrieved bypasses the residual stream; otherwise h = a + o + FFN(.)."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.retriever_scale <= 0:
            raise ValueError(f"retriever_scale must be positive, got {self.retriever_scale}")
        if self.retriever != "learned" and self.landmark_size is not None:
            raise ValueError(
                f"landmark_size {self.landmark_size} is the width of learned projections, which "
                f"retriever {self.retriever!r} has not"
            )


class AblationDecoderLayer(DRTDecoderLayer):
    """A decoder layer whose attention to retrieved chunks and whose residual stream may differ."""

    def __init__(self, config: AblationConfig, *, upper: bool) -> None:
        super().__init__(config, upper=upper)
        self.bypass = config.bypass
        if upper and config.mixing == "joint":
            self.cross_attn = JointCrossAttention(config, weighted=config.retriever == "learned")

    def forward(
        self,
        hidden: Tensor,
        rotary: Rotary | None,
        layout: SegmentLayout,
        cache: WindowCache | None = None,
        chunks: RetrievedChunks | None = None,
    ) -> Tensor:
        """As `DRTDecoderLayer`; without the bypass, a' = a + o and h = a' + FFN(norm(a'))."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, layout, cache)
        mixed = self.with_retrieved(hidden, layout, chunks)
        stream = hidden if self.bypass else mixed
        return stream + self.mlp(self.post_attention_layernorm(mixed))


class AblationModel(DRTModel):
    """`DRTModel` with another retriever."""

    config: AblationConfig
    config_class = AblationConfig
    _layer_class = AblationDecoderLayer
    _no_split_modules = ["AblationDecoderLayer", "DRTEncoderLayer"]  # noqa: RUF012

    def __init__(self, config: AblationConfig) -> None:
        super().__init__(config)
        self.text_encoder: TextEncoder | None = None
        if config.retriever != "learned":
            self.query_norms, self.query_projs = nn.ModuleList(), nn.ModuleList()
        if config.retriever_name == HASHED_NGRAMS:
            self.text_encoder = hashed_ngrams

    @property
    def _noise(self) -> float:
        return super()._noise if self.config.retriever == "learned" else 0.0

    def _encode_closed(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        layout: SegmentLayout,
        state: DRTState | None,
    ) -> EncodedChunks | None:
        """As `DRTModel`; landmarks of a fixed retriever are embeddings of the chunks' texts."""
        closed = super()._encode_closed(hidden, input_ids, layout, state)
        if self.config.retriever != "fixed" or self.chunk_encoder is None:
            return closed
        if input_ids is None:
            raise ValueError("the fixed retriever reads text: pass input_ids, not inputs_embeds")
        ids = _closed_ids(input_ids, layout, state)
        return closed and closed._replace(landmarks=self._embed_texts(ids, layout))

    def _embed_texts(self, ids: Tensor, layout: SegmentLayout) -> Tensor:
        """(B, C, S) ids of closed chunks -> (B, C, L) float32."""
        if self.text_encoder is None:
            raise ValueError(
                f"the retriever {self.config.retriever_name!r} reads text and has no tokenizer: "
                "call model.attach_retriever(tokenizer) first"
            )
        lengths = layout.chunk_lengths
        if lengths is None:
            lengths = torch.full(ids.shape[:2], ids.shape[2])
        lengths = lengths.to(ids.device, non_blocking=True)
        return self.text_encoder(ids.flatten(0, 1), lengths.flatten()).unflatten(0, ids.shape[:2])

    def _retrieve(
        self,
        group: int,
        hidden: Tensor,
        closed: EncodedChunks | None,
        layout: SegmentLayout,
        memory: ChunkMemory,
    ) -> Retrieval:
        """What each landmark of the segment retrieves for one group."""
        if closed is None or self.config.retriever == "learned":
            return super()._retrieve(group, hidden, closed, layout, memory)
        if self.config.retriever == "random":
            return weigh_uniformly(self._chosen_at_random(group, layout, memory).to(hidden.device))
        # The text just closed is the query; a search divides by sqrt(L).
        texts = closed.landmarks
        queries = texts * (self.config.retriever_scale * texts.shape[-1] ** 0.5)
        found = memory.search(
            queries, layout.limits, topk=self.retrieval_topk, firsts=layout.firsts
        )
        if self.config.retriever_weights == "uniform" or self.config.mixing == "joint":
            return found._replace(weights=weigh_uniformly(found.indices).weights)
        return found

    def _chosen_at_random(self, group: int, layout: SegmentLayout, memory: ChunkMemory) -> Tensor:
        """(B, C, K) int64 chunk numbers: other ones at each step of training, else always those."""
        topk, firsts = self.retrieval_topk, layout.firsts
        count = layout.limits if firsts is None else layout.limits - firsts
        if self.training and isinstance(memory, TrainingMemory):
            draws = draw_freely(count, topk=topk, generator=memory.generator)
        else:
            draws = draw_by_count(count, topk=topk, seed=self.config.retriever_seed, group=group)
        return retrieve_at_random(draws, count, firsts)


def _closed_ids(input_ids: Tensor, layout: SegmentLayout, state: DRTState | None) -> Tensor:
    """(B, C, S) ids of the chunks that the segment closes, anything where they are shorter."""
    landmark = input_ids.new_full((1,), -1)
    ids = layout.to_positions(input_ids[..., None], landmark)[..., 0]
    if state is not None:
        return state.extend_opened_ids(ids, layout)[..., :-1]
    closed, _ = layout.split_chunks(ids[..., None], ids[:, :0, None])
    return closed[..., :-1, 0]


class AblationForCausalLM(DRTForCausalLM):
    """`DRTForCausalLM` with what `AblationConfig` says left out or replaced.

    A fixed retriever that reads text (every `retriever_name` but "hashed-ngrams") is no part of the
    saved model: call `attach_retriever` after making or loading one. It takes `input_ids`, no
    `inputs_embeds`, and decodes without a `DecodingGraph`.
    """

    config: AblationConfig
    config_class = AblationConfig
    _model_class = AblationModel
    _no_split_modules = AblationModel._no_split_modules

    def attach_retriever(self, tokenizer: Any) -> None:
        """Load the frozen encoder that `config.retriever_name` names.

        Nothing happens where the retriever reads no text: learned, random, or "hashed-ngrams".

        Args:
            tokenizer: of this model, to turn ids into text.

        Raises:
            ImportError: the package that it needs is not installed.
            OSError, ValueError: no such model can be loaded.
        """
        if self.config.retriever == "fixed":
            self.model.text_encoder = encoder_for(self.config.retriever_name, tokenizer)
