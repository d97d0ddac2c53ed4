"""`drt read`, `ask`, `generate` and `memory`, as they are typed."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch

from drt import DiskMemory, DRTForCausalLM, import_safetensors
from drt.cli.main import main
from drt.data.tokenization import byte_tokenizer
from drt.testing import tiny_config


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    DRTForCausalLM(tiny_config(vocab_size=258)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def book(tmp_path: Path) -> str:
    path = tmp_path / "book.txt"
    path.write_text("It was a dark and stormy night. " * 40)
    return str(path)


@pytest.fixture
def memory(checkpoint: str, book: str, tmp_path: Path) -> str:
    folder = str(tmp_path / "memory")
    assert main(["read", checkpoint, book, "--memory", folder]) == 0
    return folder


def test_reading_says_what_is_there_and_reads_nothing_twice(
    checkpoint: str, book: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory = str(tmp_path / "memory")
    assert main(["read", checkpoint, book, "--memory", memory]) == 0
    assert "1,280 tokens in 80 chunks" in capsys.readouterr().out
    assert main(["read", checkpoint, book, "--memory", memory]) == 0
    out = capsys.readouterr().out
    assert f"{book} was read before" in out
    assert "1,280 tokens" in out


def test_standard_input_is_read(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdin:
        buffer = io.BytesIO(b"some words " * 9)

    monkeypatch.setattr(sys, "stdin", Stdin)
    folder = tmp_path / "memory"
    assert main(["read", checkpoint, "-", "--memory", str(folder), "--dtype", "int8"]) == 0
    with DiskMemory.open(folder) as memory:
        assert memory.info()["tokens"] == 99
        assert memory.info()["dtype"] == "int8"


def test_a_question_is_answered_with_passages(
    checkpoint: str, book: str, memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    ask = ["ask", checkpoint, "What was the night? ", "--memory", memory, "--max-new-tokens", "5"]
    assert main([*ask, "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert len(reply["passages"]) == 8
    for passage in reply["passages"]:
        text = Path(book).read_text() if passage["source"] == book else "What was the night? "
        assert passage["source"] in (book, "")
        assert passage["text"] == text[passage["start"] : passage["end"]]
    assert any(passage["source"] == book for passage in reply["passages"])
    assert main(ask) == 0
    out = capsys.readouterr().out
    assert out.startswith(reply["answer"])
    assert f"{book} bytes " in out


def test_generating_is_repeatable(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for arguments in (
        ["--seed", "1", "--temperature", "0.9"],
        ["--seed", "1", "--temperature", "0.9"],
        ["--num-beams", "3", "--num-return-sequences", "2"],
    ):
        command = ["generate", checkpoint, "It was", "--max-new-tokens", "8", *arguments]
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[2].count("---\n") == 2


def test_a_memory_is_shown_verified_and_exported(
    memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["memory", "info", memory]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 80
    assert main(["memory", "verify", memory]) == 0
    assert "all 80 chunks are intact" in capsys.readouterr().out
    assert main(["memory", "export", memory, str(tmp_path / "out")]) == 0
    with import_safetensors(tmp_path / "out", tmp_path / "again") as again:
        assert len(again) == 80
    tokens = Path(memory) / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-40])
    assert main(["memory", "verify", memory]) == 2
    assert "logs 1270 tokens" in capsys.readouterr().err
    tokens.write_bytes(whole)
    sources = Path(memory) / "sources.jsonl"
    lines = sources.read_bytes()
    sources.write_bytes(b"")
    assert main(["memory", "verify", memory]) == 2
    assert "logs 0 sources, its state has" in capsys.readouterr().err
    sources.write_bytes(lines)
    records = next(Path(memory).glob("records.*.bin"))
    data = bytearray(records.read_bytes())
    data[5000] ^= 1
    records.write_bytes(data)
    assert main(["memory", "verify", memory]) == 2
    assert records.name in capsys.readouterr().err
    # Byte 5,000 is in a chunk from which on none is left; what was read goes with all 80.
    assert main(["memory", "repair", memory]) == 2
    said = capsys.readouterr()
    with DiskMemory.open(memory) as left:
        assert 0 < len(left) < 80
        assert f"{len(left)} chunks are intact and left" in said.out
        assert f"holds {len(left)} chunks, its state goes with 80" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "{model}", "nowhere.txt", "--memory", "{memory}"], "no file or folder nowhere"),
        (["read", "nowhere", "{book}", "--memory", "{memory}"], "nowhere holds no model"),
        (["read", "{model}", "{book}", "--memory", "{model}"], "is not empty and holds no memory"),
        (
            ["read", "{model}", "{book}", "--memory", "{memory}", "--dtype", "int8"],
            "is stored in torch.bfloat16, not int8",
        ),
        (["ask", "{model}", "", "--memory", "{memory}"], "the question is empty"),
        (["ask", "{model}", "x", "--memory", "{model}"], "no saved state"),
        (["generate", "{model}", ""], "the prompt is empty"),
        (["memory", "info", "{model}"], "manifest.json"),
    ],
)
def test_errors_are_one_line(
    checkpoint: str,
    book: str,
    memory: str,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    names = {"model": checkpoint, "book": book, "memory": memory}
    assert main([argument.format(**names) for argument in arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1


def test_lengths_have_units() -> None:
    from argparse import ArgumentTypeError

    from drt.cli.lengths import length

    assert [length(text) for text in ("100", "64K", "16m")] == [100, 65536, 16777216]
    for text in ("", "K", "1.5M", "-3", "0", "M16"):
        with pytest.raises(ArgumentTypeError, match="is no length"):
            length(text)
