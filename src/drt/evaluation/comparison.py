"""One model at every length: what a table, a figure and results.json are made of."""

from __future__ import annotations

from functools import partial
from typing import Any

from tqdm import tqdm

from drt.data import Corpus, NeedleTask
from drt.evaluation.needles import NeedleScore, evaluate_needles, temporary_memory
from drt.modeling import DRTForCausalLM
from drt.run_config import EvaluationConfig

TASKS = ("single", "multi")


def questions_at(evaluation: EvaluationConfig, task: str, length: int) -> int:
    """How many questions of a task are asked at a length."""
    if task == "single" and length > evaluation.long_from:
        return evaluation.num_questions_longest
    return evaluation.num_questions


def score_by_length(
    model: DRTForCausalLM,
    corpus: Corpus,
    evaluation: EvaluationConfig,
    *,
    title: str,
    tasks: tuple[str, ...] = TASKS,
) -> dict[str, list[NeedleScore]]:
    """Score a model on its tasks at every length, shortest first, with a progress bar."""
    plan = [
        (task, length)
        for length in sorted(evaluation.lengths)
        for task in tasks
        if task == "single" or length <= evaluation.multi_up_to
    ]
    scores: dict[str, list[NeedleScore]] = {task: [] for task in tasks}
    # Long contexts take the time: the bar counts tokens read.
    total = sum(_contexts(evaluation, *item) * item[1] for item in plan)
    with tqdm(total=total, desc=title, unit="token", unit_scale=True, mininterval=1.0) as bar:
        for task, length in plan:
            bar.set_postfix(task=task, length=length, refresh=False)
            score = evaluate_needles(
                model,
                corpus,
                task=_task(evaluation, task),
                length=length,
                num_questions=questions_at(evaluation, task, length),
                seed=evaluation.seed,
                segment_size=evaluation.segment_size,
                new_memory=partial(temporary_memory, evaluation.memory, evaluation.memory_dtype),
                on_context=lambda tokens: bar.update(tokens),
            )
            scores[task].append(score)
    return scores


def _task(evaluation: EvaluationConfig, name: str) -> NeedleTask:
    return evaluation.single if name == "single" else evaluation.multi


def _contexts(evaluation: EvaluationConfig, task: str, length: int) -> int:
    """Contexts read for a task at a length; questions of one example share a context."""
    chosen = _task(evaluation, task)
    per_context = min(chosen.num_questions, chosen.num_keys)
    return -(-questions_at(evaluation, task, length) // per_context)


def as_records(scores: dict[str, list[NeedleScore]]) -> dict[str, Any]:
    """The scores as JSON-ready lists of mappings."""
    return {task: [score._asdict() for score in row] for task, row in scores.items()}


def format_table(models: dict[str, dict[str, Any]]) -> str:
    """A plain-text table of exact match and recall by length, for all models and tasks.

    Args:
        models: name -> record with "single" and "multi" lists, as in results.json.
    """
    lengths = sorted(
        {
            row["length"]
            for model in models.values()
            for task in TASKS
            for row in model.get(task, [])
        }
    )
    head = f"{'model':<10} {'task':<7} {'figure':<12}" + "".join(f"{n:>10,}" for n in lengths)
    lines = [head, "-" * len(head)]
    for name, model in models.items():
        for task in TASKS:
            rows = {row["length"]: row for row in model.get(task, [])}
            for figure, label in (("exact_match", "exact match"), ("recall", "recall@K")):
                values = [rows[n][figure] if n in rows else None for n in lengths]
                if any(value is not None for value in values):
                    cells = "".join(f"{_cell(value):>10}" for value in values)
                    lines.append(f"{name:<10} {task:<7} {label:<12}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
