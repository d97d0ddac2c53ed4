import json
import lzma
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from drt.data import SPLITS, Corpus, byte_tokenizer, load_corpus
from drt.data.corpora import corpus_from_texts
from drt.data.reading import (
    MIN_FILE_SHARE,
    TextDocument,
    check_path,
    read_installed_text,
    read_path,
)

BYTES = byte_tokenizer()
TEXT = "Ein Satz mit Umlauten: äöü. " * 400


def texts(corpus: Corpus) -> dict[str, str]:
    """The documents of both splits; the two parts of one that was cut are joined."""
    joined: dict[str, str] = {}
    for split in SPLITS:
        for document in corpus.documents(split):
            joined.setdefault(document.name, "")
            joined[document.name] += BYTES.decode(document.tokens)
    return joined


def rows(*texts: str, **fields: list) -> bytes:
    lines = [
        json.dumps({"text": text, **{name: values[number] for name, values in fields.items()}})
        for number, text in enumerate(texts)
    ]
    return "\n".join(lines).encode()


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.rst", "a.tex", "a.strange", "a"])
def test_text_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(TEXT, encoding="utf-8")
    assert texts(load_corpus(path, BYTES)) == {name: TEXT}
    assert texts(load_corpus(str(path), BYTES)) == {name: TEXT}


def test_text_file_in_xz(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode()))
    assert texts(load_corpus(path, BYTES)) == {"a.txt.xz": TEXT}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    data = rows(TEXT, TEXT.upper(), TEXT.title()) + b"\n\n"
    path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    expected = [TEXT, TEXT.upper(), TEXT.title()]
    names = [f"{path.name}:{number}" for number in (1, 2, 3)]
    assert texts(load_corpus(path, BYTES)) == dict(zip(names, expected, strict=True))


def test_rows_are_named_by_their_id(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows("a", "b", "c", "d", id=["x", 7, None, "x"]))
    found = read_path(path, max_bytes=100)
    assert [name for name, _ in found] == [
        "rows.jsonl:x",
        "rows.jsonl:7",
        "rows.jsonl:3",
        "rows.jsonl:x#2",
    ]


def test_prefix_of_rows_is_read_no_further_than_needed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(lzma.compress(rows("aaaa", "bbäb", "cccc") + b"\nnot a row"))
    # Four bytes and then b, b and half an ä, which is dropped.
    assert [text for _, text in read_path(path, max_bytes=7)] == ["aaaa", "bb"]
    assert [text for _, text in read_path(path, max_bytes=13)] == ["aaaa", "bbäb", "cccc"]
    with pytest.raises(ValueError, match=r"rows\.jsonl\.xz, line 4"):
        read_path(path, max_bytes=14)


