"""What the baselines share: what transformers sees of a model, and the state between forwards.

Each architecture stands in a file of its own and is complete there. Shapes use the letters of
docs/method.md: B rows, T content tokens, E width, H and G heads, D head width.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from drt.arguments import check_labels, loss_kwargs, make_marks
from drt.cache import ForkedCache, check_trains_without
from drt.configuration import DecoderConfig
from drt.layers import DRTRMSNorm
from drt.loss import LanguageModelHead, LanguageModelHeadMixin, predict


class KeyValues(NamedTuple):
    """Keys and values of n positions of one layer."""

    keys: Tensor
    """(B, n, G, D)."""
    values: Tensor
    """(B, n, G, D)."""

    def extended(self, key: Tensor, value: Tensor) -> KeyValues:
        """These and (B, P, G, D) new ones after them; of another precision, they take the new."""
        keys = torch.cat([self.keys.to(key.dtype), key], dim=1)
        values = torch.cat([self.values.to(value.dtype), value], dim=1)
        return KeyValues(keys, values)

    def last(self, count: int) -> KeyValues:
        """The last `count` positions, or all where there are fewer."""
        length = self.keys.shape[1]
        if length <= count:
            return self
        parts = (x[:, length - count :] for x in self)
        # A slice keeps the whole segment alive; one of little more than itself costs less so.
        return KeyValues(*(x if length <= 2 * count else x.clone() for x in parts))


class BaselineState(ForkedCache):
    """What a baseline carries from one forward to the next, made by `model.new_state()`.

    All rows have read the same number of tokens. Tensors in it are replaced, never written to, so
    a copy shares them: `copy.deepcopy` costs nothing and forks.

    Args:
        num_layers: decoder layers of the model.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[])
        self.num_tokens = 0
        """Content tokens read, of each row."""
        self.held: list[Any] = [None] * num_layers
        """Per layer a NamedTuple of tensors, rows first; None before anything was read."""

    def fork(self) -> BaselineState:
        """A state that goes on from here on its own."""
        other = copy.copy(self)
        other.held = list(self.held)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> BaselineState:
        return self.fork()

    @property
    def batch_size(self) -> int | None:
        """Rows; None before anything was read."""
        return None if self.held[0] is None else self.held[0][0].shape[0]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those with these numbers (B',)."""
        self.held = [
            held if held is None else type(held)(*(x[beam_idx.to(x.device)] for x in held))
            for held in self.held
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Content tokens read."""
        return self.num_tokens

    def __len__(self) -> int:
        return len(self.held)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_tokens={self.num_tokens})"


@dataclass
class BaselineOutput(CausalLMOutputWithPast):
    """What a baseline returns: `loss`, `logits`, `past_key_values` and what was asked for."""

    token_losses: Tensor | None = None
    """(B, T - 1) of predicting labels 1 .. T - 1, 0 at -100; only with `output_token_losses`."""


class BaselinePreTrainedModel(PreTrainedModel):
    """What transformers must know of the model."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    # A state cannot be rolled back, so assisted decoding is refused.
    _is_stateful = True


class BaselineModel(BaselinePreTrainedModel):
    """Embedding, layers and final norm; subclasses fill `layers` and write `forward`."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        self.norm = DRTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def forward(self, input_ids: Tensor, state: BaselineState | None) -> Tensor:
        """Read one segment.

        Args:
            input_ids: (B, T) int64, T at least 1.
            state: what was read before; extended in place. None = the rows start here, and
                nothing is kept.

        Returns:
            (B, T, E) where the token after each one is predicted, before the final norm.
        """
        raise NotImplementedError


class BaselineForCausalLM(LanguageModelHeadMixin, BaselinePreTrainedModel, GenerationMixin):
    """A `BaselineModel` with a language-model head; subclasses name their classes only.

    `generate` with a state that has read something is that of transformers, the opposite of
    `DRTForCausalLM`: the prompt is the whole text, that which the state has read included, and goes
    on behind it. Of what was read only the length is known, so the beginning of the prompt is left
    out unread, whatever it is. With an `attention_mask` of as many columns as the whole text, the
    prompt is what comes after the state, as with a DRT.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    # The Trainer then hands `num_items_in_batch` to the loss.
    accepts_loss_kwargs = True
    model_class: type[BaselineModel]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size)
        self.post_init()

    def new_state(self) -> BaselineState:
        """An empty state, for any number of rows."""
        return BaselineState(self.config.num_hidden_layers)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: BaselineState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        output_token_losses: bool = False,
        **kwargs: Any,
    ) -> BaselineOutput:
        """Predict the next token of every token.

        Args:
            input_ids: (B, T) int64, any T of at least 1.
            attention_mask: (B, T), or (B, past + T) of which the last T count; 0 = padding, which
                is allowed at the right of rows that no state is kept of. What is returned at
                padding means nothing; `labels` must be -100 there.
            past_key_values: the state that the tokens continue; extended in place.
            labels: (B, T) int64, the input ids or -100; shifted inside. Needs all logits.
            use_cache: whether to make a state when none is given; None = no.
            logits_to_keep: compute only the last n logits, or those at a (n,) index; 0 = all.
            output_token_losses: return the loss of each token; needs `labels`.
            **kwargs: `num_items_in_batch` for the loss.

        Returns:
            `BaselineOutput` with logits (B, T, vocab_size). They are None where there are labels,
            in training mode with `config.loss_chunk_size` set.

        Raises:
            ValueError: ids, masks or a state of a wrong shape or kind, padding that cannot be
                read, an unknown argument, or a state in training mode with gradients.
        """
        extra = loss_kwargs(kwargs)
        check_labels(labels, input_ids, logits_to_keep, output_token_losses=output_token_losses)
        state = past_key_values
        check_trains_without(state, self, use_cache=use_cache)
        if state is None and use_cache:
            state = self.new_state()
        _check_ids(input_ids, state)
        _check_padding(input_ids, attention_mask, state)
        hidden = self.model(input_ids, state)
        is_count = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep or None, None) if is_count else logits_to_keep
        hidden = self.model.norm(hidden[:, kept])
        chunk_size = self.config.loss_chunk_size if self.training else None
        found = predict(self.lm_head, hidden, labels, chunk_size=chunk_size, **extra)
        return BaselineOutput(
            loss=found.loss,
            logits=found.logits,
            past_key_values=state,
            token_losses=found.token_losses if output_token_losses else None,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Give `generate` a `BaselineState` where transformers would make a cache of its own."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not "
                f"supported: a {type(self).__name__} keeps a BaselineState"
            )
        given = model_kwargs.get("past_key_values")
        if generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_state() if given is None else given
        elif given is not None:
            # Each step would read the whole text into it again.
            raise ValueError("use_cache=False with a state is not supported: leave one of them out")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: BaselineState | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the state has not read; the rest is as `forward` wants it.

        Raises:
            ValueError: the prompt is not longer than what the state has read.
        """
        if next_sequence_length is not None:
            if next_sequence_length < 1:
                read = input_ids.shape[1] - next_sequence_length
                raise ValueError(
                    f"the state has read {read} tokens, which the prompt must begin with, and the "
                    f"prompt has {input_ids.shape[1]}: there is no token to go on from"
                )
            input_ids = input_ids[:, -next_sequence_length:]
        return {
            "input_ids": input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }


def _check_ids(input_ids: Tensor, state: Any) -> None:
    """Refuse ids of a wrong shape, and what is no state of as many rows."""
    if input_ids.dim() != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be (B, T), T at least 1, got {tuple(input_ids.shape)}")
    if state is None:
        return
    if not isinstance(state, BaselineState):
        raise ValueError(
            f"past_key_values must be a BaselineState, got {type(state).__name__}; "
            "make one with model.new_state()"
        )
    if state.batch_size not in (None, input_ids.shape[0]):
        raise ValueError(
            f"the state has {state.batch_size} rows, the input has {input_ids.shape[0]}"
        )


def _check_padding(
    input_ids: Tensor, attention_mask: Tensor | None, state: BaselineState | None
) -> None:
    """Refuse padding that content would see: all but that at the right of rows without a state."""
    content = make_marks(input_ids, attention_mask, None, None).content
    if content is None:
        return
    if state is not None:
        raise ValueError(
            "attention_mask marks padding, which a state cannot hold: read rows of unequal length "
            "one at a time, or without a state and padded at the right"
        )
    inside = (~content[:, :-1] & content[:, 1:]).any(axis=1)
    if inside.any():
        raise ValueError(
            f"attention_mask marks padding before content in row {int(inside.argmax())}: only "
            "padding at the right can be read"
        )
