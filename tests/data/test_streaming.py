"""Pieces of texts of any size: whole characters, the same cuts from any place, clear errors."""

import io
import json
import lzma
import os
import sys
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drt.data import streaming
from drt.data.streaming import InputStream, TextInput, TextPiece, list_inputs


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 50)


def pieces(path: Path, **kwargs: Any) -> list[TextPiece]:
    return list(InputStream(TextInput(str(path), path.stat().st_size), **kwargs))


texts = st.text(alphabet="ab \n\u00e9\u20ac\U0001f600", max_size=400)


@settings(max_examples=60)
@given(texts, st.sampled_from([".txt", ".txt.xz"]))
def test_pieces_are_the_text_and_cut_the_same_from_any_of_them(
    tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("text") / f"a{suffix}"
    data = text.encode()
    path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    made = pieces(path)
    assert "".join(piece.text for piece in made) == text
    assert all(piece.text for piece in made)
    assert [piece.is_last for piece in made] == [False] * (len(made) - 1) + [True] * bool(made)
    for number, piece in enumerate(made):
        assert data[piece.start :].startswith(piece.text.encode())
        assert pieces(path, source=piece.source, start=piece.start) == made[number:]


def test_lines_are_kept_whole_where_they_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("twenty characters..\n" * 7)
    assert all(piece.text.endswith("..\n") for piece in pieces(path))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_rows_are_sources_of_their_own(tmp_path: Path, suffix: str) -> None:
    rows = ["first", "x" * 120, "", "last"]
    data = "\n".join(json.dumps({"text": row}) for row in rows).encode()
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    made = pieces(path)
    joined: dict[str, str] = {}
    for piece in made:
        joined[piece.source] = joined.get(piece.source, "") + piece.text
    assert joined == {f"{path}:{n}": row for n, row in enumerate(rows, 1) if row}
    middle = next(n for n, piece in enumerate(made) if piece.start == 50)
    assert pieces(path, source=made[middle].source, start=50) == made[middle:]


def test_standard_input_is_read_and_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stdin:
        buffer = io.BytesIO(b"0123456789" * 20)

    monkeypatch.setattr(sys, "stdin", Stdin)
    made = list(InputStream(TextInput("-", None), source="-", start=150))
    assert "".join(piece.text for piece in made) == "0123456789" * 5


def test_a_place_behind_the_end_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    with pytest.raises(ValueError, match="the text ends 5 bytes before the place to go on from"):
        pieces(tmp_path / "a.txt", source="a.txt", start=15)
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    source = f"{tmp_path / 'a.jsonl'}:3"
    with pytest.raises(ValueError, match=r"a\.jsonl ends before .*a\.jsonl:3, the place to go on"):
        pieces(tmp_path / "a.jsonl", source=source, start=0)


def test_a_pipe_is_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    Thread(target=pipe.write_text, args=("0123456789",)).start()
    stream = InputStream(TextInput(str(pipe), 0))
    assert [(piece.text, stream.bytes_read) for piece in stream] == [("0123456789", 0)]


def test_folders_are_listed_by_name(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/c.txt", ".hidden.txt", "image.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [Path(item.name).name for item in list_inputs([str(tmp_path)])]
    assert names == ["a.md", "b.txt", "c.txt"]


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file or folder nowhere"):
        list_inputs(["nowhere"])
    with pytest.raises(ValueError, match="no text in"):
        list_inputs([str(tmp_path)])
    (tmp_path / "a.txt").write_bytes(b"good\n" * 30 + b"\xff")
    with pytest.raises(ValueError, match="given twice"):
        list_inputs([str(tmp_path / "a.txt")] * 2)
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"b\.txt is given twice"):
        list_inputs([str(tmp_path)])
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8.* at byte 150"):
        pieces(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"words": 3}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: the row has no string 'text'"):
        pieces(tmp_path / "a.jsonl")
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"x" * 1000)[:-20])
    with pytest.raises(ValueError, match="not a whole xz file"):
        pieces(tmp_path / "a.xz")
