"""The progress bar of evaluations that read long texts."""

from __future__ import annotations

from tqdm import tqdm


def token_bar(title: str, total: int) -> tqdm:
    """A bar of tokens read, to be updated with their number.

    Args:
        title: what it is called.
        total: tokens that will be read.
    """
    return tqdm(total=total, desc=title, unit="token", unit_scale=True, mininterval=1.0)
