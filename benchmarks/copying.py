"""What is there to gain from the context of a text, and how much of it do models take?

    python benchmarks/copying.py DATA MODEL... [--lengths 1024 16384] [--json PATH]

First: stretches of 512 tokens of a prepared split are predicted by each model from 1,024 tokens,
alone and mixed with a copy model that learns nothing: where the last 4 to 24 tokens stood before
within the last N, what followed them there follows again. The mixture's weights, by length of the
match and number and agreement of its followers, are fitted on every other document and measured on
the rest, and the other way round. Second: 96 tokens of a text are put into it once more, D tokens
later; bits of their last 72, the first time and the second. A model that copies over that distance
loses little the second time. DATA is a folder that `drt data prepare` wrote, MODEL what `drt eval`
takes.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import hardware_line, parser, print_table, write_json
from drt.checkpoints import load_checkpoint
from drt.data.prepared import PreparedSplit
from drt.evaluation.windows import Window, choose_excerpts, choose_targets, shorten
from drt.loss import losses_of_logits

STRIDE = 512
ORDERS = (24, 16, 12, 8, 6, 5, 4)
# Of a match that stands many times before, the latest followers.
FOLLOWERS = 64
ROUNDS = 50
# Tokens before what is put in twice, of it, and of it until a repetition can be told.
LEAD, SPAN, TOLD = 128, 96, 24


class Copies(NamedTuple):
    """What a copy model says of tokens, one number a token; of stretches, each array is (n, S)."""

    share: np.ndarray
    """float64, the share of the match's followers that are the token; 0 without a match."""
    kind: np.ndarray
    """int64, matches of one kind share a weight; 0 = no match."""


def find_copies(row: np.ndarray, scored: int) -> Copies:
    """What follows where the tokens before each of a row's last `scored` ones stood before."""
    tokens, width = row.tolist(), row.itemsize
    data = np.ascontiguousarray(row).tobytes()
    seen: dict[bytes, list[int]] = defaultdict(list)
    found = []
    for at in range(len(tokens)):
        # As bytes, matches of different lengths are different keys.
        keys = [data[(at - order) * width : at * width] for order in ORDERS if order <= at]
        if at >= len(tokens) - scored:
            match = next((key for key in keys if key in seen), None)
            found.append((0.0, 0) if match is None else _copy(tokens, at, match, seen[match]))
        for key in keys:
            seen[key].append(at)
    shares, kinds = zip(*found, strict=True)
    return Copies(np.array(shares), np.array(kinds))


def _copy(tokens: list[int], at: int, match: bytes, followers: list[int]) -> tuple[float, int]:
    counts = Counter(tokens[each] for each in followers[-FOLLOWERS:])
    total = counts.total()
    # Tokens of a split have two or four bytes: the length tells matches of one split apart.
    kind = 6 * len(match) + 2 * min(total, 3) + (len(counts) == 1)
    return counts[tokens[at]] / total, kind


def mixed(chances: np.ndarray, copies: Copies, fold: np.ndarray) -> np.ndarray:
    """(n, S) chances of the tokens by the mixture, the weights of each fold from the other."""
    found = chances.copy()
    for kind in np.unique(copies.kind[copies.kind > 0]):
        alike = copies.kind == kind
        for here in (alike & fold[:, None], alike & ~fold[:, None]):
            there = alike & ~here
            weight = _weight(chances[there], copies.share[there])
            found[here] = (1 - weight) * chances[here] + weight * copies.share[here]
    return found


def _weight(chances: np.ndarray, shares: np.ndarray) -> float:
    """The copy model's weight that makes the tokens likeliest, by expectation-maximization."""
    # With nothing to learn from, little.
    weight = 0.1
    for _ in range(ROUNDS if len(chances) else 0):
        weighed = weight * shares
        weight = float((weighed / (weighed + (1 - weight) * chances)).mean())
    # A token that no copy foretold must stay possible.
    return min(weight, 0.999)


@torch.no_grad()
def chances_of(model: Any, rows: list[np.ndarray], scored: int) -> np.ndarray:
    """(n, S) chances that a causal LM gives the last `scored` tokens of each row."""
    found = []
    for row in rows:
        ids = torch.from_numpy(row.astype(np.int64))[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, -scored - 1 : -1]
        losses = losses_of_logits(logits, ids[0, -scored:])
        found.append(losses.double().neg().exp().cpu().numpy())
    return np.stack(found)


