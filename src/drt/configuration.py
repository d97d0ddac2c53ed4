"""`DRTConfig`: every size and choice of a DRT model, checked when it is made."""

import math
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from drt.unknown_keys import refuse_unknown

# What transformers itself adds to a config or to config.json beside the declared fields.
_FOREIGN_KEYS = frozenset(
    {"transformers_version", "model_type", "auto_map", "torch_dtype", "_name_or_path"}
    | {"_commit_hash", "quantization_config"}
    | {"_attn_implementation", "_attn_implementation_internal", "attn_implementation"}
    | {"_experts_implementation", "experts_implementation", "num_labels", "name_or_path"}
)


@strict
class DecoderConfig(PreTrainedConfig):
    """The sizes that every model here has: a Llama-shaped decoder with a sliding window.

    Raises:
        ValueError: a size is out of range, heads do not divide, or a key is unknown.
    """

    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 258
    """Content tokens in the vocabulary; a landmark is not one of them."""
    hidden_size: int = 768
    """Model width E."""
    intermediate_size: int = 2048
    """Width of the SwiGLU feed-forward layers."""
    num_hidden_layers: int = 12
    """Decoder layers N."""
    num_attention_heads: int = 12
    """Query heads H."""
    num_key_value_heads: int | None = None
    """Key/value heads G; None = as many as query heads."""
    head_dim: int | None = None
    """Width of one head D; None = hidden_size / num_attention_heads."""
    max_position_embeddings: int = 16384
    """Tokens of a training row, for information: the model itself has no length limit."""
    initializer_range: int | float = 0.02
    """Standard deviation of the initial weights."""
    rms_norm_eps: int | float = 1e-6
    """Added to the mean square in every RMSNorm."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""
    use_cache: bool = True
    """Whether generation keeps a decoding state."""
    pad_token_id: int | None = None
    """Id of the padding token, if there is one."""
    bos_token_id: int | None = None
    """Id of the token that opens a text, if there is one."""
    eos_token_id: int | list[int] | None = None
    """Id or ids that end a generation, if any."""
    sliding_window: int = 512
    """Positions that self-attention sees directly, the query's own included; landmarks count."""
    rope_theta: int | float = 10000.0
    """Base of the rotary frequencies."""
    loss_chunk_size: int | None = None
    """Tokens, of all rows together, whose logits are held at once in training; a training forward
    with labels then returns no logits. None = all, and they are returned."""

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_fields(type(self), kwargs)
        for field in fields(self):
            # A whole number is as good, and saved as any other.
            if field.type == int | float:
                setattr(self, field.name, float(getattr(self, field.name)))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self._divided_head_dim()
        super().__post_init__(**kwargs)
        self._check()

    def _divided_head_dim(self) -> int:
        """The width of a head where it is left to be chosen."""
        width, rest = divmod(self.hidden_size, self.num_attention_heads)
        if rest:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; set head_dim to choose the head width yourself"
            )
        return width

    def _positive_fields(self) -> tuple[str, ...]:
        """Names of the fields that must be at least 1 where they are set."""
        return (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
            "loss_chunk_size",
        )

    def _not_negative_fields(self) -> tuple[str, ...]:
        """Names of the fields that must be at least 0."""
        return ("rms_norm_eps", "initializer_range")

    @property
    def _rotates(self) -> bool:
        """Whether any attention has rotary positions."""
        return True

    def _check(self) -> None:
        """Refuse what no model can have; names the field, its value and the limit."""
        for name in self._positive_fields():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in self._not_negative_fields():
            # Written so that NaN fails too.
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be positive and finite, got {self.rope_theta}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        assert kv_heads is not None
        assert self.head_dim is not None
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if self._rotates and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")


