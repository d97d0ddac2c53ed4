"""Prepared tokens read back, damage to them, and where splits are found."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from drt.data.prepared import (
    CorpusConfig,
    Manifest,
    PreparedSplit,
    find_sources,
    prepare,
    split_folders,
    verify_split,
)
from drt.data.prepared.sources import find_splits
from drt.data.reading import read_path
from drt.data.streaming import list_inputs

CONFIG = CorpusConfig(tokenizer="bytes", shard_tokens=3000)


@pytest.fixture
def split(corpus: Path, tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast) -> PreparedSplit:
    prepare(CONFIG, bytes_tokenizer, find_sources(CONFIG, [corpus]), tmp_path / "out")
    return PreparedSplit(tmp_path / "out" / "train")


def test_any_stretch_of_tokens_and_documents(split: PreparedSplit, texts: list[str]) -> None:
    filled = [text.encode() for text in texts[:40] if text]
    whole = b"".join(filled)
    ids = np.repeat(np.arange(len(filled)), [len(text) for text in filled])
    assert split.num_tokens == len(whole)
    assert split.document_lengths().tolist() == [len(text) for text in filled]
    rng = np.random.default_rng(0)
    borders = [sum(shard.tokens for shard in split.manifest.shards[:n]) for n in range(3)]
    spans = [(0, len(whole)), (0, 0), (len(whole), len(whole))]
    spans += [(border, border + 1) for border in borders]
    spans += [tuple(sorted(rng.integers(0, len(whole) + 1, size=2))) for _ in range(50)]
    for start, stop in spans:
        assert split.tokens(start, stop).tolist() == list(whole[start:stop])
        assert split.document_ids(start, stop).tolist() == ids[start:stop].tolist()
    for start, stop in ((-1, 3), (5, 4), (0, len(whole) + 1)):
        with pytest.raises(ValueError, match="are not in 0 to"):
            split.tokens(start, stop)
    with pytest.raises(ValueError, match="document 36 is not among the 36"):
        split.document(36)


def test_a_last_shard_without_text(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    for name, text in (("a", "x" * 3000), ("b", ""), ("c", "")):
        (tmp_path / f"{name}.txt").write_text(text)
    prepare(CONFIG, bytes_tokenizer, find_sources(CONFIG, [tmp_path]), tmp_path / "out")
    split = PreparedSplit(tmp_path / "out" / "train")
    assert [shard.empty_documents for shard in split.manifest.shards] == [0, 2]
    assert [document.name for document in split.documents()] == ["a.txt"]
    assert split.tokens(2999, 3000).tolist() == [120]
    assert split.document_ids(2999, 3000).tolist() == [0]
    verify_split(split.folder)


def test_few_files_are_held_open_at_a_time(
    split: PreparedSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = split.tokens(0, split.num_tokens).tolist()
    monkeypatch.setattr("drt.data.prepared.split._MAX_MAPPED", 2)
    held = PreparedSplit(split.folder)
    assert len(held.manifest.shards) > 2
    for _ in range(2):
        assert held.tokens(0, held.num_tokens).tolist() == wanted
        assert held.document_ids(0, held.num_tokens).tolist() == sorted(
            np.repeat(np.arange(held.num_documents), held.document_lengths())
        )
    assert len(held._tokens) == len(held._documents) == 2


def test_maps_are_not_sent_to_other_processes(split: PreparedSplit) -> None:
    before = len(pickle.dumps(split))
    wanted = split.tokens(0, split.num_tokens).tolist()
    assert len(list(split.documents())) == split.num_documents
    data = pickle.dumps(split)
    assert len(data) == before
    assert pickle.loads(data).tokens(0, split.num_tokens).tolist() == wanted


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["tokens.00001.bin", "documents.00000.npy", "names.00002.jsonl"])
def test_a_flipped_bit_is_found(split: PreparedSplit, name: str) -> None:
    assert verify_split(split.folder) == split.manifest
    flip(split.folder / name, -3)
    with pytest.raises(ValueError, match=rf"{name} is damaged: its sha256"):
        verify_split(split.folder)


def test_files_that_are_missing_or_cut_are_found_when_opened(split: PreparedSplit) -> None:
    tokens = split.folder / "tokens.00001.bin"
    data = tokens.read_bytes()
    tokens.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=rf"has {len(data) - 2} bytes, not {len(data)}"):
        PreparedSplit(split.folder)
    tokens.unlink()
    with pytest.raises(ValueError, match="is missing"):
        PreparedSplit(split.folder)
    tokens.write_bytes(data)
    documents = split.folder / "documents.00000.npy"
    documents.write_bytes(documents.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"documents\.00000\.npy is damaged"):
        PreparedSplit(split.folder)
    np.save(documents, np.zeros(3))
    with pytest.raises(ValueError, match=r"holds float64 of shape \(3,\)"):
        PreparedSplit(split.folder)


def forge(split: PreparedSplit, name: str) -> None:
    """Write a file's true digest into the manifest."""
    from drt.data.prepared.format import digest

    path = split.folder / "manifest.json"
    content = json.loads(path.read_bytes())
    for shard in content["shards"]:
        if name in shard["sha256"]:
            shard["sha256"][name] = digest(split.folder / name)
    path.write_text(json.dumps(content))


