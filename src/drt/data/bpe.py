"""Small vocabularies of one's own: a byte-level BPE trained on text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from drt.data.tokenization import NUM_BYTES

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = NUM_BYTES + 1

# A word of a thousand letters is data: a sequence of bases, or a picture as base64.
_LONGEST_RUN = 1000
_LONG_RUN = re.compile(rf"(?<!\S)\S{{{_LONGEST_RUN},}}|(?<!\s)\s{{{_LONGEST_RUN},}}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on texts; the same texts give the same tokenizer.

    Args:
        texts: what to count pairs in, in parts of any size; lines should not be cut.
        vocab_size: entries, among them the 256 bytes and `END_OF_TEXT`, which is id 0 and serves as
            end and as padding.

    Returns:
        A tokenizer with exactly `vocab_size` entries, which pads on the left, splits text as GPT-2
        does and adds no special tokens.

    Raises:
        ValueError: `vocab_size` is less than 257, or the texts have not so many pairs to join.
    """
    check_vocab_size(vocab_size)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False
    )
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_without_long_runs(texts), trainer)
    if core.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the texts yield only {core.get_vocab_size()} entries"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut within long words: training takes the square of their length."""
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                yield text[start:cut]
                start = cut
        yield text[start:]


def check_vocab_size(vocab_size: int) -> None:
    """Raise ValueError if a vocabulary has no room for the bytes and `END_OF_TEXT`."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}; it must be {SMALLEST_VOCABULARY} or more")


def check_new_folder(folder: str | Path) -> None:
    """Raise ValueError unless a folder is not there yet, or is empty."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; choose another folder")
