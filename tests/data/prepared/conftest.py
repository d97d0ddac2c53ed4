"""A small corpus with what corpora have: long and short documents, empty ones, any alphabet."""

import json
import lzma
from pathlib import Path

import pytest

WORDS = (
    "the ridge smelled of new snow; niemand wohnte im oberen Haus, und 山は静か but 1874 \t is gone"
)


def text(number: int) -> str:
    """A document of its own: some 300 bytes for each unit of its length."""
    length = (number * 7) % 5 + 1
    lines = [f"{number}.{line} {WORDS[line % 9 :]}{line * number}" for line in range(4 * length)]
    return "\n".join(lines) + "\n" * (number % 4)


TEXTS = ["" if number % 11 == 5 else text(number) for number in range(60)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with a train split of rows in two files, and a validation split of text files."""
    folder = tmp_path / "corpus"
    (folder / "train").mkdir(parents=True)
    (folder / "validation").mkdir()
    rows = [json.dumps({"id": n, "text": each}) + "\n" for n, each in enumerate(TEXTS[:40])]
    (folder / "train" / "a.jsonl").write_text("".join(rows[:25]))
    (folder / "train" / "b.jsonl.xz").write_bytes(lzma.compress("".join(rows[25:]).encode()))
    for number, each in enumerate(TEXTS[40:]):
        (folder / "validation" / f"{number:02d}.txt").write_text(each)
    return folder


@pytest.fixture
def texts() -> list[str]:
    """The documents of the corpus: 40 to train on, 20 to validate, of which some are empty."""
    return TEXTS
