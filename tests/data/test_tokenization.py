from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from transformers import PreTrainedTokenizerFast

from drt.data import byte_tokenizer, encode, load_tokenizer
from drt.data.tokenization import is_byte_tokenizer

BYTES = byte_tokenizer()


@given(st.text())
def test_byte_ids_are_the_utf8_bytes_and_decode_to_the_text(text: str) -> None:
    ids = BYTES(text)["input_ids"]
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@given(st.text())
def test_encode_of_bytes_equals_the_tokenizer(text: str) -> None:
    assert encode(BYTES, text).tolist() == BYTES(text)["input_ids"]


def test_every_byte_has_its_own_value_as_id() -> None:
    for byte in range(256):
        # Bytes from 128 on are no text by themselves: Latin-1 letters hold them as second bytes.
        text = chr(byte)
        assert BYTES(text)["input_ids"] == list(text.encode())
    assert len(set(BYTES.convert_ids_to_tokens(list(range(256))))) == 256


def test_vocabulary_is_bytes_pad_eos() -> None:
    assert len(BYTES) == 258
    assert (BYTES.pad_token, BYTES.pad_token_id) == ("<pad>", 256)
    assert (BYTES.eos_token, BYTES.eos_token_id) == ("<eos>", 257)


@pytest.mark.parametrize("text", ["<pad>", "a <eos> b", " <pad><eos>"])
def test_spelling_of_a_special_token_is_text(text: str) -> None:
    assert BYTES(text)["input_ids"] == list(text.encode())
    assert BYTES.decode(BYTES(text)["input_ids"], skip_special_tokens=True) == text


def test_pads_on_the_left() -> None:
    batch = BYTES(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_byte_tokenizer_survives_saving(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "façade <eos>  , x"
    assert is_byte_tokenizer(loaded)
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(list(text.encode())) == text
    assert loaded.padding_side == "left"


def test_load_by_the_name_bytes() -> None:
    assert is_byte_tokenizer(load_tokenizer("bytes"))


def test_only_the_byte_vocabulary_counts_as_bytes(bpe_tokenizer: PreTrainedTokenizerFast) -> None:
    assert not is_byte_tokenizer(bpe_tokenizer)
    other = byte_tokenizer()
    other.add_tokens(["more"])
    assert not is_byte_tokenizer(other)


def test_bare_tokenizer_json_loads_from_file_and_folder(
    bpe_file: Path, bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "the wind of 1874"
    for name in (bpe_file, bpe_file.parent):
        loaded = load_tokenizer(str(name))
        assert encode(loaded, text).tolist() == encode(bpe_tokenizer, text).tolist()
        assert loaded.eos_token == loaded.pad_token == "<|endoftext|>"
        assert loaded.padding_side == "left"


def test_saved_tokenizer_loads_from_its_folder(
    bpe_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bpe_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == bpe_tokenizer.get_vocab()


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer .*nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
    garbage = tmp_path / "tokenizer.json"
    garbage.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer .*empty"):
        load_tokenizer(str(tmp_path / "empty"))


@given(st.text(max_size=200))
def test_bpe_round_trip(bpe_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(bpe_tokenizer, text)
    assert ids.dtype == np.int64
    assert bpe_tokenizer.decode(ids) == text


def test_encode_adds_and_reads_no_special_tokens(bpe_file: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(bpe_file), bos_token="<|endoftext|>", add_bos_token=True
    )
    assert tokenizer("<|endoftext|>")["input_ids"].count(0) > 0
    assert 0 not in encode(tokenizer, "a<|endoftext|>b")
    assert tokenizer.decode(encode(tokenizer, "a<|endoftext|>b")) == "a<|endoftext|>b"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_encode_into_a_dtype(dtype: DTypeLike) -> None:
    ids = encode(BYTES, "añ", dtype=dtype)
    assert ids.dtype == dtype
    assert ids.tolist() == [97, 195, 177]


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encode(BYTES, "a\ud800")


def test_real_tokenizers_load(real_data: Path) -> None:
    for folder, size in (("gpt2", 50257), ("gpt-neox-20b", 50277)):
        tokenizer = load_tokenizer(str(real_data / "tokenizers" / folder))
        assert len(tokenizer) == size
        assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
