"""What is written: the tokens of the texts, whoever wrote them and however often it was killed."""

import errno
import json
import lzma
import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drt.data import encode, load_tokenizer
from drt.data.bpe import train_bpe
from drt.data.prepared import (
    CorpusConfig,
    Manifest,
    PreparedSplit,
    encoding,
    find_sources,
    prepare,
    verify_split,
)
from drt.data.prepared import pieces as cutting
from drt.data.prepared.encoding import Encoding
from drt.data.prepared.format import Position, locked
from drt.data.prepared.pieces import Piece, cut_pieces
from drt.data.tokenization import byte_tokenizer, tokenizer_fingerprint

CONFIG = CorpusConfig(tokenizer="bytes", shard_tokens=3000)


def run(
    tokenizer: PreTrainedTokenizerBase, corpus: Path, out: Path, **kwargs: Any
) -> dict[str, Manifest]:
    config = kwargs.pop("config", CONFIG)
    return prepare(config, tokenizer, find_sources(config, [corpus]), out, **kwargs)


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_every_document_comes_back(
    corpus: Path, texts: list[str], tmp_path: Path, bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    run(bpe_tokenizer, corpus, tmp_path / "out")
    for split, wanted in (("train", texts[:40]), ("validation", texts[40:])):
        filled = [(n, text) for n, text in enumerate(wanted) if text]
        found = PreparedSplit(tmp_path / "out" / split, tokenizer=bpe_tokenizer)
        assert found.num_documents == len(filled)
        assert len(found.manifest.shards) > 1
        for document, (number, text) in zip(found.documents(), filled, strict=True):
            assert document.tokens.tolist() == encode(bpe_tokenizer, text).tolist()
            assert (document.num_bytes, document.num_words) == (
                len(text.encode()),
                len(text.split()),
            )
            file = "a.jsonl" if number < 25 else "b.jsonl.xz"
            name = f"{file}:{number}" if split == "train" else f"{number:02d}.txt"
            assert document.name == f"{split}/{name}"
        assert found.manifest.total("words") == sum(len(text.split()) for text in wanted)
        assert found.manifest.total("empty_documents") == len(wanted) - len(filled)
        verify_split(found.folder)


def test_the_tokenizer_is_kept_with_the_corpus(
    corpus: Path, tmp_path: Path, bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    run(bpe_tokenizer, corpus, tmp_path)
    kept = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer_fingerprint(kept) == tokenizer_fingerprint(bpe_tokenizer)
    PreparedSplit(tmp_path / "train", tokenizer=kept)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        PreparedSplit(tmp_path / "train", tokenizer=byte_tokenizer())


def test_the_end_token_follows_each_document(
    corpus: Path, texts: list[str], tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    config = CorpusConfig(tokenizer="bytes", end_of_text=True)
    run(bytes_tokenizer, corpus, tmp_path, config=config)
    split = PreparedSplit(tmp_path / "validation")
    wanted = [[*text.encode(), bytes_tokenizer.eos_token_id] for text in texts[40:] if text]
    assert [document.tokens.tolist() for document in split.documents()] == wanted
    assert split.manifest.total("bytes") == sum(len(text.encode()) for text in texts[40:])
    without = PreTrainedTokenizerFast(tokenizer_object=bytes_tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="end_of_text: the tokenizer bytes has no end token"):
        run(without, corpus, tmp_path / "other", config=config)


@pytest.mark.parametrize(("vocabulary", "width"), [(65_536, 2), (65_537, 4)])
def test_tokens_are_as_wide_as_the_vocabulary_needs(
    tmp_path: Path, vocabulary: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    entries = {**tokenizer.get_vocab(), "last": vocabulary - 1}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: entries)
    monkeypatch.setattr(
        Encoding, "run", lambda self, texts: encode_as_last(texts, vocabulary - 1, self.dtype)
    )
    (tmp_path / "a.txt").write_text("abc")
    (manifest,) = run(tokenizer, tmp_path / "a.txt", tmp_path / "out").values()
    assert (tmp_path / "out" / "train" / "tokens.00000.bin").stat().st_size == width
    assert manifest.plan.vocab_size == vocabulary
    assert PreparedSplit(tmp_path / "out" / "train").tokens(0, 1).tolist() == [vocabulary - 1]
    verify_split(tmp_path / "out" / "train")


def encode_as_last(texts: list[str], token: int, dtype: Any) -> list[Any]:
    import numpy as np

    from drt.data.prepared.encoding import Encoded

    return [Encoded(np.array([token], dtype=dtype), len(text), 1) for text in texts]


def test_the_size_of_pieces_does_not_matter(
    corpus: Path,
    tmp_path: Path,
    bytes_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Words that a cut goes through are counted once, and documents do not run together."""
    run(bytes_tokenizer, corpus, tmp_path / "whole")
    monkeypatch.setattr(cutting, "PIECE_CHARACTERS", 3)
    run(bytes_tokenizer, corpus, tmp_path / "cut")
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def killed(act: Callable[[], object]) -> bool:
    """Run something in a child; whether it was killed, and not done."""
    child = os.fork()
    if child == 0:
        # Nothing of pytest may run in the child, not even its clean-up.
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def kill_at_sync(number: int) -> Callable[[int], None]:
    """An fsync that kills the process when it is called for the `number`-th time."""
    calls = iter(range(number))

    def fsync(descriptor: int) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return fsync


def test_killed_at_any_commit_it_goes_on_to_the_same_bytes(
    corpus: Path, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    run(bytes_tokenizer, corpus, tmp_path / "whole")
    wanted = content(tmp_path / "whole")
    number, out = 0, tmp_path / "killed"
    # Every run is killed one sync later than the one before, counted from where it went on.
    while killed(partial(run_killed, bytes_tokenizer, corpus, out, number)):
        number += 1
    assert number > 10
    assert content(out) == wanted


def run_killed(tokenizer: PreTrainedTokenizerBase, corpus: Path, out: Path, number: int) -> None:
    os.fsync = kill_at_sync(number)
    run(tokenizer, corpus, out)


def test_killed_between_documents_it_goes_on_from_the_last_whole_shard(
    corpus: Path, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    run(bytes_tokenizer, corpus, tmp_path / "whole")
    for last in range(1, 50, 7):
        out = tmp_path / f"killed {last}"
        pieces = iter(range(last))

        def stop(*_: object, pieces: Any = pieces) -> None:
            if next(pieces, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        assert killed(partial(run, bytes_tokenizer, corpus, out, on_progress=stop))
        with pytest.raises(ValueError, match=r"is not complete|holds no prepared tokens"):
            PreparedSplit(out / "validation")
        begun = Manifest.read(out / "train")
        kept = begun.total("documents") + begun.total("empty_documents")
        again = []
        run(bytes_tokenizer, corpus, out, on_progress=lambda _, at, to=again: to.append(at.split))
        assert again.count("train") == (0 if begun.complete else 40 - kept)
        assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter(
    corpus: Path, tmp_path: Path, bpe_tokenizer: PreTrainedTokenizerFast
) -> None:
    for number in (1, 2):
        run(bpe_tokenizer, corpus, tmp_path / str(number), num_processes=number)
    assert content(tmp_path / "1") == content(tmp_path / "2")


@pytest.mark.slow
def test_a_process_that_is_killed_is_an_error_and_no_loss(
    corpus: Path,
    tmp_path: Path,
    bpe_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 500)

    def kill(*_: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(OSError, match=r"was killed; with fewer .*; \d+ whole shards are kept"):
        run(bpe_tokenizer, corpus, tmp_path / "out", num_processes=2, on_progress=kill)
    run(bpe_tokenizer, corpus, tmp_path / "out")
    run(bpe_tokenizer, corpus, tmp_path / "whole")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_is_there_is_not_made_again(
    corpus: Path, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    run(bytes_tokenizer, corpus, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    run(bytes_tokenizer, corpus, tmp_path / "out", on_progress=lambda *_: pytest.fail("read"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_another_corpus_is_not_overwritten(
    corpus: Path,
    tmp_path: Path,
    bytes_tokenizer: PreTrainedTokenizerFast,
    bpe_tokenizer: PreTrainedTokenizerFast,
) -> None:
    out = tmp_path / "out"
    run(bytes_tokenizer, corpus, out)
    before = content(out)
    with pytest.raises(ValueError, match="train holds another corpus: its tokenizer is"):
        run(bpe_tokenizer, corpus, out)
    with pytest.raises(ValueError, match="its shard_tokens is 3000, not 4000"):
        run(bytes_tokenizer, corpus, out, config=CorpusConfig(shard_tokens=4000))
    (corpus / "validation" / "00.txt").write_text("longer than it was before")
    with pytest.raises(ValueError, match="validation holds another corpus: its source is"):
        run(bytes_tokenizer, corpus, out)
    with pytest.raises(ValueError, match="train is not empty and holds no prepared tokens"):
        run(bytes_tokenizer, corpus, corpus)
    # A split of its own, but of the same corpus.
    with pytest.raises(ValueError, match=r"tokenizer holds another tokenizer, of fingerprint"):
        run(bpe_tokenizer, corpus / "train", out, config=CorpusConfig(split="more"))
    assert content(out) == before


def test_a_full_disk_loses_nothing(
    corpus: Path,
    tmp_path: Path,
    bytes_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(bytes_tokenizer, corpus, tmp_path / "whole")
    calls = iter(range(12))

    def fsync(descriptor: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left .*; 1 whole shards are kept; .*/train"):
            run(bytes_tokenizer, corpus, tmp_path / "out")
    run(bytes_tokenizer, corpus, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_one_process_at_a_time_writes(
    corpus: Path, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    with (
        locked(tmp_path / "out" / "train"),
        pytest.raises(BlockingIOError, match="another process is preparing this split"),
    ):
        run(bytes_tokenizer, corpus, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"good \xff bad", r"a\.txt is not UTF-8 text: .* at byte 5"),
        ("a.txt", b"", "there is no text for the split train"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": 1, "id": 2}', r"line 2: .*'text'.*\['id', 'txt'\]"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', r"a\.jsonl, line 2: "),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl, line 1: "),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: .*surrogates"),
        ("a.jsonl", b"[1]", r"a\.jsonl, line 1: the row is a list"),
        ("a.jsonl.xz", b"plain", r"a\.jsonl\.xz is not a whole xz file"),
        ("a.txt.xz", b"plain", r"a\.txt\.xz is not a whole xz file"),
    ],
)
def test_what_cannot_be_read_is_named(
    tmp_path: Path, name: str, data: bytes, match: str, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=match):
        run(bytes_tokenizer, tmp_path / name, tmp_path / "out")


def test_what_yields_no_held_out_text_leaves_room_for_another_try(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text(name * 100)

    def hold_out_one_in(number: int) -> dict[str, Manifest]:
        config = CorpusConfig(tokenizer="bytes", hold_out_one_in=number)
        sources = find_sources(config, [tmp_path / f"{name}.txt" for name in "abcde"])
        return prepare(config, bytes_tokenizer, sources, tmp_path / "out")

    with pytest.raises(ValueError, match="no text for the split validation, one in 1000 of the do"):
        hold_out_one_in(1000)
    made = hold_out_one_in(2)
    assert sum(manifest.total("documents") for manifest in made.values()) == 5


@pytest.mark.parametrize("split", ["", "..", "a/b", "tokenizer"])
def test_a_split_has_the_name_of_a_folder(split: str) -> None:
    with pytest.raises(ValueError, match="it must be a folder's name"):
        CorpusConfig(split=split)


def test_one_document_of_one_is_not_held_out() -> None:
    with pytest.raises(ValueError, match="one document in 1 cannot be held out"):
        CorpusConfig(hub="someone/something", hold_out_one_in=1)


def test_a_mended_row_lets_it_go_on(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole shards before the broken row are kept, if the file keeps its size."""
    monkeypatch.setattr(encoding, "TASK_CHARACTERS", 1000)
    rows = [json.dumps({"text": f"{n} " * 400}) + "\n" for n in range(20)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(rows[:19]) + rows[19].replace("}", "?"))
    with pytest.raises(ValueError, match="line 20"):
        run(bytes_tokenizer, path, tmp_path / "out")
    assert Manifest.read(tmp_path / "out" / "train").shards
    path.write_text("".join(rows))
    read: list[int] = []
    run(
        bytes_tokenizer, path, tmp_path / "out", on_progress=lambda _, at: read.append(at.documents)
    )
    assert read == list(range(21 - len(read), 21))
    assert len(read) < 6
    assert PreparedSplit(tmp_path / "out" / "train").num_documents == 20


@given(
    st.lists(st.text(alphabet="ab \n\té漢", max_size=40), max_size=5),
    st.integers(min_value=2, max_value=12),
)
def test_pieces_are_the_text(parts: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "PIECE_CHARACTERS", size)
        pieces = list(cut_pieces(parts, "name", Position(0, 1)))
    whole = "".join(parts)
    assert "".join(piece.text for piece in pieces) == whole
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(0 < len(piece.text) <= size for piece in pieces) or not whole
    assert count_words(pieces) == len(whole.split())


def count_words(pieces: list[Piece]) -> int:
    return sum(len(piece.text.split()) - piece.splits_word for piece in pieces)


def test_a_long_text_has_the_tokens_it_has_uncut(
    texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where white space about a line end is one token, which no cut may go through."""
    whole = "".join(text + "\n" * (n % 4) + " " * (n % 7) for n, text in enumerate(texts * 2))
    tokenizer = train_bpe([whole], 400)
    wanted = encode(tokenizer, whole).tolist()
    assert len(tokenizer.decode(max(wanted, key=lambda token: blanks(tokenizer, token)))) > 3
    monkeypatch.setattr(cutting, "PIECE_CHARACTERS", 200)
    pieces = list(cut_pieces([whole], "name", Position(0, 1)))
    assert len(pieces) > 100
    assert [t for piece in pieces for t in encode(tokenizer, piece.text).tolist()] == wanted


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox-20b"])
@pytest.mark.parametrize("corpus_name", ["books", "math"])
def test_real_tokenizers_split_no_word_at_a_cut(
    real_data: Path, name: str, corpus_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(str(real_data / "tokenizers" / name))
    with lzma.open(real_data / corpus_name / "validation.jsonl.xz", "rt") as file:
        text = json.loads(next(file))["text"][:200_000]
    monkeypatch.setattr(cutting, "PIECE_CHARACTERS", 2000)
    pieces = list(cut_pieces([text], "name", Position(0, 1)))
    assert len(pieces) > 20
    wanted = encode(tokenizer, text).tolist()
    assert [t for piece in pieces for t in encode(tokenizer, piece.text).tolist()] == wanted


def blanks(tokenizer: PreTrainedTokenizerFast, token: int) -> int:
    """Characters of a token that is all white space."""
    text = tokenizer.decode(token)
    return len(text) if text.isspace() else 0
