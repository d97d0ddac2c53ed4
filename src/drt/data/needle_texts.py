"""The texts of needle tasks, and needles as tokens."""

from collections.abc import Sequence
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
    joint: str = " "
    """Text between the values of an answer that has several, and between names asked at once."""

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


class Fact(NamedTuple):
    """A hidden text as tokens."""

    ids: np.ndarray
    """Its text, int64, shape (num_tokens,)."""
    needed: tuple[int, int]
    """Start and end (exclusive) of those of its tokens that an answer cannot do without."""


class Query(NamedTuple):
    """What may be asked about the facts of a row, as tokens."""

    name: str
    """What is asked for; empty for a single needle."""
    facts: tuple[int, ...]
    """The numbers of the facts that the answer needs, in the order of the answer."""
    question: np.ndarray
    """The text that the answer follows, int64, shape (num_question_tokens,)."""
    answer: np.ndarray
    """All tokens of the answer, int64, shape (num_answer_tokens,)."""
    is_value: np.ndarray
    """False at those of ``answer`` that only join one value to the next, bool, of its shape."""


class Hidden(NamedTuple):
    """The facts of a row, and what may be asked about them."""

    facts: list[Fact]
    """What is hidden."""
    queries: list[Query]
    """What may be asked, in the order in which it was drawn."""
    in_order: tuple[tuple[int, ...], ...] = ()
    """Sets of facts, by number, each of which must stand in the row in the order given here."""


class ValueEncoder:
    """Makes values tokens, each on its own, so that it is the same tokens wherever it stands."""

    def __init__(self, template: NeedleTemplate, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take what stands before and between values from ``template``."""
        self._before_value = template.before_value
        self._tokenizer = tokenizer
        self._is_bytes = is_byte_tokenizer(tokenizer)
        self.joint = encode(tokenizer, template.joint)

    def encode(self, values: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of each value, int64, shape (num_tokens,)."""
        texts = [self._before_value + value for value in values]
        if self._is_bytes:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]
        return [np.array(ids, dtype=np.int64) for ids in encode_batch(self._tokenizer, texts)]

    def join(self, values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return encoded values with joints between, and a mask that is False at the joints."""
        ids, is_value = [values[0]], [np.ones(len(values[0]), dtype=np.bool_)]
        for value in values[1:]:
            ids += [self.joint, value]
            is_value += [np.zeros(len(self.joint), np.bool_), np.ones(len(value), np.bool_)]
        return np.concatenate(ids), np.concatenate(is_value)

    def largest(self, characters: str, width: int) -> int:
        """Return how many tokens no value of ``width`` of these characters exceeds."""
        # A character more is at most a token more.
        return max(len(ids) for ids in self.encode(list(characters))) + width - 1

    def largest_joined(self, value: int, count: int) -> int:
        """Return the tokens of ``count`` values of ``value`` tokens each with their joints."""
        return count * value + (count - 1) * len(self.joint)


class NeedleEncoder:
    """Makes needles as tokens: fixed texts, names and number of digits, encoded once."""

    def __init__(
        self,
        template: NeedleTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        names: tuple[str, ...],
        num_digits: int,
        num_keys: int,
        num_queries: int = 1,
        num_questions: int = 1,
    ) -> None:
        """Encode ``template`` for each of ``names``; ``("",)`` is for needles without a name.

        Args:
            template: the texts.
            tokenizer: makes them tokens.
            names: those that keys may have.
            num_digits: decimal digits of a value.
            num_keys: needles of a row.
            num_queries: keys that one question asks for.
            num_questions: how many questions are drawn if they ask for several keys.
        """
        before, after = template.needle.split("{value}")
        self._names = names
        self._num_digits = num_digits
        self._num_keys, self._num_queries = num_keys, num_queries
        self._num_questions = num_questions
        self._tokenizer = tokenizer
        self._values = ValueEncoder(template, tokenizer)
        self._before = self._encode_for_names(before)
        self._after = self._encode_for_names(after)
        if num_queries == 1:
            self._questions = self._encode_for_names(template.question)
        else:
            head, _, tail = template.question.partition("{name}")
            self._first_names = self._encode_for_names(head + "{name}")
            self._more_names = self._encode_for_names(template.joint + "{name}")
            self._tail = encode(tokenizer, tail)

    def draw(self, rng: np.random.Generator) -> Hidden:
        """Return needles with different random names and different random values.

        A query asks for each of them, or, where a question asks for several, for random ones.
        """
        drawn = rng.choice(10**self._num_digits, size=self._num_keys, replace=False).tolist()
        values = self._values.encode([f"{number:0{self._num_digits}d}" for number in drawn])
        names = rng.permutation(len(self._names))[: self._num_keys].tolist()
        facts = []
        for name, value in zip(names, values, strict=True):
            before = self._before[name]
            ids = np.concatenate((before, value, self._after[name]))
            facts.append(Fact(ids, (len(before), len(before) + len(value))))
        queries = [self._query(keys, names, values) for keys in self._draw_keys(rng)]
        return Hidden(facts, queries)

    def largest(self) -> Sizes:
        """Return the sizes that no draw exceeds."""
        value = self._values.largest("0123456789", self._num_digits)
        pairs = zip(self._before, self._after, strict=True)
        needles = sorted(len(before) + value + len(after) for before, after in pairs)
        return Sizes(
            hidden=sum(needles[-self._num_keys :]),
            question=self._largest_question(),
            answer=self._values.largest_joined(value, self._num_queries),
        )

    def _draw_keys(self, rng: np.random.Generator) -> list[tuple[int, ...]]:
        """Return which keys each query asks for, no two queries for the same in one order."""
        if self._num_queries == 1:
            return [(key,) for key in range(self._num_keys)]
        drawn = (
            tuple(rng.permutation(self._num_keys)[: self._num_queries].tolist())
            for _ in range(self._num_questions)
        )
        return list(dict.fromkeys(drawn))

    def _query(self, keys: tuple[int, ...], names: list[int], values: list[np.ndarray]) -> Query:
        asked = [names[key] for key in keys]
        answer, is_value = self._values.join([values[key] for key in keys])
        return Query(
            name=" ".join(self._names[name] for name in asked),
            facts=keys,
            question=self._question(asked),
            answer=answer,
            is_value=is_value,
        )

    def _question(self, asked: list[int]) -> np.ndarray:
        if self._num_queries == 1:
            return self._questions[asked[0]]
        # Names with what stands before them, as in needles: a BPE may join the two.
        more = [self._more_names[name] for name in asked[1:]]
        return np.concatenate((self._first_names[asked[0]], *more, self._tail))

    def _largest_question(self) -> int:
        if self._num_queries == 1:
            return max(len(ids) for ids in self._questions)
        first = max(len(ids) for ids in self._first_names)
        more = max(len(ids) for ids in self._more_names)
        return first + (self._num_queries - 1) * more + len(self._tail)

    def _encode_for_names(self, text: str) -> list[np.ndarray]:
        return [encode(self._tokenizer, text.replace("{name}", name)) for name in self._names]
