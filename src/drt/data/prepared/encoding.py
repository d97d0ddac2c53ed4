"""Pieces of text turned into tokens by several processes, in the order they came in."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from drt.data.prepared.pieces import PIECE_CHARACTERS, Piece
from drt.data.tokenization import encode, encode_batch, is_byte_tokenizer

# A task is some pieces of together about this many characters, and not more pieces than that.
TASK_CHARACTERS = PIECE_CHARACTERS
TASK_PIECES = 4096

# Tasks that wait for each process, so that none has to.
TASKS_AHEAD = 3


class Encoded(NamedTuple):
    """A piece as tokens, and what it measures."""

    tokens: np.ndarray
    """Token ids, (num_tokens,), in the dtype they are stored in."""
    num_bytes: int
    """Its UTF-8 bytes."""
    num_words: int
    """Its words, separated by white space."""


class Encoding(NamedTuple):
    """How pieces become tokens."""

    tokenizer: PreTrainedTokenizerBase
    """Adds no special tokens."""
    dtype: np.dtype
    """What the tokens are stored in."""

    def run(self, texts: list[str]) -> list[Encoded]:
        """Encode some texts; ValueError for one that is not UTF-8."""
        if is_byte_tokenizer(self.tokenizer):
            tokens = [encode(self.tokenizer, text, dtype=self.dtype) for text in texts]
        else:
            ids = encode_batch(self.tokenizer, texts) if texts else []
            tokens = [np.array(each, dtype=self.dtype) for each in ids]
        return [
            Encoded(each, len(text.encode()), len(text.split()))
            for each, text in zip(tokens, texts, strict=True)
        ]


def encode_pieces(
    pieces: Iterable[Piece], encoding: Encoding, *, num_processes: int
) -> Iterator[tuple[Piece, Encoded]]:
    """Encode pieces; what comes out does not depend on the number of processes.

    Args:
        pieces: what to encode.
        encoding: the tokenizer and the dtype.
        num_processes: 1 = this one; more are started, each with the tokenizer.

    Raises:
        OSError: a process was killed, most likely for want of memory.
    """
    tasks = _tasks(pieces)
    if num_processes == 1:
        for task in tasks:
            yield from zip(task, encoding.run([piece.text for piece in task]), strict=True)
        return
    with ProcessPoolExecutor(
        num_processes,
        # A fork of a process with threads, as torch and tokenizers have, may never get a lock.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(encoding,),
    ) as pool:
        try:
            yield from _in_order(tasks, pool, num_processes * TASKS_AHEAD)
        except BrokenProcessPool as error:
            message = "a tokenizing process was killed; with fewer of them each has more memory"
            raise OSError(errno.ENOMEM, message) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _in_order(
    tasks: Iterator[list[Piece]], pool: ProcessPoolExecutor, ahead: int
) -> Iterator[tuple[Piece, Encoded]]:
    waiting: deque[tuple[list[Piece], Future[list[Encoded]]]] = deque()
    for task in tasks:
        waiting.append((task, pool.submit(_run, [piece.text for piece in task])))
        if len(waiting) >= ahead:
            yield from _finished(*waiting.popleft())
    while waiting:
        yield from _finished(*waiting.popleft())


def _finished(task: list[Piece], future: Future[list[Encoded]]) -> Iterator[tuple[Piece, Encoded]]:
    yield from zip(task, future.result(), strict=True)


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    task: list[Piece] = []
    size = 0
    for piece in pieces:
        task.append(piece)
        size += len(piece.text)
        if size >= TASK_CHARACTERS or len(task) == TASK_PIECES:
            yield task
            task, size = [], 0
    if task:
        yield task


_encoding: list[Encoding] = []
"""That of this process, in a process that `encode_pieces` has started."""


def _begin(encoding: Encoding) -> None:
    # Ctrl-C is for the process that started this one, and ends it with that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes share out the cores among themselves.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoding.append(encoding)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Do not wait for ever for tasks of a process that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(texts: list[str]) -> list[Encoded]:
    return _encoding[0].run(texts)
