"""Training rows from a prepared split, in an order that follows from seed and index alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from drt.data.permutation import Permutation
from drt.data.prepared.split import PreparedSplit
from drt.loss import IGNORED

Documents = Literal["packed", "crossing", "apart"]
"""How documents share rows: one behind another, each with its own id; one behind another as if they
were one text; or never in one row."""

DOCUMENTS: tuple[Documents, ...] = ("packed", "crossing", "apart")

LastPiece = Literal["drop", "pad"]
"""What becomes of the end of a document that fills no row, where documents are apart."""

LAST_PIECES: tuple[LastPiece, ...] = ("drop", "pad")

# Keys of the permutation: of the order of rows, and of where packed rows begin.
_ORDER, _OFFSET = 0, 1


class TokenRows(Dataset[dict[str, torch.Tensor]]):
    """Rows of T tokens, each row once an epoch.

    Row `index` is the same whatever was read before, in whatever process, at whatever batch size:
    going on after a stop takes the number of the next row, and ranks share the indices out.

    Args:
        split: a split, or the folder of one.
        length: tokens of a row T, 2 or more.
        seed: what the order follows from.
        documents: how documents share rows. "packed" and "crossing" cut the tokens of the split
            into rows, and leave out less than a row at its two ends, as much at either as the
            epoch has it; "apart" cuts each document.
        last_piece: for "apart": whether the end of a document that fills no row is dropped, or
            padded on the right.
        num_epochs: how often every row comes, each time in another order.
        tokenizer: what the tokens must have been made with; None = whatever made them.

    Raises:
        ValueError: an argument out of range, another tokenizer, or no row of this length.
    """

    def __init__(
        self,
        split: PreparedSplit | str | Path,
        *,
        length: int,
        seed: int = 0,
        documents: Documents = "packed",
        last_piece: LastPiece = "drop",
        num_epochs: int = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        _check(length, documents, last_piece, num_epochs)
        is_open = isinstance(split, PreparedSplit)
        self.split = split if is_open else PreparedSplit(split, tokenizer=tokenizer)
        self.length, self.seed, self.num_epochs = length, seed, num_epochs
        self.documents: Documents = documents
        self._pads = last_piece == "pad"
        # Rows up to the end of each document, and where each document begins.
        self._row_ends = self._starts = np.empty(0, np.int64)
        if documents == "apart":
            self._cut_documents()
            self.num_rows = int(self._row_ends[-1])
        else:
            self.num_rows = self.split.num_tokens // length
        if not self.num_rows:
            drops = documents == "apart" and not self._pads
            raise ValueError(
                f"{self.split.folder} has no {length} tokens for a row ({documents})"
                + (": no document is as long; last_piece 'pad' keeps short ones" if drops else "")
            )
        self._order: tuple[int, Permutation, int] | None = None

    def __len__(self) -> int:
        return self.num_rows * self.num_epochs

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row `index`, 0 or more, counted through the epochs.

        Returns:
            What `DRTForCausalLM.forward` takes, each (T,) int64: `input_ids`; `labels`, -100 where
            nothing is to be predicted; for "packed" `document_ids`, the numbers of the documents;
            for padded rows `attention_mask`.

        Raises:
            IndexError: the dataset has no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} is not among the {len(self)}")
        start, stop = self.span(index)
        padding = self.length - (stop - start)
        ids = torch.from_numpy(self.split.tokens(start, stop).astype(np.int64))
        ids = torch.nn.functional.pad(ids, (0, padding))
        row = {"input_ids": ids, "labels": ids.clone()}
        if self.documents == "packed":
            numbers = torch.from_numpy(self.split.document_ids(start, stop))
            # No document tells how the next one begins.
            row["labels"][1:][numbers[1:] != numbers[:-1]] = IGNORED
            row["document_ids"] = numbers
        if self._pads:
            row["attention_mask"] = (torch.arange(self.length) < stop - start).long()
            row["labels"][stop - start :] = IGNORED
        return row

    def span(self, index: int) -> tuple[int, int]:
        """The first token of a row in the split, and the one behind its last."""
        epoch, place = divmod(index, self.num_rows)
        order, offset = self._epoch(epoch)
        row = order(place)
        if self.documents != "apart":
            start = offset + row * self.length
            return start, start + self.length
        document = int(self._row_ends.searchsorted(row, side="right"))
        piece = row - (int(self._row_ends[document - 1]) if document else 0)
        start = int(self._starts[document]) + piece * self.length
        return start, min(start + self.length, int(self._starts[document + 1]))

    def _epoch(self, epoch: int) -> tuple[Permutation, int]:
        """The order of an epoch's rows, and the first token of the first row where packed."""
        if self._order is None or self._order[0] != epoch:
            offset = 0
            if self.documents != "apart":
                slack = self.split.num_tokens - self.num_rows * self.length
                offset = Permutation(slack + 1, self.seed, epoch, _OFFSET)(0)
            self._order = (epoch, Permutation(self.num_rows, self.seed, epoch, _ORDER), offset)
        return self._order[1:]

    def _cut_documents(self) -> None:
        lengths = self.split.document_lengths()
        # A single token has nothing to predict.
        rest = (lengths % self.length > 1) if self._pads else 0
        self._row_ends = np.cumsum(lengths // self.length + rest)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])


def _check(length: int, documents: str, last_piece: str, num_epochs: int) -> None:
    if length < 2:
        raise ValueError(f"length is {length}; it must be 2 or more")
    if documents not in DOCUMENTS:
        raise ValueError(f"documents is {documents!r}; it must be one of {DOCUMENTS}")
    if last_piece not in LAST_PIECES:
        raise ValueError(f"last_piece is {last_piece!r}; it must be one of {LAST_PIECES}")
    if last_piece == "pad" and documents != "apart":
        raise ValueError(f"last_piece 'pad' is for documents 'apart', not {documents!r}")
    if num_epochs < 1:
        raise ValueError(f"num_epochs is {num_epochs}; it must be 1 or more")
