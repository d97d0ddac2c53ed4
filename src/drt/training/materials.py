"""What a run is made of: tokenizer, model, and the batches of its kind of data."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from drt.architectures import attach_tokenizer, make_config, make_model
from drt.checkpoints import load_checkpoint, load_model_config, locate_model
from drt.configuration import DRTConfig
from drt.data import Corpus, load_corpus, load_tokenizer
from drt.data.prepared import TokenRows
from drt.data.prepared.corpora import TOKENIZER_FOLDER
from drt.data.summaries import SummaryData
from drt.data.summary_batches import SummaryBatches
from drt.data.tokenization import BYTES
from drt.run_config import RunConfig, TextData
from drt.training.batches import NeedleSteps, StepSource, SummarySteps, TextSteps
from drt.training.curriculum import Curriculum


class Materials(NamedTuple):
    """What a run is made of, before anything is written."""

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    source: StepSource
    curriculum: Curriculum | None = None
    """Of needle rows."""
    corpus: Corpus | None = None
    """The haystack of needle rows."""
    validation: Sequence[dict[str, Tensor]] = ()
    """Rows of the validation loss, (T,) each; none of needle rows."""


class Planned(NamedTuple):
    """What is known of a run's model before anything is trained."""

    tokenizer: PreTrainedTokenizerBase
    model_config: PreTrainedConfig


def make_materials(config: RunConfig, corpus: Corpus | None = None) -> Materials:
    """Load data and make the model of a run.

    Args:
        config: the run.
        corpus: the haystack of needle rows, when it is loaded already.

    Raises:
        ValueError: something is not there, or model and data do not go together.
    """
    initial = None if config.initial is None else load_checkpoint(config.initial)
    planned = plan_run(config, initial and Planned(initial.tokenizer, initial.model.config))
    # Data first: it may be refused, and a large model takes time to make.
    data = _load_data(config, planned, corpus)
    model = make_model(
        planned.model_config, seed=config.seed, initial=initial.model if initial else None
    )
    attach_tokenizer(model, planned.tokenizer)
    if config.text is not None:
        _check_documents(model, config.text)
    return Materials(planned.tokenizer, model, **data._asdict())


def plan_run(config: RunConfig, initial: Planned | None) -> Planned:
    """The tokenizer of a run and the configuration of its model.

    Args:
        config: the run.
        initial: the same of the model that it begins with; None = it begins with none.

    Raises:
        ValueError: an unknown or wrong field of the model, or a tokenizer that does not go with it.
    """
    tokenizer = _tokenizer(config, initial)
    if initial is not None:
        _check_initial(tokenizer, initial.tokenizer)
    before = None if initial is None else initial.model_config
    return Planned(tokenizer, make_config(config.model, tokenizer, initial=before))


def plan_of(name: str) -> Planned:
    """The same of a saved model, whose weights are left alone.

    Args:
        name: as `load_checkpoint` takes it.

    Raises:
        ValueError: no such model or tokenizer.
    """
    found = locate_model(name)
    return Planned(load_tokenizer(str(found)), load_model_config(found))


class _Data(NamedTuple):
    """What a run trains on, as `Materials` has it."""

    source: StepSource
    curriculum: Curriculum | None = None
    corpus: Corpus | None = None
    validation: Sequence[dict[str, Tensor]] = ()


def _load_data(config: RunConfig, planned: Planned, corpus: Corpus | None = None) -> _Data:
    tokenizer, model_config = planned
    if config.text is not None:
        source, validation = _text(config, config.text, tokenizer)
        return _Data(source, validation=validation)
    if config.summaries is not None:
        closes = getattr(model_config, "close_prompt_chunk", True)
        source, validation = _summaries(config, config.summaries, tokenizer, closes=closes)
        return _Data(source, validation=validation)
    curriculum = Curriculum(config.stages)
    corpus = corpus or load_corpus(config.corpus, tokenizer)
    return _Data(_needles(config, corpus, curriculum, model_config), curriculum, corpus)


def _needles(
    config: RunConfig, corpus: Corpus, curriculum: Curriculum, model_config: PreTrainedConfig
) -> NeedleSteps:
    chunk_size = config.chunk_size or getattr(model_config, "chunk_size", DRTConfig.chunk_size)
    source = NeedleSteps(config, corpus, curriculum, chunk_size=chunk_size)
    if config.training.evaluate_every:
        _check_questions(config, corpus, chunk_size)
    return source


