"""The texts of needle tasks, and needles as tokens."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.placement import Sizes
from drt.data.tokenization import encode, encode_batch, is_byte_tokenizer

# Of one length, so that a byte-level model finds the name at one distance from the value. The
# first sixteen differ in their first letter.
_WORDS = (
    "bear wolf lion hawk crow duck goat seal newt moth frog ibex kiwi puma tern vole "
    "deer swan toad mole lynx crab hare lamb mink orca rook slug wasp bass carp clam "
    "colt dodo dove fawn flea foal gnat gull kudu lark mule pony pike pine palm plum "
    "pear fern lime rose teak iris lily sage mint corn rice oats kale leek bean wren"
)
NAMES = tuple(_WORDS.split())


@dataclass(frozen=True)
class NeedleTemplate:
    """The texts of a needle and its question, with ``{name}`` and ``{value}`` as placeholders."""

    needle: str
    """The fact that is hidden; it has ``{value}`` once."""
    question: str
    """The text that the answer follows with nothing between; it has no ``{value}``."""
    before_value: str = ""
    """Text that is part of the value, such as the blank that a BPE tokenizer joins to a word."""

    def __post_init__(self) -> None:
        if self.needle.count("{value}") != 1:
            raise ValueError(f"the needle's text must have {{value}} once: {self.needle!r}")
        if not self.question or "{value}" in self.question:
            raise ValueError(f"the question must be text without {{value}}: {self.question!r}")

    @property
    def has_name(self) -> bool:
        """Whether both texts name the key."""
        return "{name}" in self.needle and "{name}" in self.question


# A question ends with the very words that stand before the value in the needle.
SINGLE = NeedleTemplate(needle=" The key pass={value}. ", question=" The key pass=")
MULTI = NeedleTemplate(needle=" The key {name}={value}. ", question=" The key {name}=")


class Needle(NamedTuple):
    """A needle with its value, as tokens."""

    name: str
    """The name of its key; empty for a single needle."""
    ids: np.ndarray
    """Its text, int64, shape (num_tokens,)."""
    question: np.ndarray
    """The question for it, int64, shape (num_question_tokens,)."""
    answer: np.ndarray
    """Its value, as in ``ids``, int64, shape (num_answer_tokens,)."""
    value_start: int
    """Where in ``ids`` the value starts."""


class NeedleEncoder:
    """Makes needles as tokens: fixed texts, names and number of digits, encoded once."""

    def __init__(
        self,
        template: NeedleTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        names: tuple[str, ...],
        num_digits: int,
    ) -> None:
        """Encode ``template`` for each of ``names``; ``("",)`` is for needles without a name."""
        before, after = template.needle.split("{value}")
        self._names = names
        self._num_digits = num_digits
        self._before_value = template.before_value
        self._tokenizer = tokenizer
        self._is_bytes = is_byte_tokenizer(tokenizer)
        self._before = self._encode_for_names(before)
        self._after = self._encode_for_names(after)
        self._questions = self._encode_for_names(template.question)

    def draw(self, rng: np.random.Generator, num_keys: int) -> list[Needle]:
        """Return ``num_keys`` needles with different random names and different random values.

        Each value is encoded on its own, so that its borders are token borders.
        """
        numbers = rng.choice(10**self._num_digits, size=num_keys, replace=False).tolist()
        answers = self._encode_values([f"{number:0{self._num_digits}d}" for number in numbers])
        chosen = rng.permutation(len(self._names))[:num_keys].tolist()
        return [
            Needle(
                name=self._names[number],
                ids=np.concatenate((self._before[number], answer, self._after[number])),
                question=self._questions[number],
                answer=answer,
                value_start=len(self._before[number]),
            )
            for number, answer in zip(chosen, answers, strict=True)
        ]

    def largest(self, num_keys: int) -> Sizes:
        """Return the sizes that no draw of ``num_keys`` needles exceeds."""
        first_digits = self._encode_values(list("0123456789"))
        # A digit more is at most a token more.
        answer = max(len(ids) for ids in first_digits) + self._num_digits - 1
        pairs = zip(self._before, self._after, strict=True)
        needles = sorted(len(before) + answer + len(after) for before, after in pairs)
        question = max(len(ids) for ids in self._questions)
        return Sizes(hidden=sum(needles[-num_keys:]), question=question, answer=answer)

    def _encode_for_names(self, text: str) -> list[np.ndarray]:
        return [encode(self._tokenizer, text.replace("{name}", name)) for name in self._names]

    def _encode_values(self, values: list[str]) -> list[np.ndarray]:
        texts = [self._before_value + value for value in values]
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        return [np.array(ids, dtype=np.int64) for ids in encode_batch(self._tokenizer, texts)]
