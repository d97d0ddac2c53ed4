"""Evaluation tasks by name: what `drt eval` and studies measure, and how it is set.

A task is a frozen dataclass. Its fields, a sentence under each, are its settings; `evaluate` takes
a checkpoint and returns a JSON-ready record, `table` shows the records of several models,
`draw`, where a task has it, draws them. Before a model is loaded or trained, `check_data` refuses
what is not there and `check_model` what a model with this tokenizer and configuration could not do,
where a task has them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, get_origin, get_type_hints

import yaml
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from drt.checkpoints import Checkpoint, load_model_config
from drt.evaluation.needles import common_chunk_size
from drt.run_config import apply_override, build, overlay
from drt.unknown_keys import did_you_mean

TASKS: dict[str, str] = {
    "single": "drt.evaluation.needle_evaluation:NeedleEvaluationTask",
    "multi": "drt.evaluation.needle_evaluation:MultiNeedleEvaluationTask",
    "needle": "drt.evaluation.needle_evaluation:NeedleEvaluationTask",
    "perplexity": "drt.evaluation.perplexity:PerplexityTask",
    "babi": "drt.evaluation.babi:BabiTask",
    "summarization": "drt.evaluation.summarization:SummarizationTask",
    "cost": "drt.evaluation.cost:CostTask",
}
"""Name -> "module:class"; a module is imported when its task is asked for."""


class EvaluationTask(Protocol):
    """What every class that `TASKS` names offers."""

    def evaluate(self, checkpoint: Checkpoint, *, title: str) -> dict[str, Any]:
        """A JSON-ready record of what was measured; progress is shown under the title."""
        ...

    @staticmethod
    def table(records: dict[str, dict[str, Any]]) -> str:
        """Plain text, one row or more a model; the records are by model name."""
        ...


def task_class(name: str) -> type[Any]:
    """The class of a task.

    Raises:
        ValueError: no task is called so.
        ImportError: it needs a library that is not installed.
    """
    if name not in TASKS:
        hint = did_you_mean(name, TASKS)
        raise ValueError(f"no task {name!r}{hint}; tasks are {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)


def make_task(name: str, *settings: Mapping[str, Any]) -> EvaluationTask:
    """A task with some settings changed.

    Args:
        name: one of `TASKS`.
        *settings: field -> value, later ones over earlier ones; a mapping changes part of a field
            that is a mapping itself.

    Raises:
        ValueError: no such task or setting, or a value of the wrong type or out of range.
        ImportError: as `task_class`.
    """
    cls = task_class(name)
    wanted = _defaults(cls)
    for layer in settings:
        wanted = overlay(wanted, dict(layer))
    try:
        return build(cls, wanted)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}") from error


def check_data(task: Any) -> None:
    """Raise the ValueError, or ImportError, of a task that reads what is not there."""
    if hasattr(task, "check_data"):
        task.check_data()


def check_model(task: Any, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Raise the ValueError of a task that a model cannot do, as far as is known without it."""
    if hasattr(task, "check_model"):
        task.check_model(tokenizer, config)


def parse_settings(words: Iterable[str]) -> dict[str, Any]:
    """Settings from "key=value" words: dotted keys reach into mappings, values are YAML.

    Raises:
        ValueError: as `apply_override`.
    """
    settings: dict[str, Any] = {}
    for word in words:
        apply_override(settings, word, noun="setting")
    return settings


def for_models(task: Any, models: Iterable[str | Path]) -> Any:
    """The task with questions that end where chunks end for all of the models.

    Args:
        task: any task; only one with an unset `chunk_size` changes.
        models: folders that hold config.json, or names on the hub.

    Raises:
        ValueError: a model that transformers cannot load.
    """
    if getattr(task, "chunk_size", 0) is not None:
        return task
    size = common_chunk_size([load_model_config(Path(model)) for model in models])
    return replace(task, chunk_size=size)


def describe_tasks() -> str:
    """All tasks with their settings, as text; a task like an earlier one is described by it."""
    shown: dict[str, type[Any]] = {}
    parts = []
    for name in TASKS:
        try:
            cls = task_class(name)
        except ImportError as error:
            parts.append(f"{name}: not available: {error}")
            continue
        like = next((earlier for earlier, base in shown.items() if issubclass(cls, base)), None)
        parts.append(_describe(name, cls, like, {} if like is None else _defaults(shown[like])))
        shown.setdefault(name, cls)
    return "\n\n".join(parts)


def _describe(name: str, cls: type[Any], like: str | None, known: Mapping[str, Any]) -> str:
    """A task with the settings whose defaults are not known already."""
    purpose = (inspect.getdoc(cls) or "").partition("\n\n")[0]
    lines = [f"{name}: {purpose}"]
    if like is not None:
        lines.append(f"  settings as of {like}")
    sentences, hints = _sentences(cls), get_type_hints(cls)
    for item in fields(cls):
        default = _default(item)
        if item.name in known and known[item.name] == default:
            continue
        shown = "" if default is MISSING else f" [{_short(default)}]"
        if get_origin(hints[item.name]) is Literal:
            shown += f", one of {', '.join(map(_short, get_args(hints[item.name])))}"
        lines.append(f"  {item.name}{shown}")
        lines += textwrap.wrap(sentences.get(item.name, ""), 92, **_INDENTED)
    return "\n".join(lines)


_INDENTED: dict[str, Any] = {"initial_indent": "      ", "subsequent_indent": "      "}


def _sentences(cls: type) -> dict[str, str]:
    """What stands under each field of a dataclass and of those it is derived from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(body, ast.ClassDef)
        for item, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[item.target.id] = " ".join(str(after.value.value).split())
    return found


def _short(value: Any) -> str:
    """A default as YAML on one line, mappings without what is None."""
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None}
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10000)
    return text.removesuffix("\n").removesuffix("\n...")


def _default(item: Field[Any]) -> Any:
    """A field's default, dataclasses as mappings; MISSING if it has none."""
    made = item.default if item.default_factory is MISSING else item.default_factory()
    return asdict(made) if is_dataclass(made) and not isinstance(made, type) else made


def _defaults(cls: type) -> dict[str, Any]:
    made = {item.name: _default(item) for item in fields(cls)}
    return {name: value for name, value in made.items() if value is not MISSING}
