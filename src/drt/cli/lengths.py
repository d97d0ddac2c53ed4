"""Lengths on the command line: 65536, 64K, 16M."""

from __future__ import annotations

import argparse

_UNITS = {"K": 1 << 10, "M": 1 << 20}


def length(text: str) -> int:
    """A number of tokens; K is 1,024 and M 1,048,576."""
    unit = _UNITS.get(text[-1:].upper(), 0)
    number = text[:-1] if unit else text
    if not number.isdecimal() or int(number) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no length: give a number, 64K or 16M")
    return int(number) * (unit or 1)
