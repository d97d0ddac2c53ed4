"""Perplexity on a prepared split: by context length, with the same targets, and by position."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from drt.checkpoints import Checkpoint
from drt.data.prepared import PreparedSplit
from drt.evaluation.document_losses import ScoredWindows, compare_rows, sum_by_document
from drt.evaluation.pictures import short_length
from drt.evaluation.progress import token_bar
from drt.evaluation.reading import check_length
from drt.evaluation.text_counts import Spelling
from drt.evaluation.token_losses import book_nats, window_nats
from drt.evaluation.windows import (
    Excerpt,
    Window,
    choose_excerpts,
    choose_targets,
    cut_windows,
    shorten,
)
from drt.tables import ruled

OVERALL = "overall"
"""What the row of all positions is called."""

_MODES_OF = {
    "lengths": ("segmented", "sliding"),
    "longest_length": ("sliding",),
    "stride": ("sliding",),
    "max_targets": ("sliding",),
    "max_tokens": ("segmented", "book"),
    "first_bucket": ("book",),
}
"""Settings that not every mode reads."""

# The bucket of all positions.
WHOLE = (0, 1 << 62)

FIGURES = {
    "perplexity": "perplexity a token, 95 % interval",
    "ratio_to_shortest": "perplexity by that of the shortest context, 95 % paired interval",
    "perplexity_per_word": "perplexity a word",
    "bits_per_byte": "bits a byte",
}
"""What the table shows, by its name in a record."""


@dataclass(frozen=True)
class PerplexityTask:
    """exp(sum of losses / number of tokens), over all scored tokens of a split.

    No token is put in front of a text. A token that nothing was read before is not scored.
    """

    data: str
    """Folder of a split that `drt data prepare` has written with the model's tokenizer."""
    mode: Literal["segmented", "sliding", "book"] = "segmented"
    """segmented: windows of `lengths` tokens, each read from nothing, all tokens but the first of
    each scored; what remains at a document's end is a shorter window. sliding: the same tokens for
    every length, each stretch of `stride` at the end of a window of that length. book: each
    document read once from its start to its end, scored by position."""
    lengths: list[int] = field(default_factory=lambda: [1024])
    """Tokens of a window, what is scored of it included; not of books."""
    longest_length: int | None = None
    """Sliding windows are chosen as if this were the longest of `lengths`; None = it is none. So a
    model that reads fewer lengths is scored on the same tokens as others."""
    stride: int | None = None
    """Tokens of a stretch that sliding windows are scored on; None = half the shortest length."""
    max_targets: int = 256
    """At most so many stretches of sliding windows, shared out evenly over the documents."""
    max_documents: int | None = None
    """At most so many documents, evenly spaced in the order of the split; None = all."""
    max_document_tokens: int | None = None
    """At most so many tokens of each document, from its start; None = all."""
    max_tokens: int | None = None
    """At most so many tokens in all, of segmented text and books, in equal shares a document."""
    first_bucket: int = 1024
    """Positions of a book below this are one bucket; from there on each reaches twice as far."""
    batch_tokens: int = 2048
    """Windows are run side by side while they have at most so many tokens together; a window that
    has more by itself is read in segments."""
    segment_size: int = 4096
    """Tokens of one forward where a text is read in segments."""
    beyond_limit: bool = False
    """Whether rotary positions may go on beyond the model's `max_position_embeddings`."""
    num_resamples: int = 1000
    """Resamples of the bootstrap over documents."""
    seed: int = 0
    """Seed of the bootstrap."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            numbers = value if isinstance(value, list) else [value]
            if name != "seed" and any(
                isinstance(x, int) and not isinstance(x, bool) and x < 1 for x in numbers
            ):
                raise ValueError(f"{name} must be at least 1, got {value}")
        shortest = min(self.lengths, default=0)
        if shortest < 2:
            raise ValueError(f"lengths must be of at least 2 tokens, got {self.lengths}")
        if self.first_bucket < 2:
            raise ValueError(f"first_bucket must be at least 2 tokens, got {self.first_bucket}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for item in fields(self):
            modes, value = _MODES_OF.get(item.name, (self.mode,)), getattr(self, item.name)
            default = item.default if item.default_factory is MISSING else item.default_factory()
            if self.mode not in modes and value != default:
                raise ValueError(
                    f"{item.name} is {value}, which mode {self.mode} does not read: it is of mode "
                    f"{' and '.join(modes)}"
                )
        if self.longest_length is not None and self.longest_length < max(self.lengths):
            raise ValueError(
                f"longest_length is {self.longest_length}: it must be at least the longest of "
                f"lengths, {max(self.lengths)}"
            )
        if self.stride is not None and self.stride >= shortest:
            raise ValueError(f"stride is {self.stride}: it must be below the length {shortest}")

    @property
    def scored(self) -> dict[str, Any]:
        """What decides which tokens are scored: tasks that agree in it can be compared."""
        names = ["data", "mode", "max_documents", "max_document_tokens"]
        chosen: dict[str, Any] = {}
        if self.mode == "sliding":
            names += ["max_targets"]
            chosen = {"stride": self._stride, "longest_length": self._longest}
        else:
            names += ["max_tokens"]
        return {name: getattr(self, name) for name in names} | chosen

    @property
    def _longest(self) -> int:
        return self.longest_length or max(self.lengths)

    @property
    def _stride(self) -> int:
        return self.stride or min(self.lengths) // 2

    def check_data(self) -> None:
        """Raise the ValueError of `evaluate` if there is no such split, or it has no long texts."""
        self._excerpts(PreparedSplit(self.data))

    def check_model(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """Raise the ValueErrors of `evaluate`."""
        excerpts = self._excerpts(PreparedSplit(self.data, tokenizer=tokenizer))
        self._check_length(config, excerpts)

    def evaluate(self, checkpoint: Checkpoint, *, title: str) -> dict[str, Any]:
        """Score a model.

        Args:
            checkpoint: a causal LM and its tokenizer.
            title: of the progress bar.

        Returns:
            A record, ready for JSON: `rows`, one for each length or bucket of positions, and of
            books `overall`, each with counts, perplexity a token, a word and a byte, the sums of
            each document (see `DocumentLosses.figures`), and how much of the split it does not
            score. A word counts where it starts. Rows of sliding windows have `ratio_to_shortest`
            with its paired interval too: whether more context helps.

        Raises:
            ValueError: no such split, another tokenizer's, no document is as long as the longest
                length, or a length is beyond the model's positions.
        """
        split = PreparedSplit(self.data, tokenizer=checkpoint.tokenizer)
        checkpoint.model.eval()
        excerpts = self._excerpts(split)
        self._check_length(checkpoint.model.config, excerpts)
        with checkpoint.autocast():
            if self.mode == "book":
                scored = self._score_books(checkpoint.model, split, excerpts, title)
            else:
                scored = self._score_windows(checkpoint.model, split, excerpts, title)
        rows = self._rows(scored, split, Spelling(checkpoint.tokenizer))
        if self.mode == "sliding":
            rows = [{**row, **self._against(row, rows[0])} for row in rows]
        return {
            "task": "perplexity",
            "mode": self.mode,
            "settings": asdict(self),
            "precision": checkpoint.precision,
            "parameters": checkpoint.model.num_parameters(),
            "data_sha256": _data_sha256(split),
            "rows": [row for row in rows if row["label"] != OVERALL],
            "overall": next((row for row in rows if row["label"] == OVERALL), None),
        }

    @staticmethod
    def table(records: dict[str, dict[str, Any]]) -> str:
        """A plain-text table for each mode and figure: a row a model, a column a length.

        Args:
            records: what `evaluate` returned, by the name of the model.
        """
        parts = []
        for mode in dict.fromkeys(record["mode"] for record in records.values()):
            alike = {name: record for name, record in records.items() if record["mode"] == mode}
            parts += [_table(alike, figure, f"{mode}, {text}") for figure, text in FIGURES.items()]
        return "\n\n".join(part for part in parts if part)

    @staticmethod
    def draw(records: dict[str, dict[str, Any]], path: Path) -> None:
        """Draw perplexity with its intervals by context length, or of books by position.

        Args:
            records: what `evaluate` returned, by the name of the model; of one mode.
            path: where to; its ending chooses the format.

        Raises:
            ValueError: there are no records, or they are of several modes.
        """
        from drt.evaluation.length_figures import draw_perplexity

        draw_perplexity(records, path)

    def _excerpts(self, split: PreparedSplit) -> list[Excerpt]:
        longest = 2 if self.mode == "book" else self._longest
        return choose_excerpts(
            split,
            min_tokens=longest if self.mode == "sliding" else 2,
            longest=longest,
            max_documents=self.max_documents,
            max_document_tokens=self.max_document_tokens,
            max_tokens=self.max_tokens,
        )

    def _check_length(self, config: PreTrainedConfig, excerpts: list[Excerpt]) -> None:
        """Refuse what a model has no positions for, before anything is read."""
        is_whole = self.mode == "book"
        longest = max(x.num_tokens for x in excerpts) if is_whole else max(self.lengths)
        check_length(config, longest, beyond_limit=self.beyond_limit)

    def _windows(self, excerpts: list[Excerpt]) -> dict[int, list[Window]]:
        """What is read at each length."""
        lengths = sorted(set(self.lengths))
        if self.mode == "segmented":
            return {length: cut_windows(excerpts, length) for length in lengths}
        targets = choose_targets(
            excerpts,
            longest=self._longest,
            stride=self._stride,
            max_targets=self.max_targets,
        )
        return {length: shorten(targets, length) for length in lengths}

    def _score_windows(
        self, model: Any, split: PreparedSplit, excerpts: list[Excerpt], title: str
    ) -> list[ScoredWindows]:
        """A row for each length, shortest first."""
        plan = self._windows(excerpts)
        scored = []
        total = sum(x.num_tokens for windows in plan.values() for x in windows)
        with token_bar(title, total) as bar:
            for length, windows in plan.items():
                bar.set_postfix(length=length, refresh=False)
                nats = window_nats(
                    model,
                    split,
                    windows,
                    batch_tokens=self.batch_tokens,
                    segment_size=self.segment_size,
                    beyond_limit=self.beyond_limit,
                    on_tokens=bar.update,
                )
                place = {
                    "label": short_length(length),
                    "length": length,
                    "num_windows": len(windows),
                    "num_full_windows": sum(x.num_tokens == length for x in windows),
                }
                scored.append(ScoredWindows(place, windows, nats))
        return scored

    def _score_books(
        self, model: Any, split: PreparedSplit, excerpts: list[Excerpt], title: str
    ) -> list[ScoredWindows]:
        """A row for each bucket of positions, and one for all."""
        found: dict[tuple[int, int], list[tuple[Window, float]]] = {}
        with token_bar(title, sum(excerpt.num_tokens for excerpt in excerpts)) as bar:
            for excerpt in excerpts:
                losses = book_nats(
                    model,
                    split,
                    excerpt,
                    segment_size=self.segment_size,
                    beyond_limit=self.beyond_limit,
                    on_tokens=bar.update,
                )
                for first, end in [*_buckets(self.first_bucket, excerpt.num_tokens), WHOLE]:
                    # Nothing predicts a book's first token.
                    start, stop = max(first, 1), min(end, excerpt.num_tokens)
                    window = Window(excerpt.document, 0, start, stop)
                    pair = window, float(losses[start:stop].sum())
                    found.setdefault((first, end), []).append(pair)
        return [_scored_bucket(edges, found[edges]) for edges in sorted(found)]

    def _rows(
        self, scored: list[ScoredWindows], split: PreparedSplit, spelling: Spelling
    ) -> list[dict[str, Any]]:
        rows = []
        for row, losses in zip(scored, sum_by_document(scored, split, spelling), strict=True):
            not_scored = {
                "documents": split.num_documents - len(losses.documents),
                "tokens": split.num_tokens - int(losses.tokens.sum()),
            }
            figures = losses.figures(num_resamples=self.num_resamples, seed=self.seed)
            marks = {"not_scored": not_scored, "scored_sha256": row.digest()}
            rows.append({**row.place, **figures, **marks})
        return rows

    def _against(self, row: dict[str, Any], shortest: dict[str, Any]) -> dict[str, Any]:
        seed, num_resamples = self.seed, self.num_resamples
        found = compare_rows([row], [shortest], num_resamples=num_resamples, seed=seed)
        return {
            "ratio_to_shortest": found["ratio"],
            "ratio_to_shortest_interval": found["interval"],
        }


def _buckets(first: int, length: int) -> list[tuple[int, int]]:
    """Positions 0 to `first`, and then twice as far each time, until `length` is covered."""
    edges = [(0, first)]
    while edges[-1][1] < length:
        edges.append((edges[-1][1], 2 * edges[-1][1]))
    return edges


def _scored_bucket(edges: tuple[int, int], found: list[tuple[Window, float]]) -> ScoredWindows:
    first, end = edges
    label = f"{short_length(first) if first else 0}-{short_length(end)}"
    place = {"label": label, "from": first, "to": end}
    windows, nats = zip(*found, strict=True)
    return ScoredWindows(
        {"label": OVERALL} if edges == WHOLE else place, list(windows), np.array(nats)
    )


def _data_sha256(split: PreparedSplit) -> str:
    """A hash of the split's tokens and documents."""
    digests = [sorted(shard.sha256.items()) for shard in split.manifest.shards]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _table(records: dict[str, dict[str, Any]], figure: str, title: str) -> str:
    """One figure of several models, or nothing where none has it."""
    rows = {name: _table_rows(record) for name, record in records.items()}
    labels = list(dict.fromkeys(label for found in rows.values() for label in found))
    cells = {
        name: [_cell(found.get(label), figure) for label in labels] for name, found in rows.items()
    }
    if all(cell == "-" for line in cells.values() for cell in line):
        return ""
    lines = [["model", *labels], *([name, *line] for name, line in cells.items())]
    return f"{title}\n{ruled(lines)}"


def _table_rows(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = [*record["rows"], *([record["overall"]] if record["overall"] else [])]
    return {row["label"]: row for row in rows}


def _cell(row: dict[str, Any] | None, figure: str) -> str:
    value = None if row is None else row.get(figure)
    if row is None or value is None:
        return "-"
    interval = row.get(f"{figure}_interval")
    return _number(value) + ("" if interval is None else f" ({'-'.join(map(_number, interval))})")


def _number(value: float) -> str:
    """Three decimals, or four digits of what is large."""
    return f"{value:.3f}" if value < 1e5 else f"{value:.3e}"
