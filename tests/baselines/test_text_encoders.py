"""Frozen encoders: equal texts are equal, alike ones near, what is behind a text is unseen."""

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from drt.baselines.text_encoders import SentenceEncoder, encoder_for, hashed_ngrams
from drt.data.tokenization import byte_tokenizer


def ids_of(*texts: str, width: int = 48, fill: int = -1) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of the texts, and how many."""
    ids = torch.full((len(texts), width), fill)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(list(text.encode()), dtype=torch.int64)
    return ids, torch.tensor([len(text) for text in texts])


TEXTS = (
    "the cat sat on the mat",
    "on the mat the cat sat down",
    "markets fell by 2 points",
    "the cat sat on the mat",
    "",
)


def check_cosines(cosine: torch.Tensor) -> None:
    # Of float32 vectors of length 1.
    assert torch.allclose(cosine.diagonal()[:4], torch.ones(4), atol=1e-6)
    assert cosine[0, 3] > 1 - 1e-6
    assert cosine[0, 1] < 1 - 1e-3


def test_ngrams_that_are_shared_make_texts_alike() -> None:
    vectors = hashed_ngrams(*ids_of(*TEXTS))
    cosine = vectors @ vectors.T
    check_cosines(cosine)
    assert cosine[0, 1] > cosine[0, 2] + 0.3
    assert not vectors[4].any()
    # Alone, in wider rows and over other ids behind the text, a text has the same vector.
    for row, text in enumerate(TEXTS):
        alone = hashed_ngrams(*ids_of(text, width=60, fill=17))[0]
        assert torch.allclose(alone, vectors[row], atol=1e-6)


def test_repetitions_count_by_their_logarithm() -> None:
    """In one-token chunks of a, a, ..., the n-grams aa.. are alone: a sum one can do by hand."""
    for count in (1, 2, 3, 6):
        vector = hashed_ngrams(torch.full((1, count), 9), torch.tensor([count]))[0].double()
        times = [1 + torch.tensor(float(count - n)).log() for n in range(min(count, 3))]
        sizes = sorted(abs(float(x)) for x in vector if x)
        wanted = torch.stack(times).double()
        # A gram's size is 1 to 1 + 1/16 of its term, and then all are divided by one norm.
        assert len(sizes) == len(times)
        for size, term in zip(sizes, sorted((wanted / wanted.norm()).tolist()), strict=True):
            assert term / 1.07 < size < term * 1.07


def test_ngrams_tell_random_chunks_apart_without_ties() -> None:
    g = torch.Generator().manual_seed(0)
    # So many tokens that hardly any n-gram is shared.
    ids = torch.randint(0, 100_000, (300, 16), generator=g)
    vectors = hashed_ngrams(ids, torch.full((300,), 16)).double()
    cosine = (vectors @ vectors.T)[torch.triu_indices(300, 300, 1).unbind()]
    # Random signs in 256 places: mean 0, standard deviation 1/16; 44,850 pairs.
    assert abs(float(cosine.mean())) < 0.005
    assert abs(float(cosine.std()) - 1 / 16) < 0.005
    nonzero = cosine[cosine != 0]
    assert len(nonzero) > 0.99 * len(cosine)
    assert len(nonzero.unique()) > 0.999 * len(nonzero)


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers over bytes, in a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=258,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_sentence_encoder_is_the_mean_of_its_last_hidden_states(sentence_encoder: Path) -> None:
    encode = encoder_for(str(sentence_encoder), byte_tokenizer())
    ids, lengths = ids_of(*TEXTS)
    vectors = encode(ids, lengths)
    check_cosines(vectors @ vectors.T)
    bert = BertModel.from_pretrained(sentence_encoder).eval()
    for row, length in enumerate(lengths[:4].tolist()):
        mean = bert(ids[row : row + 1, :length]).last_hidden_state[0].mean(0)
        # Float32, alone and padded in a batch.
        assert torch.allclose(vectors[row], mean / mean.norm(), atol=1e-5)
    assert not vectors[4].isnan().any()


@torch.no_grad()
def test_sentences_are_encoded_in_batches_and_cut(sentence_encoder: Path) -> None:
    long = "a" * 39 + "bcdefgh"
    ids, lengths = ids_of(*TEXTS, long, "a" * 39 + "bzzzz")
    whole = encoder_for(str(sentence_encoder), byte_tokenizer())(ids, lengths)
    parts = SentenceEncoder(str(sentence_encoder), byte_tokenizer(), batch_size=2)(ids, lengths)
    assert torch.allclose(whole, parts, atol=1e-5)
    # The encoder reads 40 positions.
    assert torch.allclose(whole[5], whole[6], atol=1e-6)


def test_wordllama_says_how_to_get_it() -> None:
    try:
        import wordllama  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        with pytest.raises(ImportError, match="pip install wordllama"):
            encoder_for("wordllama", byte_tokenizer())
    else:
        vectors = encoder_for("wordllama", byte_tokenizer())(*ids_of(*TEXTS))
        check_cosines(vectors @ vectors.T)
        assert not vectors[4].any()