def bits(chances: np.ndarray) -> float:
    return -float(np.log2(chances).mean())


class Text:
    """Stretches of a split, and what the copy model says of them from so many tokens.

    Raises:
        ValueError: no document is long enough, or only one.
    """

    def __init__(self, split: PreparedSplit, lengths: list[int], *, targets: int) -> None:
        excerpts = choose_excerpts(split, min_tokens=2, longest=max(lengths))
        self.split = split
        self.windows = choose_targets(
            excerpts, longest=max(lengths), stride=STRIDE, max_targets=targets
        )
        documents = np.array([window.document for window in self.windows])
        numbers = np.unique(documents)
        if len(numbers) < 2:
            raise ValueError(f"{max(lengths):,} tokens are in one document only; two are needed")
        self.fold = np.isin(documents, numbers[::2])
        self.copies = {length: self._copies(length) for length in sorted(lengths)}

    def rows(self, length: int) -> list[np.ndarray]:
        """Each stretch with what is before it, `length` tokens in all."""
        windows: list[Window] = shorten(self.windows, length)
        return [self.split.document(x.document).tokens[x.start : x.stop] for x in windows]

    def _copies(self, length: int) -> Copies:
        found = [find_copies(row, STRIDE) for row in self.rows(length)]
        return Copies(*map(np.stack, zip(*found, strict=True)))

    def gains(self, chances: np.ndarray) -> dict[int, float]:
        """Bits with the copies of each length."""
        return {n: bits(mixed(chances, copies, self.fold)) for n, copies in self.copies.items()}


def planted(model: Any, text: Text, distance: int, *, count: int) -> dict[str, float]:
    """Bits of what is put into a text once more so many tokens later, both times."""
    length, rows = LEAD + distance + SPAN, []
    for window in text.windows[:: max(len(text.windows) // count, 1)]:
        row = text.split.document(window.document).tokens[window.start : window.start + length]
        if len(row) == length:
            rows.append(np.concatenate([row[: LEAD + distance], row[LEAD : LEAD + SPAN]]))
    if not rows:
        raise ValueError(
            f"no stretch of the split has {length:,} tokens, for distance {distance:,}"
        )
    chances = chances_of(model, rows, distance + SPAN)
    first, second = (chances[:, at + TOLD : at + SPAN] for at in (0, distance))
    return {"distance": distance, "first": bits(first), "second": bits(second)}


def main(words: list[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="a prepared split")
    arguments.add_argument("models", nargs="+", help="runs, saved models or names on the hub")
    arguments.add_argument("--context", type=int, default=1024, help="tokens that a model reads")
    arguments.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    arguments.add_argument("--targets", type=int, default=128, help="stretches")
    arguments.add_argument("--distances", type=int, nargs="+", default=[96, 192, 384, 768, 3072])
    options = arguments.parse_args(words)
    if min(options.context, *options.lengths) <= STRIDE:
        arguments.error(f"contexts must be longer than a stretch, {STRIDE} tokens")
    if min(options.distances) < SPAN:
        arguments.error(f"distances must be at least {SPAN}, what is put in twice")
    print(hardware_line())
    targets = min(options.targets, 32) if options.quick else options.targets
    text = Text(PreparedSplit(options.data), options.lengths, targets=targets)
    records: dict[str, Any] = {}
    for name in options.models:
        model = load_checkpoint(name).model
        chances = chances_of(model, text.rows(options.context), STRIDE)
        twice = [planted(model, text, each, count=targets // 4) for each in options.distances]
        records[name] = {
            "alone": bits(chances),
            "with_copies": text.gains(chances),
            "planted": twice,
        }
    head = ["model", "alone", *(f"+ copies of the last {length:,}" for length in text.copies)]
    rows = [
        [name, *(f"{x:.4f}" for x in (each["alone"], *each["with_copies"].values()))]
        for name, each in records.items()
    ]
    print_table(f"Bits a token, {len(text.windows)} stretches", head, rows)
    head = ["model", *(f"{distance:,} later" for distance in options.distances)]
    rows = [
        [name, *(f"{x['first']:.2f} to {x['second']:.2f}" for x in each["planted"])]
        for name, each in records.items()
    ]
    print_table("Bits a token of what stands in the text twice", head, rows)
    write_json(options.json, {"models": records})


if __name__ == "__main__":
    main()
