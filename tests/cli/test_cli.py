"""The commands as a user types them, on a run small enough for a test."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from drt.cli.main import main, parse

TASK = {"kind": "single", "num_questions": 1, "num_digits": 2}


@pytest.fixture
def config(tmp_path: Path, small_model: dict[str, Any]) -> Path:
    data = {
        "output_dir": str(tmp_path / "run"),
        "model": small_model,
        "training": {"num_steps": 4, "tokens_per_step": 128, "evaluate_every": 2},
        "stages": [{"length": 128, "tasks": [{"task": TASK}]}],
        "evaluation": {
            "lengths": [128, 512],
            "single": TASK,
            "multi": {"kind": "multi", "num_keys": 2, "num_questions": 2, "num_digits": 2},
            "questions": 4,
            "questions_longest": 2,
            "long_from": 256,
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def baseline(config: Path) -> Path:
    path = config.parent / "baseline.yaml"
    path.write_text(yaml.safe_dump({"extends": "config.yaml", "model": {"retrieval_groups": []}}))
    return path


def test_overrides_stand_anywhere(config: Path, capsys: Any) -> None:
    assert parse(["train", "x", "a=1", "--resume", "b=2"]).overrides == ["a=1", "b=2"]
    assert main(["train", str(config), "--overwrite", "training.num_step=1"]) == 2
    assert "unknown key training.num_step; did you mean" in capsys.readouterr().err
    for words in (["train", "x", "--resume", "a=1", "-x"], ["generate", "x", "prompt", "a=1"]):
        with pytest.raises(SystemExit):
            main(words)
        assert "unrecognized arguments: a=1" in capsys.readouterr().err


def test_train_then_eval(config: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config)]) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert main(["train", str(config), "--resume"]) == 0
    scores = tmp_path / "scores.json"
    arguments = ["eval", str(tmp_path / "run"), "--lengths", "256", "--questions", "2"]
    for task in ("single", "multi"):
        assert main([*arguments, "--task", task]) == 0
        assert f"{task}  " in capsys.readouterr().out
    assert main([*arguments, "--json", str(scores)]) == 0
    assert "exact match" in capsys.readouterr().out
    record = json.loads(scores.read_text())["models"]["run"]
    for task in ("single", "multi"):
        (row,) = record[task]["scores"]
        assert (row["length"], row["n"]) == (256, 2)
        # As in the run's own evaluation.
        assert record[task]["settings"]["task"]["num_digits"] == 2


def test_bfloat16_from_training_to_evaluation(config: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "low"
    assert main(["train", str(config), f"output_dir={folder}", "precision=bfloat16"]) == 0
    assert main(["eval", str(folder), "--lengths", "256", "--questions", "2"]) == 0
    assert "exact match" in capsys.readouterr().out


def test_demo_writes_results_figure_and_report(
    config: Path, baseline: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "demo"
    arguments = ["demo", "--config", str(config), "--baseline", str(baseline)]
    assert main([*arguments, "--output", str(output), "seed=3"]) == 0
    results = json.loads((output / "results.json").read_text())
    assert results["train_length"] == 128
    assert results["seed"] == 3
    assert results["peak_rss_bytes"] > 0
    assert set(results["models"]) == {"drt", "baseline"}
    for name, model in results["models"].items():
        assert model["parameters"] > 0
        assert [(row["length"], row["n"]) for row in model["single"]] == [(128, 4), (512, 2)]
        assert [(row["length"], row["n"]) for row in model["multi"]] == [(128, 4), (512, 4)]
        for row in model["single"] + model["multi"]:
            assert 0 <= row["exact_match"] <= 1
            assert row["seconds_per_example"] > 0
            assert (row["recall"] is None) == (name == "baseline")
    assert (output / "figure.png").read_bytes().startswith(b"\x89PNG")
    report = (output / "report.html").read_text()
    assert "data:image/png;base64" in report
    assert "What was retrieved" in report
    assert "http" not in report.replace("http-equiv", "")
    # The same command again uses what is there; --overwrite does not.
    capsys.readouterr()
    assert main([*arguments, "--output", str(output), "seed=3"]) == 0
    assert "holds a trained model" in capsys.readouterr().out
    changes = ["seed=3", "evaluation.multi_up_to=256", "evaluation.memory=disk"]
    assert main([*arguments, "--output", str(output), "--max-length", "1K", *changes]) == 0
    drt = json.loads((output / "results.json").read_text())["models"]["drt"]
    assert [row["length"] for row in drt["single"]] == [128, 512, 1024]
    assert [row["length"] for row in drt["multi"]] == [128]
    assert main([*arguments, "--output", str(output), "seed=4"]) == 2
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.lengths=[128,200]", "evaluation: .*200"),
        ("evaluation.lengths=[]", "evaluation.lengths is empty"),
        ("evaluation.questions=0", "evaluation.questions must be at least 1, got 0"),
        ("evaluation.single.num_digits=18", "evaluation: "),
    ],
)
def test_a_demo_checks_its_questions_before_it_trains(
    config: Path, baseline: Path, tmp_path: Path, capsys: Any, change: str, message: str
) -> None:
    arguments = ["demo", "--config", str(config), "--baseline", str(baseline)]
    changes = [change, "evaluation.lengths=[64]"] if "digits" in change else [change]
    assert main([*arguments, "--output", str(tmp_path / "demo"), *changes]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "demo").exists()


def test_a_demo_shows_an_answer_in_the_precision_of_its_scores(
    config: Path, baseline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from drt import demo

    seen: list[bool] = []
    inspect = demo.inspect_question

    def watched(model: Any, *given: Any, **named: Any) -> Any:
        seen.append(torch.is_autocast_enabled(model.device.type))
        return inspect(model, *given, **named)

    monkeypatch.setattr(demo, "inspect_question", watched)
    arguments = ["demo", "--config", str(config), "--baseline", str(baseline)]
    changes = ["precision=bfloat16", "training.num_steps=1", "evaluation.lengths=[128]"]
    assert main([*arguments, "--output", str(tmp_path / "demo"), *changes]) == 0
    assert seen == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere.yaml"], "no configuration file nowhere.yaml; shipped ones: demo"),
        (["train", "demo", "training.steps=3"], "unknown key training.steps"),
        (["eval", "nowhere"], "nowhere holds no model"),
        (["demo", "--corpus", "no/such #1: x", "--output", "{tmp}/d"], "no/such #1: x"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    assert main([word.replace("{tmp}", str(tmp_path)) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["sing"]])
def test_help_and_unknown_commands(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == (0 if "--help" in arguments else 2)
    shown = capsys.readouterr()
    assert "drt" in shown.out + shown.err


def test_ctrl_c_is_not_a_traceback(
    config: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import drt.training

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drt.training, "train", interrupted)
    assert main(["train", str(config)]) == 130
    assert "stopped" in capsys.readouterr().err
