"""Frozen encoders that tell how alike the texts of two chunks are, for a retriever that is fixed.

An encoder is a function from token ids to vectors of length 1, whose inner product is the cosine:

    encoder(ids: (N, S) int64, lengths: (N,) int64) -> (N, L) float32

with the text of chunk i in ids[i, : lengths[i]]; what follows may be anything. Chunks of one text
have one vector, so their scores tie, and a search may return either first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drt.precision import without_autocast

TextEncoder = Callable[[Tensor, Tensor], Tensor]

HASHED_NGRAMS, WORDLLAMA = "hashed-ngrams", "wordllama"

_NUM_BUCKETS = 256
_LONGEST_NGRAM = 3

# Hashes are linear functions modulo this prime: of numbers below it, products fit into int64.
_PRIME = (1 << 31) - 1
_BASE = 1_103_515_245
# Factor and summand, per length of the n-gram: first for the bucket, then for the sign.
_BUCKET_HASHES = ((771_046_057, 41), (1_336_592_407, 1_051), (927_144_541, 60_013))
_SIGN_HASHES = ((1_583_458_089, 7), (693_952_031, 30_011), (1_893_513_181, 211))


def encoder_for(name: str, tokenizer: Any) -> TextEncoder:
    """Load the encoder of this name.

    Args:
        name: "hashed-ngrams", "wordllama" (the package of that name, which brings its weights), or
            a sentence encoder of transformers: a folder or a name on its hub.
        tokenizer: of the language model, to turn ids into text; "hashed-ngrams" has no use for it.

    Raises:
        ImportError: "wordllama" is not installed.
        OSError, ValueError: no such model can be loaded.
    """
    if name == HASHED_NGRAMS:
        return hashed_ngrams
    if name == WORDLLAMA:
        return WordLlamaEncoder(tokenizer)
    return SentenceEncoder(name, tokenizer)


@torch.no_grad()
def hashed_ngrams(ids: Tensor, lengths: Tensor) -> Tensor:
    """How often which n-grams of 1 to 3 tokens occur, hashed: a lexical retriever, in kin to BM25.

    The c occurrences of an n-gram add (1 + log c) to one of 256 numbers or take it away; hashes of
    the n-gram say which. All n-grams count alike, however frequent elsewhere (there is no inverse
    document frequency), but for a sixteenth that is hashed too, so that two unequal chunks of eight
    tokens or more hardly ever score exactly the same; of four, most share nothing and score 0. A
    pure function of the ids.

    Args:
        ids: (N, S) int64, -1 or more.
        lengths: (N,) int64 tokens of each chunk.

    Returns:
        (N, 256) float32 of length 1, or 0 for a chunk without tokens.
    """
    vectors = torch.zeros(ids.shape[0], _NUM_BUCKETS, device=ids.device)
    tokens = (ids + 1) % _PRIME
    grams = tokens
    for size in range(1, min(_LONGEST_NGRAM, ids.shape[1]) + 1):
        if size > 1:
            grams = (grams[:, :-1] * _BASE + tokens[:, size - 1 :]) % _PRIME
        inside = torch.arange(grams.shape[1], device=ids.device) <= (lengths - size)[:, None]
        factor, summand = _BUCKET_HASHES[size - 1]
        buckets = (grams * factor + summand) % _PRIME % _NUM_BUCKETS
        vectors.scatter_add_(1, buckets, _values(grams, inside, *_SIGN_HASHES[size - 1]))
    return F.normalize(vectors, dim=-1)


def _values(grams: Tensor, inside: Tensor, factor: int, summand: int) -> Tensor:
    """(N, n) float32 what each n-gram adds, its occurrences 1 + log c together; 0 outside."""
    same = (grams[:, :, None] == grams[:, None]) & inside[:, None]
    count = same.sum(-1).clamp_min(1).float()
    hashed = (grams * factor + summand) % _PRIME
    sign = (hashed % 2) * 2 - 1
    size = 1 + (hashed // 2 % 1024) / 16384
    return (sign * size * (1 + count.log()) / count).masked_fill(~inside, 0.0)


class _EncoderOfTexts(ABC):
    """What encoders of strings share: ids become text by the language model's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(N, S) ids and (N,) lengths -> (N, L) float32 of length 1."""
        rows = zip(ids.tolist(), lengths.tolist(), strict=True)
        texts = [
            self.tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in rows
        ]
        with without_autocast(ids.device.type):
            return F.normalize(self._encode(texts, ids.device).float(), dim=-1)

    @abstractmethod
    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        """(N, L) on the device."""


class SentenceEncoder(_EncoderOfTexts):
    """A sentence encoder of transformers: the mean of its last hidden states, as of Contriever.

    Source: Contriever, arXiv 2112.09118; its name on the hub is "facebook/contriever".

    Args:
        name: a folder or a name on the hub, of the model and of its own tokenizer.
        tokenizer: of the language model.
        batch_size: texts that are encoded together.
    """

    def __init__(self, name: str, tokenizer: Any, *, batch_size: int = 64) -> None:
        super().__init__(tokenizer)
        from transformers import AutoModel, AutoTokenizer

        self._model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        self._own_tokenizer = AutoTokenizer.from_pretrained(name)
        self._batch_size = batch_size
        longest = getattr(self._model.config, "max_position_embeddings", None)
        known = self._own_tokenizer.model_max_length
        self._max_length = known if longest is None else min(known, longest)

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        model = self._model.to(device)
        parts = []
        for start in range(0, len(texts), self._batch_size):
            given = self._own_tokenizer(
                texts[start : start + self._batch_size],
                padding=True,
                # Positions are then counted from the text's beginning, whatever is beside it.
                padding_side="right",
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(device)
            hidden = model(**given).last_hidden_state
            mask = given["attention_mask"][..., None].to(hidden.dtype)
            parts.append((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return torch.cat(parts)


class WordLlamaEncoder(_EncoderOfTexts):
    """Means of static token embeddings, from the package wordllama, which brings its weights.

    Args:
        tokenizer: of the language model.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        try:
            import wordllama  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                f"retriever_name {WORDLLAMA!r} needs the package wordllama: pip install wordllama"
            ) from error
        # It looks for its own tokenizer in the cache only.
        folder = Path(str(wordllama.__file__)).parent
        self._model = wordllama.WordLlama.load(cache_dir=folder, disable_download=True)

    def _encode(self, texts: list[str], device: torch.device) -> Tensor:
        found = torch.from_numpy(self._model.embed(texts, norm=False)).to(device)
        # The mean of no tokens is no number.
        return found.nan_to_num(0.0)
