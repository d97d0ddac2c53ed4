"""Tasks by name: made from settings, listed, and the same for all models of a comparison."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from drt.data import NeedleTask
from drt.evaluation import tasks
from drt.evaluation.needle_evaluation import NeedleEvaluationTask
from drt.evaluation.tasks import (
    describe_tasks,
    for_models,
    make_task,
    parse_settings,
    task_class,
)
from drt.testing import tiny_config


@dataclass(frozen=True)
class Doubling:
    """Doubles.

    Nothing else.
    """

    number: int
    """What is
    doubled."""


def test_settings_are_laid_over_defaults() -> None:
    words = ["task.num_keys=3", "depths=[0, 0.5]", "seeds=[4]", "memory=disk"]
    task: Any = make_task("multi", {"lengths": [256], "seeds": [7]}, parse_settings(words))
    assert task.task == NeedleTask(kind="multi", num_keys=3, num_questions=6)
    assert (task.lengths, task.depths, task.seeds) == ([256], [0.0, 0.5], [4])
    assert (task.memory, task.questions) == ("disk", 64)
    assert make_task("needle") == make_task("single") == NeedleEvaluationTask()
    assert parse_settings(["lengths=[256, 512]", "lengths.1=1024"]) == {"lengths": [256, 1024]}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lengths"], "a setting reads key=value, got 'lengths'"),
        (["a=1", "a.b=2"], "a is a plain value"),
        (["a=[1"], "is not YAML"),
    ],
)
def test_settings_that_cannot_be_read(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_settings(words)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("singel", {}, "no task 'singel'; did you mean single"),
        ("single", {"depts": [0]}, "task single: unknown key depts; did you mean depths"),
        ("single", {"task": {"num_key": 1}}, "unknown key task.num_key; did you mean task.num_key"),
        ("single", {"lengths": []}, "lengths is empty"),
        ("single", {"seeds": []}, "seeds is empty"),
        ("single", {"depths": []}, "depths is empty"),
        ("single", {"depths": [0, 1.5]}, "depths must be from 0 to 1, got 1.5"),
        ("single", {"lengths": [64, -1]}, "lengths must be at least 1, got -1"),
        ("single", {"questions": 0}, "questions must be at least 1, got 0"),
        ("single", {"beyond_limit": "stop"}, "beyond_limit must be one of"),
        ("single", {"task": {"kind": "multi", "num_keys": 99}}, "num_keys is 99"),
    ],
)
def test_wrong_settings_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, settings)


def test_every_task_is_listed_with_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    needles = {name: tasks.TASKS[name] for name in ("single", "multi", "needle")}
    others = {"doubling": f"{__name__}:Doubling", "gone": "drt.no_such_module:Task"}
    monkeypatch.setattr(tasks, "TASKS", {**needles, **others})
    monkeypatch.setattr(tasks, "import_module", lambda name: _module(name))
    single, multi, needle, doubling, gone = describe_tasks().split("\n\n")
    assert single.startswith("single: Needles at several lengths")
    assert "  segment_size [4096]\n      Tokens of one forward" in single
    assert multi.splitlines()[1] == "  settings as of single"
    assert "num_keys: 6" in multi
    assert "segment_size" not in multi + needle
    assert doubling == "doubling: Doubles.\n  number\n      What is doubled."
    assert gone.startswith("gone: not available: No module named")


def _module(name: str) -> Any:
    import sys
    from importlib import import_module

    return sys.modules[name] if name == __name__ else import_module(name)


def test_questions_end_where_chunks_end_for_all_models(tmp_path: Path) -> None:
    shapes = {"a": tiny_config(), "b": tiny_config(chunk_size=24), "c": LlamaConfig()}
    for name, config in shapes.items():
        config.save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in shapes]
    task = make_task("single")
    assert for_models(task, folders).chunk_size == 48
    assert for_models(task, folders[2:]).chunk_size == 64
    assert for_models(make_task("single", {"chunk_size": 32}), folders).chunk_size == 32
    # A task without questions at chunk ends stays as it is.
    assert for_models(Doubling(3), folders) == Doubling(3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no model"):
        for_models(task, [tmp_path / "empty"])


@pytest.mark.parametrize("name", tasks.TASKS)
def test_every_setting_has_a_sentence(name: str) -> None:
    cls = task_class(name)
    assert set(tasks._sentences(cls)) >= {item.name for item in fields(cls)}
    assert callable(cls.evaluate)
    assert callable(cls.table)
