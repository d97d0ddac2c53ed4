import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drt.data import encode
from drt.data.sentences import sentence_borders
from drt.data.tokenization import vocabulary_size

TEXT = (
    'A path, 3.5 miles long. "Was it?" He asked (twice!) and left.\nMr. Fox slept.  It rained. End.'
)
PARTS = ["A path, 3.5 miles long.", ' "Was it?"', " He asked (twice!)", " and left.", "\nMr."]
PARTS += [" Fox slept.", "  It rained.", " End."]


@pytest.mark.parametrize("name", ["bytes_tokenizer", "bpe_tokenizer"])
def test_borders_are_where_sentences_begin(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerBase = request.getfixturevalue(name)
    ids = encode(tokenizer, TEXT)
    borders = sentence_borders(ids, tokenizer).tolist()
    borders = [0, *borders]
    parts = [
        tokenizer.decode(ids[one:two])
        for one, two in zip(borders, [*borders[1:], len(ids)], strict=True)
    ]
    assert parts == PARTS


def test_text_in_which_none_begins_has_its_start(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    for text in ("", "a", "no end", "end."):
        assert sentence_borders(encode(bytes_tokenizer, text), bytes_tokenizer).tolist() == [0]


def test_closing_marks_need_an_end_before_them(bytes_tokenizer: PreTrainedTokenizerBase) -> None:
    ids = encode(bytes_tokenizer, 'f(x) is "y" here')
    assert sentence_borders(ids, bytes_tokenizer).tolist() == [0]
    assert sentence_borders(np.array(list(b'so." He')), bytes_tokenizer).tolist() == [4]


def test_ids_that_stand_for_nothing_are_no_borders() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, " b.": 2, " c": 300}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    assert vocabulary_size(tokenizer) == 301
    assert sentence_borders(np.array([1, 2, 300, 2]), tokenizer).tolist() == [2]
