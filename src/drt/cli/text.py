"""Text that is given on the command line or comes from standard input."""

from __future__ import annotations

import sys


def read_text(argument: str) -> str:
    """The argument itself, or for "-" all of standard input.

    Raises:
        ValueError: bytes that are not UTF-8.
    """
    if argument != "-":
        data = argument.encode("utf-8", "surrogateescape")
    else:
        data = sys.stdin.buffer.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = "standard input" if argument == "-" else "the text"
        raise ValueError(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from error