def test_what_no_checksum_tells_is_checked(split: PreparedSplit) -> None:
    tokens = np.fromfile(split.folder / "tokens.00000.bin", dtype="<u2")
    np.where(np.arange(len(tokens)) == 7, 258, tokens).astype("<u2").tofile(
        split.folder / "tokens.00000.bin"
    )
    forge(split, "tokens.00000.bin")
    with pytest.raises(ValueError, match="token id 258, the vocabulary has 258"):
        verify_split(split.folder)
    documents = np.load(split.folder / "documents.00000.npy")
    documents[0, 1] = documents[0, 0]
    np.save(split.folder / "documents.00000.npy", documents)
    forge(split, "documents.00000.npy")
    with pytest.raises(ValueError, match="documents do not end one after another"):
        verify_split(split.folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: "{", "is not JSON"),
        (lambda content: "[]", "is not of prepared tokens"),
        (lambda content: {**content, "version": 2}, "format version 2, only 1 is known"),
        (lambda content: {**content, "plan": {}}, "is damaged"),
        (lambda content: {**content, "complete": False}, "is not complete: run the same"),
    ],
)
def test_manifests_that_cannot_be_read(split: PreparedSplit, change: object, match: str) -> None:
    path = split.folder / "manifest.json"
    changed = change(json.loads(path.read_bytes()))  # type: ignore[operator]
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=match):
        PreparedSplit(split.folder)


def test_a_split_that_is_not_there_is_told_from_those_that_are(
    split: PreparedSplit, tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"/test holds .*; .*/out has train, validation\. .*-one-in"
    ):
        PreparedSplit(tmp_path / "out" / "test")


def test_folders_of_splits(split: PreparedSplit, tmp_path: Path) -> None:
    assert split_folders(split.folder) == [split.folder]
    assert split_folders(tmp_path / "out") == [split.folder, tmp_path / "out" / "validation"]
    with pytest.raises(ValueError, match="holds no prepared tokens"):
        split_folders(tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"it has no manifest\.json, but the splits .*: name one"):
        Manifest.read(tmp_path / "out")
    (tmp_path / "none" / "memory").mkdir(parents=True)
    (tmp_path / "none" / "memory" / "manifest.json").write_text('{"format": "drt-memory"}')
    with pytest.raises(ValueError, match=r"it has no manifest\.json$"):
        Manifest.read(tmp_path / "none")


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def names(splits: dict[str, list[tuple[str, Path]]]) -> dict[str, list[str]]:
    return {split: [name for name, _ in files] for split, files in splits.items()}


def test_splits_are_what_files_and_folders_are_called(tmp_path: Path) -> None:
    make(tmp_path / "a", "test.jsonl.xz", "train/1.txt", "train/x/2.txt", "valid.txt", "data.json")
    assert names(find_splits([tmp_path / "a"])) == {
        "train": ["train/1.txt", "train/x/2.txt"],
        "validation": ["valid.txt"],
        "test": ["test.jsonl.xz"],
    }
    assert names(find_splits([tmp_path / "a" / "train", tmp_path / "a" / "valid.txt"])) == {
        "train": ["1.txt", "x/2.txt"],
        "validation": ["valid.txt"],
    }
    assert names(find_splits([tmp_path / "a"], rows_only=True)) == {"test": ["test.jsonl.xz"]}
    make(tmp_path / "b", "one.txt", "x/test.txt")
    assert names(find_splits([tmp_path / "b"])) == {"train": ["one.txt", "x/test.txt"]}


