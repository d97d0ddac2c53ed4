"""What to say of a key that nothing reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str], *, before: str = "") -> str:
    """ "; did you mean NAME?" with the nearest known name, or nothing where none is near.

    Args:
        name: what was written.
        known: what could have been.
        before: put in front of the nearest, say the path of a mapping.
    """
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {before}{near[0]}?" if near else ""


def refuse_unknown(keys: Iterable[str], known: Collection[str], message: str) -> None:
    """Raise ValueError at the first key that is not known.

    Args:
        keys: what was written.
        known: what is read.
        message: what is said, with {key} in it; the nearest known key follows.
    """
    for key in keys:
        if key not in known:
            raise ValueError(message.replace("{key}", str(key)) + did_you_mean(str(key), known))
