"""How many bytes and words of a text stand for some of its tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.prepared import PreparedDocument
from drt.data.tokenization import byte_alphabet, vocabulary_size

# How sentence pieces write a space, and a byte that no piece has.
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextCounts(NamedTuple):
    """Bytes and words in front of each token of a document.

    A byte belongs to the token that spells it. A word, separated by white space, is counted with
    the token that spells its first byte.
    """

    bytes: np.ndarray
    """(num_tokens + 1,) int64; the last is that of the whole text."""
    words: np.ndarray
    """(num_tokens + 1,) int64."""


class Spelling:
    """What each token of a vocabulary stands for, in bytes.

    Known are vocabularies of bytes (GPT-2 and what follows it) and of sentence pieces with spaces
    written as U+2581. Special tokens stand for nothing: prepared text has none but its end.

    Args:
        tokenizer: any tokenizer; whether its tokens spell a text is found out with each text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        alphabet = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
        of_bytes = alphabet.keys() <= vocabulary.keys()
        special = set(tokenizer.all_special_ids)
        self._spelled = [b""] * vocabulary_size(tokenizer)
        for token, number in vocabulary.items():
            if number not in special:
                spelled = _spell_bytes(token, alphabet) if of_bytes else _spell_piece(token)
                self._spelled[number] = spelled
        self._sizes = np.array([len(spelled) for spelled in self._spelled], dtype=np.int64)

    def count(self, document: PreparedDocument) -> TextCounts | None:
        """Bytes and words in front of each token, checked with those that the text had.

        Returns:
            None where the tokens do not spell the text: the tokenizer changes texts, or it is of
            another kind.
        """
        spelled = b"".join([self._spelled[number] for number in document.tokens.tolist()])
        ends = np.cumsum(self._sizes[document.tokens], dtype=np.int64)
        if len(spelled) == document.num_bytes + 1 and spelled[:1] == b" ":
            # Sentence pieces put a space in front of a text.
            spelled, ends = spelled[1:], np.maximum(ends - 1, 0)
        try:
            starts = _word_starts(spelled.decode("utf-8"))
        except UnicodeDecodeError:
            return None
        if (len(spelled), len(starts)) != (document.num_bytes, document.num_words):
            return None
        before = np.concatenate([[0], ends])
        return TextCounts(before, starts.searchsorted(before))


def _spell_bytes(token: str, alphabet: dict[str, int]) -> bytes:
    """An added token is its own text, all others are written in stand-ins of bytes."""
    if all(symbol in alphabet for symbol in token):
        return bytes(alphabet[symbol] for symbol in token)
    return token.encode("utf-8", "surrogatepass")


def _spell_piece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode("utf-8", "surrogatepass")


def _word_starts(text: str) -> np.ndarray:
    """The byte at which each word begins, (num_words,) int64."""
    starts = np.array([word.start() for word in re.finditer(r"\S+", text)], dtype=np.int64)
    if text.isascii():
        return starts
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[starts]
