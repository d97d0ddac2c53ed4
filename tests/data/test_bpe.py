"""Vocabularies of one's own."""

import time
from pathlib import Path

import numpy as np
import pytest

from drt.data import encode, load_tokenizer
from drt.data.bpe import check_new_folder, train_bpe

TEXT = "The path went up between the pines; 1874 is a number, naïve 山 is a word.\n" * 30


def test_text_comes_back_and_pairs_are_joined(tmp_path: Path) -> None:
    tokenizer = train_bpe([TEXT], 300)
    assert len(tokenizer) == 300
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    tokenizer.save_pretrained(tmp_path / "out")
    kept = load_tokenizer(str(tmp_path / "out"))
    # Characters and bytes that were not in the text, and the spelling of the special token.
    text = TEXT + "\x00 é 🜁 <|endoftext|>"
    for each in (tokenizer, kept):
        ids = encode(each, text)
        assert each.decode(ids) == text
        assert ids.max() < 300
        assert 0 not in ids
    assert len(encode(tokenizer, TEXT)) < len(TEXT) / 2
    assert len(encode(train_bpe([TEXT], 257), TEXT)) == len(TEXT.encode())


def test_the_same_texts_give_the_same_tokenizer() -> None:
    files = [train_bpe([TEXT[:999], TEXT[999:]], 300).backend_tokenizer.to_str() for _ in "12"]
    assert files[0] == files[1]


def test_long_runs_take_no_longer_than_their_length() -> None:
    # Not cut, either run takes minutes.
    letters = np.random.default_rng(0).choice(list("ACGT"), 400_000)
    started = time.process_time()
    tokenizer = train_bpe(["".join(letters), " " * 400_000], 400)
    assert len(tokenizer) == 400
    assert time.process_time() - started < 20


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="vocab_size is 256; it must be 257 or more"):
        train_bpe([TEXT], 256)
    with pytest.raises(ValueError, match="vocab_size is 5000, but the texts yield only"):
        train_bpe([TEXT], 5000)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    check_new_folder(tmp_path)
    check_new_folder(tmp_path / "new")
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already"):
            check_new_folder(path)
