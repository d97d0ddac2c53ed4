"""Text as tokens: tokenizers, corpora to draw haystacks from, and needle tasks."""

from drt.data.babi import BabiStories
from drt.data.batches import Mixture, RowTask, batch
from drt.data.chains import HOPS, VARIABLES
from drt.data.corpora import SPLITS, Corpus, Document, Split, load_corpus
from drt.data.needle_rows import AskedNeedle, NeedleExample, NeedleQuestion, NeedleRow
from drt.data.needle_texts import MULTI, NAMES, SINGLE, NeedleTemplate
from drt.data.needles import MULTI_TASK, NeedleTask, score_answer
from drt.data.tokenization import byte_tokenizer, encode, load_tokenizer

__all__ = [
    "HOPS",
    "MULTI",
    "MULTI_TASK",
    "NAMES",
    "SINGLE",
    "SPLITS",
    "VARIABLES",
    "AskedNeedle",
    "BabiStories",
    "Corpus",
    "Document",
    "Mixture",
    "NeedleExample",
    "NeedleQuestion",
    "NeedleRow",
    "NeedleTask",
    "NeedleTemplate",
    "RowTask",
    "Split",
    "batch",
    "byte_tokenizer",
    "encode",
    "load_corpus",
    "load_tokenizer",
    "score_answer",
]
