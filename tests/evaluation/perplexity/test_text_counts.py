"""Bytes and words of parts of a text are counted exactly, inside of characters too."""

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from drt.data.prepared import PreparedDocument
from drt.data.tokenization import encode, load_tokenizer
from drt.evaluation.text_counts import Spelling

from .conftest import TEXT


def document(tokens: Any, text: str) -> PreparedDocument:
    return PreparedDocument(
        0, "name", np.array(tokens, np.uint16), len(text.encode()), len(text.split())
    )


def words_before(text: str, place: int) -> int:
    """How many words begin in the first `place` bytes, character by character."""
    count, byte, previous = 0, 0, " "
    for character in text:
        if byte >= place:
            break
        count += previous.isspace() and not character.isspace()
        byte, previous = byte + len(character.encode()), character
    return count


@pytest.mark.parametrize("text", [TEXT, " " + TEXT, TEXT.strip() * 3, "a", "山", "\n"])
def test_counts_of_each_token(
    text: str, byte_bpe: PreTrainedTokenizerFast, sentence_pieces: PreTrainedTokenizerFast
) -> None:
    size = len(text.encode())
    of_bytes = Spelling(load_tokenizer("bytes")).count(document(list(text.encode()), text))
    assert of_bytes is not None
    assert of_bytes.bytes.tolist() == list(range(size + 1))
    assert of_bytes.words.tolist() == [words_before(text, place) for place in range(size + 1)]
    for tokenizer in (byte_bpe, sentence_pieces):
        ids = encode(tokenizer, text)
        counts = Spelling(tokenizer).count(document(ids, text))
        assert counts is not None
        assert (counts.bytes[0], counts.bytes[-1], counts.words[-1]) == (0, size, len(text.split()))
        places = counts.bytes.tolist()
        assert counts.words.tolist() == [words_before(text, place) for place in places]
    ids = encode(byte_bpe, text)
    counts = Spelling(byte_bpe).count(document(ids, text))
    assert counts is not None
    assert len(ids) < size or size < 4
    for token, place in enumerate(counts.bytes.tolist()):
        spelled = byte_bpe.decode(ids[:token], clean_up_tokenization_spaces=False)
        assert spelled == text.encode()[:place].decode(errors="replace")


def test_a_token_that_ends_inside_a_character() -> None:
    text = "x 山"
    counts = Spelling(load_tokenizer("bytes")).count(document(list(text.encode()), text))
    assert counts is not None
    # x, space, and three bytes of the mountain, which begins the second word with its first.
    assert counts.bytes.tolist() == [0, 1, 2, 3, 4, 5]
    assert counts.words.tolist() == [0, 1, 1, 2, 2, 2]


def test_the_end_of_a_text_stands_for_nothing(byte_bpe: PreTrainedTokenizerFast) -> None:
    ids = [*encode(byte_bpe, "two words").tolist(), byte_bpe.eos_token_id]
    counts = Spelling(byte_bpe).count(document(ids, "two words"))
    assert counts is not None
    assert (counts.bytes[-2:].tolist(), counts.words[-2:].tolist()) == ([9, 9], [2, 2])


def test_tokens_that_do_not_spell_the_text(byte_bpe: PreTrainedTokenizerFast) -> None:
    spelling = Spelling(byte_bpe)
    # As if the tokenizer had changed the text, and a character that is cut off.
    assert spelling.count(document(encode(byte_bpe, "two words"), "Two  words")) is None
    assert spelling.count(document(encode(byte_bpe, "two words"), "twowordsx")) is None
    cut = load_tokenizer("bytes")
    assert Spelling(cut).count(document([0xE5], "a")) is None