def test_text_is_cut_at_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("aäb", encoding="utf-8")
    assert [read_path(path, max_bytes=size)[0].text for size in (1, 2, 3, 4)] == [
        "a",
        "a",
        "aä",
        "aäb",
    ]


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".git").mkdir()
    (tmp_path / "b.txt").write_text(TEXT)
    (tmp_path / "deep" / "er" / "a.md").write_text(TEXT.upper())
    (tmp_path / "deep" / "rows.jsonl").write_bytes(rows(TEXT.title()))
    (tmp_path / "deep" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    assert texts(load_corpus(tmp_path, BYTES)) == {
        "b.txt": TEXT,
        "deep/er/a.md": TEXT.upper(),
        "deep/rows.jsonl:1": TEXT.title(),
    }


def test_large_files_of_a_folder_share_evenly(tmp_path: Path) -> None:
    size = 3 * MIN_FILE_SHARE
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(name.encode() * size)
    found = read_path(tmp_path, max_bytes=size)
    assert sorted(len(text) for _, text in found) == [MIN_FILE_SHARE] * 3


def test_folder_beyond_the_limit_is_read_in_the_order_of_digests(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_bytes(b"x" * 100)
    few = read_path(tmp_path, max_bytes=1000)
    more = read_path(tmp_path, max_bytes=1500)
    assert [name for name, _ in more[:10]] == [name for name, _ in few]
    assert (len(few), len(more)) == (10, 15)


def test_installed_text() -> None:
    corpus = load_corpus(None, BYTES)
    names = [document.name for split in SPLITS for document in corpus.documents(split)]
    assert {"textwrap.py", "json/decoder.py"} <= set(names)
    folders = {Path(name).parts[0] for name in names}
    assert folders.isdisjoint({"site-packages", "test", "idlelib", "__pycache__", "encodings"})
    assert not any(name.startswith(("_sysconfigdata", "/")) for name in names)
    # Of some ten megabytes; a haystack of a million bytes should not be mostly repetition.
    assert corpus.num_tokens("train") > 4e6
    assert corpus.num_tokens("held_out") > 1e5


def test_installed_text_has_the_topics_if_python_has_them() -> None:
    topics = pytest.importorskip("pydoc_data.topics").topics
    found = dict(read_installed_text(max_bytes=2**20))
    assert all(found[f"topics/{name}"] == text for name, text in topics.items())


@pytest.mark.parametrize("max_bytes", [1000, 600_000, 2**20])
def test_installed_text_keeps_to_the_limit(max_bytes: int) -> None:
    found = read_installed_text(max_bytes=max_bytes)
    total = sum(len(text.encode()) for _, text in found)
    # A character cut in two leaves at most 3 bytes unused.
    assert max_bytes - 3 <= total <= max_bytes
    assert found == read_installed_text(max_bytes=max_bytes)


def test_python_without_topics_and_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert read_installed_text(max_bytes=10_000)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"neither pydoc_data.topics nor sources"):
        read_installed_text(max_bytes=10_000)


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"", r"no text in .*a\.txt: it is empty"),
        ("a.jsonl", b"\n \n", r"no text in .*a\.jsonl: it is empty"),
        ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8 text: .* at byte 5"),
        ("a.txt", "cut ä".encode()[:-1], r"a\.txt is not UTF-8 text: .* at byte 4"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1, "id": 2}', r"a\.jsonl, line 2: .*\['id', 'txt'\]"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl, line 1: the row has no string 'text'"),
        ("a.jsonl", b"\n[1]", r"a\.jsonl, line 2: the row is a list"),
        ("a.jsonl", b"{", r"a\.jsonl, line 1: "),
        ("a.jsonl", b"\xff", r"a\.jsonl, line 1: .*"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: .*surrogates"),
        ("a.jsonl.xz", b"plain", r"a\.jsonl\.xz is not a whole xz file"),
        ("a.txt.xz", lzma.compress(TEXT.encode())[:-40], r"a\.txt\.xz is not a whole xz file"),
        ("a.txt", b"short", r"too little text: 1 documents with 5 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, data: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=match):
        load_corpus(tmp_path / name, BYTES)


def test_wrong_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no corpus at .*nowhere: there is no such file"):
        load_corpus(tmp_path / "nowhere", BYTES)
    with pytest.raises(ValueError, match=r"found no files; read are .txt .md"):
        load_corpus(tmp_path, BYTES)
    (tmp_path / "a.png").write_bytes(b"1")
    with pytest.raises(ValueError, match=r"found 1 .png; read are .txt .md"):
        load_corpus(tmp_path, BYTES)
    with pytest.raises(ValueError, match="max_bytes is 0"):
        load_corpus(None, BYTES, max_bytes=0)


def test_narrow_tokens_survive_any_vocabulary(
    tmp_path: Path, bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = load_corpus(tmp_path, bpe_tokenizer)
    tokens = [document.tokens for split in SPLITS for document in corpus.documents(split)]
    assert {part.dtype.name for part in tokens} == {"uint16"}
    assert "".join(bpe_tokenizer.decode(part) for part in tokens) == TEXT


def test_ids_beyond_the_number_of_entries_survive() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 300}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    corpus = corpus_from_texts([TextDocument("a", "a " * 6000)], tokenizer)
    tokens = corpus.documents("train")[0].tokens
    assert (tokens == 300).all()
    assert tokens.dtype == np.uint16


def test_real_corpora_load(real_data: Path) -> None:
    essays = load_corpus(real_data / "haystack" / "essays.jsonl.xz", BYTES)
    assert sum(essays.num_tokens(split) for split in SPLITS) > 4_600_000
    books = load_corpus(real_data / "books" / "train.jsonl.xz", BYTES, max_bytes=2**22)
    total = sum(books.num_tokens(split) for split in SPLITS)
    # A character cut in two leaves at most 3 bytes unused.
    assert 2**22 - 3 <= total <= 2**22


def test_a_path_is_checked_by_one_character_of_any_width(tmp_path: Path) -> None:
    for name, text in (("euro", "€ and more"), ("clef", "\U0001d11e and more")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(text, encoding="utf-8")
        check_path(tmp_path / name)
    (tmp_path / "empty.txt").touch()
    for wrong in ("empty.txt", "nowhere"):
        with pytest.raises(ValueError, match=wrong):
            check_path(tmp_path / wrong)