def test_text_beside_splits_is_not_left_out_silently(tmp_path: Path) -> None:
    make(tmp_path, "README.md", "train.txt", "test.txt")
    with pytest.raises(
        ValueError, match=r"README\.md is in none of the splits \['test', 'train'\]"
    ):
        find_splits([tmp_path])
    assert names(find_splits([tmp_path], only="all")) == {
        "all": ["README.md", "test.txt", "train.txt"]
    }
    with pytest.raises(ValueError, match=r"train\.txt is given twice"):
        find_splits([tmp_path / "train.txt", tmp_path])
    with pytest.raises(ValueError, match="there is no file or folder"):
        find_splits([tmp_path / "nowhere"])


def test_a_text_of_two_splits_is_in_neither(tmp_path: Path) -> None:
    make(tmp_path / "dev", "train.txt", "val.txt")
    with pytest.raises(ValueError, match=r"train\.txt is of the split validation by its folder"):
        find_splits([tmp_path / "dev"])
    given = [tmp_path / "dev" / "train.txt", tmp_path / "dev" / "val.txt"]
    assert names(find_splits(given)) == {"train": ["train.txt"], "validation": ["val.txt"]}


def test_linked_folders_are_gone_through_but_not_in_themselves(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "1.txt", "x/2.txt")
    make(tmp_path / "in", "validation/3.txt")
    (tmp_path / "in" / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "x" / "up").symlink_to(tmp_path / "elsewhere")
    assert names(find_splits([tmp_path / "in"])) == {
        "train": ["train/1.txt", "train/x/2.txt"],
        "validation": ["validation/3.txt"],
    }


def test_json_that_is_not_a_row_a_line_is_no_text(tmp_path: Path) -> None:
    make(tmp_path, "rows.json")
    for read in (lambda path: find_splits([path]), lambda path: read_path(path, max_bytes=9)):
        with pytest.raises(ValueError, match=r"rows\.json is neither text nor rows"):
            read(tmp_path / "rows.json")
    with pytest.raises(ValueError, match=r"rows\.json is neither text nor rows"):
        list_inputs([str(tmp_path / "rows.json")])


def test_documents_are_held_out_by_their_names(
    tmp_path: Path, bytes_tokenizer: PreTrainedTokenizerFast
) -> None:
    make(tmp_path / "in", *(f"{n}.txt" for n in range(200)))
    config = CorpusConfig(tokenizer="bytes", hold_out_one_in=5)
    prepare(config, bytes_tokenizer, find_sources(config, [tmp_path / "in"]), tmp_path / "out")
    train, held_out = (
        {document.name for document in PreparedSplit(tmp_path / "out" / name).documents()}
        for name in ("train", "validation")
    )
    assert train | held_out == {f"{n}.txt" for n in range(200)}
    assert not train & held_out
    # 40 are expected, of a binomial with a deviation of 5.7; the names decide it once for all.
    assert 20 < len(held_out) < 60
    (tmp_path / "in" / "0.txt").rename(tmp_path / "in" / "test.txt")
    with pytest.raises(ValueError, match="is in none of the splits"):
        find_sources(config, [tmp_path / "in"])


def test_configurations_that_make_no_sense(tmp_path: Path, corpus: Path) -> None:
    for fields, match in (
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"hub_subset": "x"}, "need hub, a dataset's name"),
        ({"hub": "x", "split": "y"}, "split is for local text"),
    ):
        with pytest.raises(ValueError, match=match):
            CorpusConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the paths of files or folders"):
        find_sources(CorpusConfig(), [])
    with pytest.raises(ValueError, match="it takes no paths"):
        find_sources(CorpusConfig(hub="x"), [corpus])
    with pytest.raises(ValueError, match=r"the corpus has \['train', 'validation'\]"):
        find_sources(CorpusConfig(hold_out_one_in=9), [corpus])
    with pytest.raises(ValueError, match="one document in 1 cannot be held out"):
        find_sources(CorpusConfig(hold_out_one_in=1), [corpus / "train"])