@strict
class DRTConfig(DecoderConfig):
    """Configuration of `DRTForCausalLM`.

    Of the decoder's layers the last `sum(retrieval_groups)` are the upper ones: they attend to
    retrieved chunks. Without groups the model is a plain sliding-window transformer.

    Raises:
        ValueError: a size is out of range, heads do not divide, or a key is unknown.
    """

    model_type = "drt"

    position_embedding: Literal["rope", "alibi"] = "rope"
    """Positional scheme of self-attention."""
    chunk_size: int = 64
    """Content tokens of a chunk S; a landmark closes every complete chunk."""
    retrieval_groups: list[int] | tuple[int, ...] = (6,)
    """Layers in each retrieval group; a group retrieves once a chunk for all its layers."""
    retrieval_topk: int = 8
    """Chunks retrieved per retrieval K."""
    retrieval_onset: Literal["chunk", "landmark"] = "landmark"
    """First position to use a retrieval: the landmark itself, or the chunk after it (the paper)."""
    retrieval_noise: int | float = 1.0
    """Scale of the Gumbel noise on the scores that choose the chunks, in training only."""
    exclude_window_chunks: bool = False
    """Whether chunks that lie wholly inside the landmark's window are no candidates."""
    landmark_size: int | None = None
    """Width L of landmark embeddings and retrieval queries, learned; None = hidden_size, as in the
    paper. Search costs in proportion."""
    early_close_rate: int | float = 0.0
    """Chunks closed early, at random, per chunk_size tokens; in training without a state only."""
    close_prompt_chunk: bool = True
    """Whether `generate` closes the open chunk at the end of the prompt, so that what is asked
    there is retrieved for at once."""
    softmax_plus_one: bool = True
    """Whether attention inside a retrieved chunk has an implicit key of score and value zero."""
    num_encoder_layers: int = 2
    """Bidirectional layers of the chunk encoder; 0 = what the lower layers gave is only normed."""

    def __post_init__(self, **kwargs: Any) -> None:
        self.retrieval_groups = list(self.retrieval_groups)
        super().__post_init__(**kwargs)

    @property
    def num_upper_layers(self) -> int:
        """Decoder layers that attend to retrieved chunks."""
        return sum(self.retrieval_groups)

    @property
    def num_lower_layers(self) -> int:
        """Decoder layers below the chunk encoder, with self-attention only."""
        return self.num_hidden_layers - self.num_upper_layers

    @property
    def layer_types(self) -> list[str]:
        """Kind of self-attention of each layer, as transformers names it; derived, never saved."""
        return ["sliding_attention"] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """`layer_types` is derived, so there is nothing to check."""

    @property
    def _rotates(self) -> bool:
        # The chunk encoder always does.
        return self.position_embedding == "rope" or bool(self.retrieval_groups)

    def _positive_fields(self) -> tuple[str, ...]:
        return (*super()._positive_fields(), "chunk_size", "retrieval_topk", "landmark_size")

    def _not_negative_fields(self) -> tuple[str, ...]:
        return (*super()._not_negative_fields(), "retrieval_noise", "num_encoder_layers")

    def _check(self) -> None:
        super()._check()
        if not 0 <= self.early_close_rate <= self.chunk_size:
            raise ValueError(
                f"early_close_rate must be from 0 to chunk_size = {self.chunk_size}, "
                f"got {self.early_close_rate}"
            )
        if any(layers < 1 for layers in self.retrieval_groups):
            raise ValueError(
                f"every retrieval group needs at least 1 layer, got {self.retrieval_groups}"
            )
        if self.num_upper_layers > self.num_hidden_layers:
            raise ValueError(
                f"retrieval_groups {self.retrieval_groups} hold {self.num_upper_layers} layers, "
                f"the model has num_hidden_layers = {self.num_hidden_layers}"
            )


def refuse_unknown_fields(cls: type, kwargs: dict[str, Any]) -> None:
    """Raise ValueError on keys that no field of a configuration reads, nor transformers itself."""
    known = {field.name for field in fields(cls)}
    unknown = [key for key in kwargs if key not in _FOREIGN_KEYS]
    refuse_unknown(unknown, known, f"unknown {cls.__name__} key '{{key}}'")
