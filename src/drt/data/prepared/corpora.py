"""Corpora as they are asked for: what to read, with which tokenizer, into which folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from drt.data.prepared.format import Manifest, Plan
from drt.data.prepared.hub import HubSource, load_hub_splits
from drt.data.prepared.sources import FileSource, Source, check_one_in, find_splits, hold_out
from drt.data.prepared.writing import Progress, check_folder, prepare_split
from drt.data.tokenization import load_tokenizer, tokenizer_fingerprint, vocabulary_size

SHARD_TOKENS = 1 << 27
"""Tokens of a shard: 256 MiB where two bytes hold a token."""

TOKENIZER_FOLDER = "tokenizer"
"""Where a corpus keeps its tokenizer."""


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus to be prepared; the presets in `configs/data` are such."""

    tokenizer: str = "gpt2"
    """"bytes", or a Hugging Face tokenizer's name or path."""
    text_field: str = "text"
    """The field of a row that holds the text."""
    name_field: str | None = "id"
    """The field of a row that names the document; None = its number does."""
    end_of_text: bool = False
    """Whether the tokenizer's end token follows each document."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens with which a shard is full; it ends with the document that reaches them."""
    split: str | None = None
    """Read all local text as one split of this name; None = as files and folders are named."""
    hold_out_one_in: int | None = None
    """Of a corpus without a validation split, one document in so many becomes one; None = none."""
    hub: str | None = None
    """Name of a dataset on the Hugging Face hub; None = local files, whose paths are given."""
    hub_subset: str | None = None
    """Which of the dataset's configurations; None = the only one."""
    hub_revision: str | None = None
    """Commit, tag or branch of the dataset; None = the newest."""
    hub_files: dict[str, Any] | None = None
    """For each split the files that are read; None = as the dataset says."""

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; it must be 1 or more")
        if self.hold_out_one_in is not None:
            check_one_in(self.hold_out_one_in)
        if self.split is not None and not _is_folder_name(self.split):
            raise ValueError(
                f"split is {self.split!r}; it must be a folder's name, and not {TOKENIZER_FOLDER!r}"
            )
        if self.hub is None and (self.hub_subset or self.hub_revision or self.hub_files):
            raise ValueError("hub_subset, hub_revision and hub_files need hub, a dataset's name")
        if self.hub is not None and self.split is not None:
            raise ValueError("split is for local text; a dataset of the hub names its splits")


def _is_folder_name(split: str) -> bool:
    return Path(split).name == split and split not in ("", "..", TOKENIZER_FOLDER)


def find_sources(config: CorpusConfig, paths: list[Path]) -> dict[str, Source]:
    """The splits of a corpus and where their documents come from.

    Args:
        config: the corpus.
        paths: local files and folders; none for a dataset of the hub.

    Raises:
        ValueError: paths for a dataset of the hub or none for local text, nothing to read, or a
            validation split to be held out where there is one.
    """
    if (config.hub is None) != bool(paths):
        raise ValueError(
            f"the corpus is {config.hub} on the hub: it takes no paths"
            if config.hub
            else "the corpus is local text: give the paths of files or folders"
        )
    sources = _hub_sources(config) if config.hub else _file_sources(config, paths)
    if config.hold_out_one_in is None:
        return sources
    if len(sources) > 1:
        raise ValueError(f"hold_out_one_in is for one split; the corpus has {sorted(sources)}")
    return hold_out(next(iter(sources.values())), config.hold_out_one_in)


def _file_sources(config: CorpusConfig, paths: list[Path]) -> dict[str, Source]:
    fields: Any = {"text_field": config.text_field, "name_field": config.name_field}
    splits = find_splits(paths, only=config.split)
    return {split: FileSource(files, **fields) for split, files in splits.items()}


def _hub_sources(config: CorpusConfig) -> dict[str, Source]:
    assert config.hub is not None
    chosen: Any = {
        "subset": config.hub_subset,
        "revision": config.hub_revision,
        "data_files": config.hub_files,
    }
    splits = load_hub_splits(config.hub, **chosen)
    fields: Any = {
        "chosen": chosen,
        "text_field": config.text_field,
        "name_field": config.name_field,
    }
    return {split: HubSource(rows, config.hub, **fields) for split, rows in splits.items()}


def make_plan(
    config: CorpusConfig, split: str, source: Source, tokenizer: PreTrainedTokenizerBase
) -> Plan:
    """What a split's folder is to be.

    Raises:
        ValueError: the end of each document is wanted of a tokenizer that has no end token.
    """
    end: Any = tokenizer.eos_token_id if config.end_of_text else None
    if config.end_of_text and end is None:
        raise ValueError(f"end_of_text: the tokenizer {config.tokenizer} has no end token")
    return Plan(
        split=split,
        tokenizer=tokenizer_fingerprint(tokenizer),
        vocab_size=vocabulary_size(tokenizer),
        end_token=end,
        shard_tokens=config.shard_tokens,
        source=source.describe(),
    )


def prepare(
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: dict[str, Source],
    out: str | Path,
    *,
    num_processes: int = 1,
    on_progress: Callable[[Source, Progress], None] | None = None,
) -> dict[str, Manifest]:
    """Write each split of a corpus into a folder of its name, and the tokenizer beside them.

    What is there already stays, and what was begun is gone on with.

    Args:
        config: the corpus.
        tokenizer: that of the configuration.
        sources: its splits, from `find_sources`.
        out: the folder of the corpus.
        num_processes: how many processes tokenize, 1 or more; the files do not depend on it. More
            than 1 needs a script guarded by ``if __name__ == "__main__"``.
        on_progress: called after each piece with the split's source.

    Returns:
        The manifest of each split.

    Raises:
        ValueError: a folder holds another corpus or another tokenizer's, a text cannot be read, or
            `num_processes` is 0.
        OSError: writing failed; what was whole is kept.
    """
    if num_processes < 1:
        raise ValueError(f"num_processes is {num_processes}; it must be 1 or more")
    plans = {
        split: make_plan(config, split, source, tokenizer) for split, source in sources.items()
    }
    for split, plan in plans.items():
        check_folder(Path(out) / split, plan)
    _keep_tokenizer(tokenizer, Path(out) / TOKENIZER_FOLDER)
    manifests = {}
    for split, source in sources.items():

        def show(progress: Progress, source: Source = source) -> None:
            if on_progress is not None:
                on_progress(source, progress)

        manifests[split] = prepare_split(
            Path(out) / split,
            plans[split],
            source,
            tokenizer,
            num_processes=num_processes,
            on_progress=show,
        )
    return manifests


def _keep_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer, which its folder holds in full or not at all; refuse if it holds another.

    One that is there is of the corpus's other splits.
    """
    if folder.exists():
        there = tokenizer_fingerprint(load_tokenizer(str(folder)))
        given = tokenizer_fingerprint(tokenizer)
        if there != given:
            raise ValueError(
                f"{folder} holds another tokenizer, of fingerprint {there}, not {given}: all "
                "splits of a corpus have the same one"
            )
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(str(partial))
    partial.rename(folder)
