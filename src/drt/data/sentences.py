"""Where sentences end in a text that is tokens already."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.tokenization import vocabulary_size

_ENDS = ".!?"
# What may stand between the end of a sentence and the blank after it.
_CLOSERS = "\"')]}\u2019\u201d"

_SENTENCE_PIECE_BLANK = "\u2581"


class _Marks(NamedTuple):
    """What each entry of a vocabulary is, bool, shape (vocab_size,)."""

    ends: np.ndarray
    """Its text ends with the end of a sentence."""
    closes: np.ndarray
    """Its text is closing quotation marks and brackets alone."""
    opens: np.ndarray
    """Its text begins with a blank or a new line."""


def sentence_borders(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return where sentences of a text begin.

    A border is where a token that begins with a blank follows one that ends with a full stop, an
    exclamation mark or a question mark, closing marks between them allowed. The full stop of an
    abbreviation counts too.

    Args:
        ids: the text, shape (num_tokens,).
        tokenizer: what made it.

    Returns:
        Ascending positions, int64, shape (num_borders,): each is that of the token that comes
        after the border. Where no sentence begins, the start of the text alone.
    """
    marks = _marks(tokenizer)
    before, after = ids[:-1], ids[1:]
    ended = marks.ends[before]
    ended[1:] |= marks.closes[before[1:]] & marks.ends[before[:-1]]
    borders = 1 + np.flatnonzero(ended & marks.opens[after])
    return borders if len(borders) else np.zeros(1, dtype=np.int64)


@lru_cache(maxsize=4)
def _marks(tokenizer: PreTrainedTokenizerBase) -> _Marks:
    numbers = range(vocabulary_size(tokenizer))
    texts = tokenizer.batch_decode([[number] for number in numbers])
    # An id may stand for nothing.
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(numbers))]
    bare = [text.rstrip(_CLOSERS) for text in texts]
    return _Marks(
        ends=np.array([text.endswith(tuple(_ENDS)) for text in bare]),
        closes=np.array([bool(text) and not rest for text, rest in zip(texts, bare, strict=True)]),
        # SentencePiece drops the blank of a token that is decoded alone.
        opens=np.array(
            [
                text[:1].isspace() or piece.startswith(_SENTENCE_PIECE_BLANK)
                for text, piece in zip(texts, pieces, strict=True)
            ]
        ),
    )
