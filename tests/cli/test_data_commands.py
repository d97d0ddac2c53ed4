"""`drt data`, as it is typed."""

import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from drt.cli.main import main
from drt.data import load_tokenizer
from drt.data.prepared import CorpusConfig, PreparedSplit
from drt.run_config import build

PRESETS = Path(__file__).parents[2] / "configs" / "data"
SENTENCE = "It was a dark and stormy night, and nobody had lived in the house since {}. "

PREPARE = ("prepare", "--from", "{books}")


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    for split, count in (("train", 30), ("validation", 3)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            (folder / split / f"{number}.txt").write_text(SENTENCE.format(number) * 40)
    return folder


def test_a_corpus_is_prepared_shown_and_verified(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    arguments = ["data", "prepare", "pg19", "--from", str(books), "--tokenizer", "bytes"]
    assert main([*arguments, "--out", out]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    num_bytes = {
        split: sum(path.stat().st_size for path in (books / split).iterdir())
        for split in ("train", "validation")
    }
    assert table[0] == ["split", "documents", "tokens", "bytes", "words", "shards", "dtype"]
    for line, (split, count) in zip(table[1:], (("train", 30), ("validation", 3)), strict=True):
        size = f"{num_bytes[split]:,}"
        assert line == [split, str(count), size, size, f"{count * 40 * 16:,}", "1", "uint16"]
    assert main(["data", "info", out]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == table
    assert main(["data", "info", f"{out}/train", "--json"]) == 0
    (manifest,) = json.loads(capsys.readouterr().out).values()
    assert (manifest["documents"], manifest["complete"]) == (30, True)
    assert main(["data", "verify", out]) == 0
    assert capsys.readouterr().out.count("are intact") == 2
    assert main([*arguments, "--out", out, "--end-of-text"]) == 2
    assert "train holds another corpus: its end_token is None, not 257" in capsys.readouterr().err


def test_flags_change_the_preset(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "mine.yaml"
    preset.write_text("tokenizer: bytes\nshard_tokens: 1000\n")
    arguments = ["data", "prepare", str(preset), "--from", str(books), "--out"]
    flags = ["--end-of-text", "--split", "all", "--processes", "1", "--shard-tokens", "10000"]
    assert main([*arguments, str(tmp_path / "out"), *flags]) == 0
    plan = PreparedSplit(tmp_path / "out" / "all").manifest.plan
    assert (plan.end_token, plan.shard_tokens) == (257, 10000)
    flags = ["--split", "all", "--hold-out-one-in", "4"]
    assert main([*arguments, str(tmp_path / "held"), *flags]) == 0
    capsys.readouterr()
    assert main(["data", "info", str(tmp_path / "held")]) == 0
    assert "validation" in capsys.readouterr().out


def test_a_tokenizer_is_trained_and_used(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(tmp_path / "bpe")
    train = ["data", "tokenizer", str(books), "--vocab-size", "300", "--out", folder]
    assert main(train) == 0
    assert "300 entries" in capsys.readouterr().out
    prepare = ["data", "prepare", "--from", str(books), "--tokenizer", folder, "--processes", "1"]
    assert main([*prepare, "--out", str(tmp_path / "out")]) == 0
    split = PreparedSplit(tmp_path / "out" / "validation", tokenizer=load_tokenizer(folder))
    assert split.num_tokens < split.manifest.total("bytes") / 2
    assert main(train) == 2
    assert "is there already" in capsys.readouterr().err


def test_what_a_folder_holds_beside_text_is_named_and_never_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "A.TXT").write_text("it rains. ")
    (mine / "rows.JSONL.XZ").write_bytes(lzma.compress(b'{"text": "and rains"}'))
    for name in ("a.pdf", "b.pdf", "notes", ".hidden"):
        (mine / name).write_text("no text")
    command = ["data", "prepare", "--from", str(mine), "--tokenizer", "bytes"]
    # Its own output below what is read is no text either, now or when it goes on.
    out = str(mine / "tokens")
    assert main([*command, "--out", out]) == 0
    assert "left out are 2 .pdf, 1 notes: read are .txt" in capsys.readouterr().out
    assert main([*command, "--out", out]) == 0
    assert PreparedSplit(mine / "tokens" / "train").num_tokens == 19
    assert main(["data", "prepare", "--from", out, "--out", str(tmp_path / "new")]) == 2
    assert "tokens: it holds what drt has made of text" in capsys.readouterr().err


def test_a_tokenizer_is_trained_on_the_training_text_alone(
    books: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained(name: str, *inputs: str) -> bytes:
        folder = tmp_path / name
        assert (
            main(["data", "tokenizer", *inputs, "--vocab-size", "275", "--out", str(folder)]) == 0
        )
        return (folder / "tokenizer.json").read_bytes()

    first = trained("first", str(books))
    for path in (books / "validation").iterdir():
        path.write_text("The quick brown fox jumps over the lazy dogs. " * 99)
    assert trained("again", str(books)) == first == trained("train", str(books / "train"))
    assert trained("validation", str(books / "validation")) != first
    rows = [json.dumps({"body": SENTENCE.format(number)}) for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    trained("rows", str(tmp_path / "rows.jsonl"), "--text-field", "body")
    (tmp_path / "mine.yaml").write_text("text_field: body\n")
    preset = "--preset", str(tmp_path / "mine.yaml")
    assert trained("preset", str(tmp_path / "rows.jsonl"), *preset) == trained(
        "the same", str(tmp_path / "rows.jsonl"), "--text-field", "body"
    )
    wanted = ["--preset", "pg19-hub", "--vocab-size", "300", "--out", str(tmp_path / "hub")]
    assert main(["data", "tokenizer", str(books), *wanted]) == 2
    assert "it takes no paths" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "--out", "x"], "give the paths of files or folders"),
        (
            ["prepare", "pg91", "--from", "{books}", "--out", "x"],
            "latex, latex-hub, pg19, pg19-hub",
        ),
        (["prepare", "--from", "nowhere", "--tokenizer", "bytes", "--out", "x"], "nowhere"),
        ([*PREPARE, "--tokenizer", "./none", "--out", "x"], "./none"),
        (
            [*PREPARE, "--tokenizer", "bytes", "--out", "{books}"],
            "train is not empty and holds no prepared tokens",
        ),
        (
            [*PREPARE, "--tokenizer", "bytes", "--out", "x", "--processes", "0"],
            "num_processes is 0",
        ),
        (["info", "{books}"], "holds no prepared tokens"),
        (["verify", "nowhere"], "holds no prepared tokens"),
        (["tokenizer", "{books}", "--vocab-size", "9", "--out", "x"], "257 or more"),
    ],
)
def test_errors_are_one_line(
    books: Path,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *(argument.format(books=books) for argument in arguments)]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert err.startswith("drt data: error: ")


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_presets_are_whole(path: Path) -> None:
    config = build(CorpusConfig, yaml.safe_load(path.read_text()))
    assert (config.hub is not None) == path.stem.endswith("-hub")


def children(parent: int) -> list[int]:
    listing = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in listing.read_text().split()] if listing.exists() else []


def alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_killed_with_its_processes_it_leaves_none_and_goes_on(books: Path, tmp_path: Path) -> None:
    """The command itself, with two tokenizing processes, killed while it writes."""
    tokenizer = str(tmp_path / "bpe")
    assert main(["data", "tokenizer", str(books), "--vocab-size", "300", "--out", tokenizer]) == 0
    large = tmp_path / "large.jsonl"
    large.write_text(
        "".join(json.dumps({"text": SENTENCE.format(n) * 10_000}) + "\n" for n in range(40))
    )
    command = [sys.executable, "-m", "drt.cli.main", "data", "prepare", "--from", str(large)]
    command += ["--tokenizer", tokenizer, "--shard-tokens", "200000", "--processes", "2", "--out"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (killed / "train" / "tokens.00002.bin").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not complete"):
        PreparedSplit(killed / "train")
    while any(alive(child) for child in started):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)
    assert len(started) >= 2
    # One process goes on where two were killed; two make the whole at once.
    command[command.index("--processes") + 1] = "1"
    subprocess.run([*command, str(killed)], check=True, stderr=subprocess.DEVNULL)
    command[command.index("--processes") + 1] = "2"
    subprocess.run([*command, str(whole)], check=True, stderr=subprocess.DEVNULL)
    names = sorted(path.name for path in (whole / "train").iterdir())
    assert names == sorted(path.name for path in (killed / "train").iterdir())
    assert len(names) > 9
    for name in names:
        one, other = ((folder / "train" / name).read_bytes() for folder in (whole, killed))
        assert one == other, name
