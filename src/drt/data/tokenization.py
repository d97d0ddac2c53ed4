"""Tokenizers: one token a byte, or any tokenizer that transformers can load."""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

BYTES = "bytes"
PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"
NUM_BYTES = 256

# A bare tokenizer.json does not say which entry ends a text: it is the first of these it has.
END_OF_TEXT_TOKENS = ("<|endoftext|>", "</s>", EOS_TOKEN)


def byte_alphabet() -> list[str]:
    """The printable stand-in of each byte, 0 to 255, in the alphabet of ByteLevel."""
    # ByteLevel keeps printable Latin-1 bytes and numbers the others from code point 256 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kept = {ord(symbol): symbol for symbol in alphabet if ord(symbol) < NUM_BYTES}
    moved = iter(alphabet[len(kept) :])
    return [kept.get(byte) or next(moved) for byte in range(NUM_BYTES)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer whose token ids are the UTF-8 bytes of the text.

    Ids 0 to 255 are the bytes, 256 is ``<pad>``, 257 is ``<eos>``: 258 entries. The spellings of
    the two special tokens inside a text are text and become bytes. Pads on the left and adds no
    special tokens.
    """
    vocabulary = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False, use_regex=False
    )
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    # Left to transformers, the end would come before the padding.
    core.add_special_tokens([PAD_TOKEN, EOS_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        padding_side="left",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ``tokenizer`` has the vocabulary of ``byte_tokenizer``."""
    if len(tokenizer) != NUM_BYTES + 2:
        return False
    entries = [*byte_alphabet(), PAD_TOKEN, EOS_TOKEN]
    return tokenizer.convert_ids_to_tokens(list(range(len(entries)))) == entries


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer called ``name``.

    Args:
        name: ``"bytes"``, a ``tokenizer.json`` file, a folder with one or with a saved tokenizer,
            or the name of a model on the Hugging Face hub. Of a bare ``tokenizer.json`` the entry
            for the end of a text (the first of ``END_OF_TEXT_TOKENS`` that it has) serves as end
            and as padding.

    Raises:
        ValueError: nothing of that name can be loaded as a tokenizer.
    """
    if name == BYTES:
        return byte_tokenizer()
    path = Path(name)
    if path.is_dir() and not (path / "tokenizer_config.json").exists():
        path = path / "tokenizer.json"
    if path.is_file():
        return _load_tokenizer_file(path)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer {name!r}: it is not {BYTES!r}, not a tokenizer.json, not a folder with "
            f"one, and transformers cannot load it: {error}"
        ) from error


def _load_tokenizer_file(path: Path) -> PreTrainedTokenizerFast:
    try:
        vocabulary = Tokenizer.from_file(str(path)).get_vocab()
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    end = next((token for token in END_OF_TEXT_TOKENS if token in vocabulary), None)
    special = {} if end is None else {"eos_token": end, "pad_token": end}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), padding_side="left", **special)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, dtype: DTypeLike = np.int64
) -> np.ndarray:
    """Return the token ids of ``text`` without special tokens, shape (num_tokens,).

    The spelling of a special token inside ``text`` is text like any other. A byte tokenizer is not
    asked at all, so that a text of many megabytes costs no more than a copy.

    Raises:
        ValueError: ``text`` has lone surrogates and is therefore not UTF-8.
    """
    if is_byte_tokenizer(tokenizer):
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(dtype, copy=False)
    return np.array(encode_batch(tokenizer, [text])[0], dtype=dtype)


def encode_batch(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text, as of ``encode``, in one call of the tokenizer."""
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    return encoded["input_ids"]


def encode_with_offsets(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of ``text``, as of ``encode``, and the byte at which each token ends.

    Both are int64 of shape (num_tokens,).

    Raises:
        ValueError: a tokenizer that does not tell offsets, which only fast ones do.
    """
    if is_byte_tokenizer(tokenizer):
        ids = encode(tokenizer, text)
        return ids, np.arange(1, len(ids) + 1)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer: it tells no offsets")
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 1]
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    return ids, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[ends]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest token id and one: more than there are entries where ids are left out."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary: 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for token, number in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{number}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
