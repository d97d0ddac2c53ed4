"""Where landmarks go: content tokens, positions, chunks and blocks of one segment.

A *segment* is the content given to one forward; a row may be read in any number of them. *Content*
counts tokens, *positions* count tokens and landmarks. A *chunk* is closed by a landmark, after S
tokens or early. A *block* is the run of positions that share one retrieval. Everything downstream
reads the layout and does no arithmetic of its own.
"""

from drt.chunking.cursor import Cursor
from drt.chunking.grid import GridLayout
from drt.chunking.layout import SegmentLayout
from drt.chunking.plan import ChunkRules, Marks, advance_open, plan_segment, stays_open
from drt.chunking.ragged import RaggedLayout

__all__ = [
    "ChunkRules",
    "Cursor",
    "GridLayout",
    "Marks",
    "RaggedLayout",
    "SegmentLayout",
    "advance_open",
    "plan_segment",
    "stays_open",
]
