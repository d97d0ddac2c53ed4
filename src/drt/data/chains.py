"""Chains of facts: an answer that takes several of them, each found by what the last one said.

``hops`` are the 2-hop needles of arXiv 2410.01651, section 4.3 (``DEF a->b``, ``DEF b->c``, the
path from a is asked); ``variables`` is variable tracking as in RULER (arXiv 2404.06654): a number
goes to a variable, that to another, and all that have the number are asked for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase, digits
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.needle_texts import NAMES, Fact, Hidden, NeedleTemplate, Query, ValueEncoder
from drt.data.placement import Sizes
from drt.data.tokenization import encode

HOPS = NeedleTemplate(needle=" DEF {name}>{value}. ", question=" PATH {name}>", joint=">")
VARIABLES = NeedleTemplate(needle=" VAR {name}={value}. ", question=" ALL VAR={name}: ")

SymbolKind = Literal["names", "digits", "letters"]
# More would not fit in the 64 bits that a random number has.
MAX_LETTERS = 13
_CHARACTERS = {"digits": digits, "letters": ascii_lowercase}


@dataclass(frozen=True)
class Symbols:
    """What the links of chains are called."""

    kind: SymbolKind
    """``names``: of ``NAMES``. ``digits``, ``letters``: random ones."""
    num_names: int
    """How many of ``NAMES``, from the front, are in use."""
    width: int
    """Characters of a symbol of digits or letters; at most ``MAX_LETTERS`` letters."""

    @property
    def count(self) -> int:
        """How many different symbols there are."""
        if self.kind == "names":
            return self.num_names
        return len(_CHARACTERS[self.kind]) ** self.width

    def draw(self, rng: np.random.Generator, count: int) -> list[str]:
        """Return ``count`` different symbols."""
        numbers = rng.choice(self.count, size=count, replace=False).tolist()
        if self.kind == "names":
            return [NAMES[number] for number in numbers]
        characters = _CHARACTERS[self.kind]
        return [_spell(number, characters, self.width) for number in numbers]

    def largest(self, encoder: ValueEncoder) -> int:
        """Return how many tokens no symbol exceeds."""
        if self.kind == "names":
            return max(len(ids) for ids in encoder.encode(NAMES[: self.num_names]))
        return encoder.largest(_CHARACTERS[self.kind], self.width)


class Chain(NamedTuple):
    """Facts that follow from one another."""

    start: str
    """What the question gives."""
    facts: tuple[tuple[str, str], ...]
    """Name and value of each fact, in the order in which they are followed."""
    answer: tuple[str, ...]
    """What the facts lead to, one symbol a fact."""


def draw_paths(
    rng: np.random.Generator, symbols: Symbols, *, num_chains: int, num_hops: int
) -> list[Chain]:
    """Return chains a, b, c, ... with the facts (a, b), (b, c), ...; no symbol is in two chains."""
    size = num_hops + 1
    drawn = symbols.draw(rng, num_chains * size)
    paths = [drawn[first : first + size] for first in range(0, len(drawn), size)]
    return [Chain(path[0], tuple(pairwise(path)), tuple(path[1:])) for path in paths]


def draw_assignments(
    rng: np.random.Generator,
    symbols: Symbols,
    numbers: Symbols,
    *,
    num_chains: int,
    num_hops: int,
) -> list[Chain]:
    """Return chains of variables: the first gets a number, each other one the one before it.

    No variable and no number is in two chains.
    """
    size = num_hops + 1
    drawn = symbols.draw(rng, num_chains * size)
    chains = []
    for chain, number in enumerate(numbers.draw(rng, num_chains)):
        variables = drawn[chain * size : (chain + 1) * size]
        facts = tuple(zip(variables, [number, *variables[:-1]], strict=True))
        chains.append(Chain(number, facts, tuple(variables)))
    return chains


class ChainEncoder:
    """Makes chains as tokens: fixed texts and symbols, all encoded apart."""

    def __init__(
        self,
        template: NeedleTemplate,
        tokenizer: PreTrainedTokenizerBase,
        *,
        draw_chains: Callable[[np.random.Generator], list[Chain]],
        symbols: Sequence[Symbols],
        ordered: bool,
    ) -> None:
        """Encode the texts around the symbols.

        Args:
            template: the texts; ``{name}`` stands once in each, in the needle before ``{value}``.
            tokenizer: makes them tokens.
            draw_chains: makes the chains of a row; as many of as many facts each time.
            symbols: what they are made of.
            ordered: whether a chain's facts stand in the row in the order of the chain.
        """
        before, _, rest = template.needle.partition("{name}")
        parts = (before, *rest.split("{value}"))
        self._before, self._middle, self._after = (encode(tokenizer, part) for part in parts)
        head, _, tail = template.question.partition("{name}")
        self._head, self._tail = encode(tokenizer, head), encode(tokenizer, tail)
        self._values = ValueEncoder(template, tokenizer)
        self._draw_chains = draw_chains
        self._largest_symbol = max(each.largest(self._values) for each in symbols)
        self._ordered = ordered

    def draw(self, rng: np.random.Generator) -> Hidden:
        """Return the facts of all chains of a row, chain by chain, and a query for each chain."""
        facts: list[Fact] = []
        queries: list[Query] = []
        for chain in self._draw_chains(rng):
            numbers = tuple(range(len(facts), len(facts) + len(chain.facts)))
            facts += [self._fact(*self._values.encode(pair)) for pair in chain.facts]
            queries.append(self._query(chain, numbers))
        in_order = tuple(query.facts for query in queries) if self._ordered else ()
        return Hidden(facts, queries, in_order)

    def largest(self) -> Sizes:
        """Return the sizes that no draw exceeds."""
        # Any draw tells how many facts there are.
        chains = self._draw_chains(np.random.default_rng(0))
        around = len(self._before) + len(self._middle) + len(self._after)
        return Sizes(
            hidden=sum(len(chain.facts) for chain in chains) * (around + 2 * self._largest_symbol),
            question=len(self._head) + self._largest_symbol + len(self._tail),
            answer=self._values.largest_joined(self._largest_symbol, len(chains[0].answer)),
        )

    def _fact(self, name: np.ndarray, value: np.ndarray) -> Fact:
        ids = np.concatenate((self._before, name, self._middle, value, self._after))
        return Fact(ids, (len(self._before), len(ids) - len(self._after)))

    def _query(self, chain: Chain, facts: tuple[int, ...]) -> Query:
        start, *symbols = self._values.encode([chain.start, *chain.answer])
        answer, is_value = self._values.join(symbols)
        question = np.concatenate((self._head, start, self._tail))
        return Query(chain.start, facts, question, answer, is_value)


def check_chain_template(template: NeedleTemplate) -> None:
    """Raise ValueError for texts in which a chain cannot be told."""
    needle, question = template.needle, template.question
    once = needle.count("{name}") == question.count("{name}") == 1
    if not once or needle.index("{name}") > needle.index("{value}"):
        raise ValueError(
            f"texts of chains must have {{name}} once, in the needle before {{value}}: {template}"
        )


def _spell(number: int, characters: str, width: int) -> str:
    """``number`` in the base of ``characters``, ``width`` of them."""
    spelt = ""
    for _ in range(width):
        number, last = divmod(number, len(characters))
        spelt = characters[last] + spelt
    return spelt
