"""`drt read`, `ask`, `generate` and `memory` when something is wrong."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from drt import DRTForCausalLM
from drt.cli.main import main
from drt.data.tokenization import byte_tokenizer
from drt.ingestion import Ingestion
from drt.passages import PassageLog
from drt.testing import tiny_config


def save(folder: Path, **fields: Any) -> str:
    torch.manual_seed(0)
    DRTForCausalLM(tiny_config(**{"vocab_size": 258, **fields})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    return save(tmp_path / "model")


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"The pass key of {name} is 12345. " * 20)
    return [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


@pytest.mark.parametrize("groups", [[1, 1], []], ids=["groups", "groupless"])
def test_what_was_read_is_not_read_again(
    tmp_path: Path, texts: list[str], groups: list[int], capsys: Any
) -> None:
    model, memory = save(tmp_path / "model", retrieval_groups=groups), str(tmp_path / "memory")
    assert main(["read", model, texts[0], "--memory", memory]) == 0
    assert main(["read", model, *texts, "--memory", memory]) == 0
    assert "a.txt was read before" in capsys.readouterr().out
    other = save(tmp_path / "other", retrieval_groups=groups, initializer_range=0.1)
    assert main(["read", other, *texts, "--memory", memory]) == 2
    assert "made by another model" in capsys.readouterr().err


def test_a_memory_of_nothing_is_asked_by_any_number_and_keeps_its_dtype(
    tmp_path: Path, texts: list[str], checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").touch()
    memory = tmp_path / "memory"
    assert main(["read", checkpoint, str(tmp_path / "empty.txt"), "--memory", str(memory)]) == 0
    with (memory / "lock").open("a+") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        asked = ["ask", checkpoint, "What? ", "--memory", str(memory), "--max-new-tokens", "1"]
        assert main(asked) == 0
    capsys.readouterr()
    assert main(["memory", "info", str(memory)]) == 0
    assert json.loads(capsys.readouterr().out)["chunks"] == 0
    assert main(["memory", "verify", str(memory)]) == 0
    assert "no chunk is full yet" in capsys.readouterr().out
    assert main(["memory", "export", str(memory), str(tmp_path / "exported")]) == 2
    assert "no chunk yet: there is nothing to export" in capsys.readouterr().err
    # Without a manifest it is no text either.
    assert main(["read", checkpoint, str(memory), "--memory", str(tmp_path / "new")]) == 2
    assert "it holds what drt has made of text" in capsys.readouterr().err
    kept = tmp_path / "kept"
    for dtype, text in (("int8", tmp_path / "empty.txt"), (None, texts[0])):
        given = ["--dtype", dtype] if dtype else []
        assert main(["read", checkpoint, str(text), "--memory", str(kept), *given]) == 0
    assert main(["read", checkpoint, texts[0], "--memory", str(memory), "--dtype", "int8"]) == 0
    for folder in (memory, kept):
        assert '"dtype": "int8"' in (folder / "manifest.json").read_text()


def test_an_answer_from_an_unfinished_memory_says_that_it_is_not_exact(
    tmp_path: Path, texts: list[str], checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    memory = str(tmp_path / "memory")
    read = ["read", checkpoint, *texts, "--memory", memory, "--segment-size", "64"]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ingestion, "_commit_if_due", lambda self: (self.commit(), stop()))
        assert main(read) == 130
    asked = ["ask", checkpoint, "What? ", "--memory", memory, "--max-new-tokens", "1"]
    capsys.readouterr()
    for note in (True, False):
        assert main(asked) == 0
        assert ("answer and passages are near the model's own" in capsys.readouterr().out) == note
        assert main(read) == 0
        capsys.readouterr()


def test_an_answer_ends_before_the_stop(
    tmp_path: Path, texts: list[str], checkpoint: str, capsys: Any
) -> None:
    memory = str(tmp_path / "memory")
    assert main(["read", checkpoint, *texts, "--memory", memory]) == 0
    asked = ["ask", checkpoint, "What is it? ", "--memory", memory, "--max-new-tokens", "30"]
    asked.append("--json")

    def answer(*stop: str) -> str:
        capsys.readouterr()
        assert main([*asked, *stop]) == 0
        return json.loads(capsys.readouterr().out)["answer"]

    whole = answer()
    # Bytes that are no text stand in the answer as U+FFFD, and are nothing to stop at.
    stop = next(char for char in whole[1:] if char.isascii() and char != whole[0])
    assert answer(f"--stop={stop}") == whole[: whole.index(stop)]


def test_a_memory_below_the_folder_that_is_read_is_no_text(
    tmp_path: Path, texts: list[str], checkpoint: str, capsys: Any
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for text in texts:
        Path(text).rename(folder / Path(text).name)
    memory = folder / "memory"
    for _ in range(2):
        assert main(["read", checkpoint, str(folder), "--memory", str(memory)]) == 0
    assert "sources.jsonl" not in capsys.readouterr().out
    assert main(["read", checkpoint, str(memory), "--memory", str(memory)]) == 2
    assert "it holds what drt has made of text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokens.bin", "chunks.bin", "sources.jsonl"])
def test_a_cut_log_is_refused_and_left_as_it_is(
    tmp_path: Path, texts: list[str], checkpoint: str, name: str, capsys: Any
) -> None:
    memory = tmp_path / "memory"
    assert main(["read", checkpoint, texts[0], "--memory", str(memory)]) == 0
    (memory / name).write_bytes(cut := (memory / name).read_bytes()[:-1])
    assert main(["read", checkpoint, texts[1], "--memory", str(memory)]) == 2
    assert f"{name}" in capsys.readouterr().err
    assert (memory / name).read_bytes() == cut
    if name == "sources.jsonl":
        with pytest.raises(ValueError, match=r"sources\.jsonl was cut"):
            PassageLog(memory).passage(0)


def test_a_model_smaller_than_its_tokenizer_and_cut_weights(tmp_path: Path, capsys: Any) -> None:
    assert main(["generate", save(tmp_path / "small", vocab_size=100), "zzz"]) == 2
    assert "has 258 entries, its model 100" in capsys.readouterr().err
    weights = Path(save(tmp_path / "cut")) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["generate", str(weights.parent), "zzz"]) == 2
    assert "are damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-beams", "0"], "num_beams must be at least 1, got 0"),
        (["--num-return-sequences", "-1"], "num_return_sequences must be at least 1, got -1"),
        (["--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["--temperature", "0"], "temperature must be above 0, got 0.0"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    assert main(["generate", str(tmp_path), "x", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_standard_input_that_is_no_text(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"abc\xff")))
    assert main(["generate", checkpoint, "-"]) == 2
    assert "standard input is not UTF-8: invalid start byte at byte 3" in capsys.readouterr().err
