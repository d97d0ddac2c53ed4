"""A prepared split, a model whose losses are known, and tokenizers of two kinds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from drt.data.prepared import CorpusConfig, PreparedSplit, find_sources, prepare
from drt.data.tokenization import byte_tokenizer

TEXT = (
    "Nobody lived in the upper house; niemand wohnte über dem Tal, und\n\n 山は静か \U0001f3d4 but "
    "1874\t is gone.\u3000Ωδή!  "
)

Prepare = Callable[..., PreparedSplit]


@pytest.fixture
def make_split(tmp_path: Path) -> Prepare:
    """Make a split of texts, tokenized as bytes or with another tokenizer."""

    def make(
        texts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        end_of_text: bool = False,
    ) -> PreparedSplit:
        source, out = tmp_path / "texts", tmp_path / "out"
        source.mkdir()
        for number, text in enumerate(texts):
            (source / f"{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
        config = CorpusConfig(tokenizer="bytes", end_of_text=end_of_text)
        prepare(config, tokenizer or byte_tokenizer(), find_sources(config, [source]), out)
        return PreparedSplit(out / "train")

    return make


@pytest.fixture(scope="session")
def byte_bpe() -> PreTrainedTokenizerFast:
    """A BPE over bytes, as GPT-2 has: tokens may begin and end inside a character."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def sentence_pieces() -> PreTrainedTokenizerFast:
    """Pieces with spaces as U+2581 and bytes for what has no piece, as Llama 2 has."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    pieces = ["\u2581", *"Nobdyliveuprhstwga", "\u2581t", "\u2581th", "\u2581the"]
    vocabulary |= {piece: 256 + number for number, piece in enumerate(pieces)}
    merges = [("\u2581", "t"), ("\u2581t", "h"), ("\u2581th", "e")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    core.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


class Bigram(PreTrainedModel):
    """A model that predicts from the last token alone, by a table of logits."""

    config_class = PreTrainedConfig

    def __init__(self, table: Tensor) -> None:
        super().__init__(PreTrainedConfig(vocab_size=table.shape[1]))
        self.table = nn.Parameter(table)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values or (DynamicCache() if use_cache else None)
        return CausalLMOutputWithPast(logits=self.table[input_ids], past_key_values=cache)  # type: ignore[arg-type]

    def nats(self, tokens: np.ndarray) -> np.ndarray:
        """The loss of each token after the first, in float64."""
        logits = self.table.detach().double().numpy()
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -scores[tokens[:-1], tokens[1:]]


@pytest.fixture(scope="session")
def bigram() -> Bigram:
    generator = torch.Generator().manual_seed(5)
    return Bigram(2 * torch.randn(258, 258, generator=generator)).eval()