def _check_questions(config: RunConfig, corpus: Corpus, chunk_size: int) -> None:
    """Refuse needle evaluations on the way whose questions do not fit in the longest row."""
    evaluation = config.evaluation
    for name, task in (("single", evaluation.single), ("multi", evaluation.multi)):
        try:
            task.evaluation_example(
                corpus,
                seed=evaluation.seed + 1,
                index=0,
                length=config.train_length,
                chunk_size=chunk_size,
            )
        except ValueError as error:
            raise ValueError(
                f"evaluation.{name}, which training.evaluate_every asks for at "
                f"{config.train_length} tokens: {error}"
            ) from error


def check_data(config: RunConfig, planned: Planned) -> None:
    """Refuse a run on what is not there or too short, without making a model.

    Args:
        config: the run.
        planned: what `plan_run` gives for it.

    Raises:
        ValueError: as `make_materials`.
        ImportError: summaries of the hub are wanted and `datasets` is not installed.
    """
    _load_data(config, planned)


def _tokenizer(config: RunConfig, initial: Planned | None) -> PreTrainedTokenizerBase:
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    if config.text is not None:
        folder = Path(config.text.corpus) / TOKENIZER_FOLDER
        if "{" in config.text.corpus:
            raise ValueError(
                f"text.corpus is {config.text.corpus!r}: give text.corpus=FOLDER, which "
                "`drt data prepare` has written, or the parameter of a study"
            )
        if not folder.is_dir():
            # The hub would be asked for a tokenizer of that name.
            raise ValueError(
                f"text.corpus is {config.text.corpus!r}, where `drt data prepare` has written no "
                f"corpus: there is no {folder}"
            )
        return load_tokenizer(str(folder))
    return load_tokenizer(BYTES) if initial is None else initial.tokenizer


def _check_initial(tokenizer: PreTrainedTokenizerBase, initial: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with whose ids the initial model has learned other tokens."""
    now = tokenizer.get_vocab()
    other = {token: id for token, id in initial.get_vocab().items() if now.get(token) != id}
    if other:
        token, number = next(iter(other.items()))
        raise ValueError(
            f"the tokenizer is not the initial model's: {len(other)} of its {len(initial)} entries "
            f"are others, {token!r} was {number} and is {now.get(token)}; tokenize with the "
            "model's own"
        )


def _text(
    config: RunConfig, text: TextData, tokenizer: PreTrainedTokenizerBase
) -> tuple[StepSource, Sequence[dict[str, Tensor]]]:
    """Steps of text, and rows of the validation split, which are the same for all seeds."""
    folder, per_step = Path(text.corpus), config.training.rows_per_step(text.length)
    cut = partial(
        TokenRows,
        length=text.length,
        documents=text.documents,
        last_piece=text.last_piece,
        tokenizer=tokenizer,
    )
    once = cut(folder / text.split)
    num_epochs = -(-config.training.num_steps * per_step // once.num_rows)
    rows = cut(once.split, seed=config.seed, num_epochs=num_epochs)
    steps = TextSteps(rows, rows_per_step=per_step)
    if not (config.training.evaluate_every and text.validation_rows):
        return steps, ()
    held_out = cut(folder / text.validation_split)
    if len(held_out) < text.validation_rows:
        raise ValueError(
            f"{held_out.split.folder} has {len(held_out)} rows of {text.length} tokens, "
            f"text.validation_rows is {text.validation_rows}: lower it, or hold more text out"
        )
    return steps, [held_out[index] for index in range(text.validation_rows)]


def _summaries(
    config: RunConfig, data: SummaryData, tokenizer: PreTrainedTokenizerBase, *, closes: bool
) -> tuple[StepSource, Sequence[dict[str, Tensor]]]:
    """Steps of documents with their summaries, and rows of the validation split."""
    batches = SummaryBatches(
        data,
        tokenizer,
        seed=config.seed,
        num_steps=config.training.num_steps,
        batch_size=config.training.rows_per_step(data.length),
    )
    steps = SummarySteps(batches, closes_prompts=closes)
    if not config.training.evaluate_every:
        return steps, ()
    held_out = SummaryBatches(
        replace(data, split=data.validation_split), tokenizer, num_steps=1, batch_size=1
    )
    count = min(data.validation_rows, len(held_out.examples))
    return steps, [steps.adapted(held_out.row(index)) for index in range(count)]


def _check_documents(model: PreTrainedModel, text: TextData) -> None:
    """Refuse packed documents for a model that would read them as one text."""
    knows = "document_ids" in inspect.signature(model.forward).parameters
    if text.documents == "packed" and not knows:
        raise ValueError(
            f"text.documents is packed, and a {type(model).__name__} cannot keep documents of a "
            "row apart: choose crossing or apart"
        )
