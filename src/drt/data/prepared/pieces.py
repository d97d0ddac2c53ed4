"""Texts cut into pieces that can be tokenized each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from drt.data.prepared.format import Position

PIECE_CHARACTERS = 1 << 20


class Piece(NamedTuple):
    """A part of a document, in whole characters."""

    text: str
    """The part; empty only where the document is."""
    name: str
    """What the document is called."""
    next: Position
    """The place after the document in its source."""
    is_last: bool
    """Whether the document ends with it."""
    splits_word: bool
    """Whether a word begins in this piece and goes on in the next."""


def cut_pieces(parts: Iterable[str], name: str, after: Position) -> Iterator[Piece]:
    """Cut a document into pieces of at most `PIECE_CHARACTERS`.

    A cut is made between a letter or digit and a single space. Byte-level tokenizers (GPT-2, Llama
    3) begin a word there whatever comes before and after, so that the pieces' tokens are those of
    the whole text; one that puts a blank before each text (Llama 2) has a token more a piece. White
    space about a line end would not do: it is split by what follows it.
    Where so many characters have no such space the cut is made at the last, and may cost a token.

    Args:
        parts: the document's text, in parts of any size.
        name: what the document is called.
        after: the place after the document in its source.
    """
    held, start = "", 0
    for part in parts:
        held, start = held[start:] + part, 0
        while len(held) - start > PIECE_CHARACTERS:
            cut = _place(held, start, start + PIECE_CHARACTERS)
            inside = not held[cut - 1].isspace() and not held[cut].isspace()
            yield Piece(held[start:cut], name, after, False, inside)
            start = cut
    yield Piece(held[start:], name, after, True, False)


def _place(text: str, start: int, end: int) -> int:
    """Where between `start` and `end`, which is inside `text`, to cut."""
    space = text.rfind(" ", start + 1, end)
    while space > start:
        if text[space - 1].isalnum() and not text[space + 1].isspace():
            return space
        space = text.rfind(" ", start + 1, space)
    return end
