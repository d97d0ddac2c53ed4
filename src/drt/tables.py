"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Rows as lines: the first columns to the left, all others to the right.

    Args:
        rows: cells, as many in each row.
        num_left: how many columns are to the left.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:>{width}}" if place >= num_left else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ruled(rows: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """The same as one text, with a line below the first row, the head."""
    head, *rest = aligned(rows, num_left=num_left)
    return "\n".join([head, "-" * len(head), *rest])
