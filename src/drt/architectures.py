"""From the `model` of a run configuration to a model: ours, our baselines, any of transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from drt.baselines import AblationForCausalLM
from drt.configuration import DRTConfig
from drt.unknown_keys import refuse_unknown


def make_config(
    model: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    initial: PreTrainedConfig | None = None,
) -> PreTrainedConfig:
    """The configuration of a model.

    Args:
        model: fields of the configuration. `model_type` names its kind as transformers does;
            without it, it is that of `initial`, or "drt".
        tokenizer: gives the vocabulary's size and the ids of padding and end, where they are not
            among the fields.
        initial: a configuration of which fields are changed; None = the kind's defaults.

    Raises:
        ValueError: an unknown kind or field, a value that the configuration refuses, in one line,
            or a vocabulary smaller than the tokenizer's.
    """
    given = dict(model)
    default = DRTConfig.model_type if initial is None else initial.model_type
    kind = given.pop("model_type", default)
    if initial is not None and kind != initial.model_type:
        raise ValueError(
            f"model_type {kind} cannot go on from an initial model of type {initial.model_type}"
        )
    config_class = _config_class(kind)
    # Configurations of transformers take any key and keep it: a typing error would go unseen.
    refuse_unknown(given, known_fields(kind), f"unknown key model.{{key}} of a {kind} model")
    if initial is None:
        given = {**_of_tokenizer(tokenizer), **given}
        config = _made(config_class, given)
    else:
        known = known_fields(kind)
        # A Trainer may have switched use_cache off, and a model that is made so cannot generate.
        known -= {"use_cache"}
        kept = {key: value for key, value in initial.to_dict().items() if key in known}
        config = _made(config_class, {**kept, **given})
    size = getattr(config, "vocab_size", None)
    if size is None or size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size {size} is smaller than the tokenizer's {len(tokenizer)} entries"
        )
    return config


def attach_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a model whose retriever reads text the tokenizer that spells it; others need none."""
    if isinstance(model, AblationForCausalLM):
        model.attach_retriever(tokenizer)


def make_model(
    config: PreTrainedConfig, *, seed: int, initial: PreTrainedModel | None = None
) -> PreTrainedModel:
    """A model with random weights, or with those of another of the same shapes.

    Raises:
        ValueError: the weights of `initial` do not fit.
    """
    set_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if initial is not None:
        try:
            model.load_state_dict(initial.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the initial model does not fit: {error}") from error
    return model


def _made(config_class: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    """The configuration with these fields; whatever it raises, as a ValueError."""
    given = {name: _as_number(config_class, name, value) for name, value in given.items()}
    try:
        return config_class(**given)
    except (StrictDataclassError, TypeError, ArithmeticError) as error:
        raise ValueError(_refusal(error, config_class, given)) from error


def _hints(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Types of the declared fields."""
    return {field.name: field.type for field in fields(config_class)}  # type: ignore[arg-type]


def _as_number(config_class: type[PreTrainedConfig], name: str, value: Any) -> Any:
    """A value of a field, a float where that is what the field holds: YAML reads 1e-6 as text."""
    hint = _hints(config_class).get(config_class.attribute_map.get(name, name))
    kinds = get_args(hint) or (hint,)
    if float not in kinds or type(value) in kinds or type(value) not in (int, str):
        return value
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"model.{name} must be a number, got {value!r}") from None


def _refusal(
    error: Exception, config_class: type[PreTrainedConfig], given: Mapping[str, Any]
) -> str:
    """What is wrong with which field, in one line."""
    found = re.search(r"for field '(\w+)'", str(error))
    if found and found[1] in given and isinstance(error.__cause__, TypeError):
        name, hint = found[1], _hints(config_class)[found[1]]
        kind = hint.__name__ if type(hint) is type else str(hint).removeprefix("typing.")
        return f"model.{name} must be {kind}, got {given[name]!r}"
    # Nothing says which field it was, but what divided by zero is zero.
    named = [
        f"model.{name}={value!r}"
        for name, value in given.items()
        if value == 0 or not isinstance(error, ZeroDivisionError)
    ]
    text = " ".join(str(error.__cause__ or error).split()).rstrip(".")
    return f"model: {text}, got {', '.join(named)}"


def _config_class(kind: str) -> type[PreTrainedConfig]:
    try:
        return type(AutoConfig.for_model(kind))
    except ValueError as error:
        raise ValueError(f"model.model_type {kind!r} is no model that is known here") from error


def known_fields(kind: str) -> set[str]:
    """Names of the fields that the configuration of a kind of model has.

    Raises:
        ValueError: an unknown kind.
    """
    config_class = _config_class(kind)
    declared = {field.name for field in fields(config_class)}  # type: ignore[arg-type]
    return declared | set(config_class.attribute_map)


def _of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    # Some kinds have ids of a vocabulary of their own as defaults.
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
