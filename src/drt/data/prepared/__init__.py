"""Corpora as token files that are written once and mapped into memory."""

from drt.data.prepared.checking import verify_split
from drt.data.prepared.corpora import CorpusConfig, find_sources, prepare
from drt.data.prepared.format import Manifest
from drt.data.prepared.rows import TokenRows
from drt.data.prepared.split import PreparedDocument, PreparedSplit, split_folders

__all__ = [
    "CorpusConfig",
    "Manifest",
    "PreparedDocument",
    "PreparedSplit",
    "TokenRows",
    "find_sources",
    "prepare",
    "split_folders",
    "verify_split",
]
