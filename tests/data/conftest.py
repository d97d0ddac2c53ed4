"""Tokenizers and corpora that several tests share."""

import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drt.data import Corpus, Document, byte_tokenizer, encode

PROSE = (
    "The path went up between the pines, and the wind from the ridge smelled of new snow. "
    "Nobody had lived in the upper house since the year of 1874, yet its door was never locked. "
)


@pytest.fixture(scope="session")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of a small BPE, as a model trained elsewhere would bring it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    numbers = [f"{number:05d} is {number * 7919 % 100000}" for number in range(300)]
    core.train_from_iterator([PROSE * 3, *numbers], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    core.save(str(path))
    return path


@pytest.fixture(scope="session")
def bpe_tokenizer(bpe_file: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(bpe_file), eos_token="<|endoftext|>")


def prose_corpus(tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Forty documents, each with its number in every sentence."""
    texts = {f"document {n}": PROSE.replace("the", f"the {n}") * (5 + n % 4) for n in range(40)}
    return Corpus(
        [Document(name=name, tokens=encode(tokenizer, text)) for name, text in texts.items()],
        tokenizer,
    )


@pytest.fixture(scope="session")
def byte_corpus(bytes_tokenizer: PreTrainedTokenizerFast) -> Corpus:
    return prose_corpus(bytes_tokenizer)


@pytest.fixture(scope="session")
def bpe_corpus(bpe_tokenizer: PreTrainedTokenizerFast) -> Corpus:
    return prose_corpus(bpe_tokenizer)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real corpora that the variable DRT_DATA names."""
    folder = os.environ.get("DRT_DATA")
    if folder is None:
        pytest.skip("DRT_DATA is not set: no folder of real corpora and tokenizers")
    return Path(folder)
