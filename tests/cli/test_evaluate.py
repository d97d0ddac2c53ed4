"""`drt eval` as a user types it: any checkpoints, any task, and errors in one line."""

import json
import lzma
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drt import DRTForCausalLM
from drt.checkpoints import load_checkpoint
from drt.cli.evaluate import _tasks
from drt.cli.main import main
from drt.data import byte_tokenizer
from drt.run_config import EvaluationConfig
from drt.testing import tiny_config

SETTINGS = ["--questions", "2", "--lengths", "128", "--set", "task.num_digits=2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A DRT and a Llama, saved as transformers saves them, and a haystack."""
    folder = tmp_path_factory.mktemp("models")
    llama = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    drt = tiny_config(vocab_size=258)
    for name, model in {"d": DRTForCausalLM(drt), "l": LlamaForCausalLM(llama)}.items():
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    text = folder / "text.txt"
    text.write_text("".join(f"Line {n} of a long and even text.\n" for n in range(800)))
    paths = {name: str(folder / name) for name in ("d", "l")}
    return {**paths, "text": str(text), "folder": str(folder)}


def test_models_side_by_side(models: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    file, figure = tmp_path / "records.json", tmp_path / "map.png"
    command = ["eval", models["d"], models["l"], "--task", "single", "--corpus", models["text"]]
    options = ["--seed", "3", "--json", str(file), "--figure", str(figure)]
    assert main([*command, *SETTINGS, "depths=[0.5]", *options]) == 0
    rows = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [
        ["d", "single", "exact", "@0.5"],
        ["d", "single", "95", "%"],
        ["d", "single", "questions", "2"],
        ["d", "single", "recall@K", "@0.5"],
        ["l", "single", "exact", "@0.5"],
        ["l", "single", "95", "%"],
        ["l", "single", "questions", "2"],
    ]
    content = json.loads(file.read_text())
    assert "torch" in content["hardware"]
    assert list(content["models"]) == ["d", "l"]
    for model in content["models"].values():
        settings = model["single"]["settings"]
        assert settings["seeds"] == [3]
        assert settings["task"]["num_digits"] == 2
        # The Llama has no chunks, so those of the DRT count.
        assert model["single"]["chunk_size"] == 16
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_models_in_the_precision_that_is_asked_for(models: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    command = ["eval", models["d"], models["l"], "--task", "single", "--corpus", models["text"]]
    options = ["--precision", "bfloat16", "--json", str(file)]
    assert main([*command, *SETTINGS, *options]) == 0
    records = json.loads(file.read_text())["models"]
    assert {record["single"]["precision"] for record in records.values()} == {"bfloat16"}
    loaded = load_checkpoint(models["l"], precision="bfloat16")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}
    loaded = load_checkpoint(models["l"], precision="float32")
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}


def test_any_needle_task(models: dict[str, str], capsys: Any) -> None:
    command = ["eval", models["l"], "--task", "needle", "--corpus", models["text"], *SETTINGS]
    assert main([*command, "task.kind=multi", "task.num_keys=2", "task.num_questions=2"]) == 0
    assert "l      multi" in capsys.readouterr().out


def test_lengths_that_a_model_cannot_read(models: dict[str, str], capsys: Any) -> None:
    command = ["eval", models["l"], "--corpus", models["text"], "--task", "single", "--questions"]
    command += ["1", "--lengths", "128", "512"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "256 positions (max_position_embeddings), 516 tokens need more; beyond_limit" in error
    assert main([*command, "--set", "beyond_limit=leave_out"]) == 0
    assert "l has positions for 256 tokens: 512 left out" in capsys.readouterr().out
    assert main([*command, "--set", "beyond_limit=go_on"]) == 0
    assert "l was made for 256 tokens and went on beyond" in capsys.readouterr().out


def test_what_was_measured_before_an_error_is_kept(
    models: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "records.json"
    command = ["eval", models["d"], models["l"], "--corpus", models["text"], "--json", str(file)]
    # Only the first of the models has as many positions.
    wanted = ["--task", "single", "--questions", "2", "--lengths", "128", "512"]
    assert main([*command, *wanted, "--set", "task.num_digits=2"]) == 2
    shown = capsys.readouterr()
    assert "has 256 positions" in shown.err
    assert [line.split()[0] for line in shown.out.splitlines()[2:]] == ["d"] * 4
    assert list(json.loads(file.read_text())["models"]) == ["d"]
    # The second of the tasks finds no room at this length.
    options = ["--questions", "2", "--lengths", "64", "--set", "task.num_digits=2"]
    assert main([*command, *options]) == 2
    assert [*json.loads(file.read_text())["models"]["d"]] == ["single"]
    assert "d      single  exact match" in capsys.readouterr().out


def test_a_task_asked_for_by_name_has_the_settings_of_the_run(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EvaluationConfig(lengths=[2**22], multi_up_to=1024, segment_size=777)
    run = SimpleNamespace(evaluation=settings, corpus=models["text"])
    monkeypatch.setattr("drt.cli.evaluate._first_run", lambda sources: run)
    asked = Namespace(
        task="multi", settings=[], questions=None, seed=None, lengths=None,
        corpus=None, memory=None, memory_dtype=None,
    )  # fmt: skip
    (task,) = _tasks(asked, []).values()
    assert (task.segment_size, task.corpus, task.lengths) == (777, models["text"], [2**22])
    asked.task = "all"
    assert list(_tasks(asked, [])) == ["single"]
    asked.lengths = [512, 1024, 2**20]
    made = _tasks(asked, [])
    assert (made["single"].lengths, made["multi"].lengths) == (asked.lengths, [512, 1024])


def test_tasks_are_listed(capsys: Any) -> None:
    assert main(["eval", "--list-tasks"]) == 0
    shown = capsys.readouterr().out
    assert "\nmulti: " in shown
    assert "  segment_size [4096]\n" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name at least one CHECKPOINT"),
        (["{d}", "{d}"], "is named twice"),
        (["{folder}"], "holds no model"),
        (["{d}", "--task", "singles"], "no task 'singles'; did you mean single"),
        (["{d}", "--task", "single", "--set", "depth=[0]"], "unknown key depth; did you mean"),
        (["{d}", "--set", "depths"], "a setting reads key=value, got 'depths'"),
        (["{d}", "--json", "nowhere/x.json"], "there is no folder nowhere to write x.json to"),
        (["{d}", "--figure", "nowhere/x.png"], "there is no folder nowhere to write x.png to"),
        (["{d}", "--json", "{folder}"], "is no regular file: name one"),
        (["{d}", "--json", "/dev/null"], "/dev/null is no regular file: name one"),
        (["{d}", "--json", "/dev/stdout"], "/dev/stdout is no regular file: name one"),
        (["{d}", "--task", "single", "--figure", "x.xyz"], "x.xyz: its ending must be one of"),
        (["{d}", "--task", "single", "--seed", "-1"], "seeds must be at least 0, got -1"),
        (["{d}", "--task", "babi", "--set", "facts=nowhere"], "no stories at nowhere"),
        (["{d}", "--lengths", "100"], "length is 100; it must be a multiple of chunk_size 16"),
        (["{d}", "--figure", "x.png"], "--figure draws one task: choose one of single, multi"),
        (["{d}", "--corpus", "no/such/file"], "no/such/file"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    models: dict[str, str], words: list[str], message: str, capsys: Any
) -> None:
    assert main(["eval", *(word.format(**models) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_trained_llama(real_data: Path, tmp_path: Path, capsys: Any) -> None:
    file, text = tmp_path / "records.json", tmp_path / "essays.jsonl"
    with lzma.open(real_data / "haystack" / "essays.jsonl.xz", "rt", encoding="utf-8") as rows:
        text.write_text(json.dumps({"text": json.loads(next(rows))["text"][:100_000]}))
    command = ["eval", str(real_data / "checkpoints" / "tinyllamas-stories260K")]
    command += ["--corpus", str(text), "--task", "single"]
    command += ["--lengths", "384", "--questions", "4", "--json", str(file)]
    assert main([*command, "--set", "begin_with_bos=true"]) == 0
    assert "tinyllamas-stories260K single" in capsys.readouterr().out
    record = json.loads(file.read_text())["models"]["tinyllamas-stories260K"]["single"]
    assert (record["first_token_id"], record["position_limit"]) == (1, 512)
    assert [row["n"] for row in record["scores"]] == [4]
