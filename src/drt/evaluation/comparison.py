"""One model at every length: what a table, a figure and results.json are made of."""

from __future__ import annotations

from typing import Any

from drt.data import Corpus
from drt.evaluation.needle_evaluation import NeedleEvaluationTask, as_rows, format_scores
from drt.evaluation.needles import NeedleScore
from drt.run_config import EvaluationConfig

TASKS = ("single", "multi")


def needle_evaluations(evaluation: EvaluationConfig) -> dict[str, NeedleEvaluationTask]:
    """What a run's configuration has evaluated: "single", and "multi" where lengths are left."""
    multi_lengths = [length for length in evaluation.lengths if length <= evaluation.multi_up_to]
    common: dict[str, Any] = {
        "questions": evaluation.questions,
        "long_from": evaluation.long_from,
        "seeds": [evaluation.seed],
        "memory": evaluation.memory,
        "memory_dtype": evaluation.memory_dtype,
        "segment_size": evaluation.segment_size,
    }
    found = {
        "single": NeedleEvaluationTask(
            task=evaluation.single,
            lengths=evaluation.lengths,
            questions_longest=evaluation.questions_longest,
            **common,
        )
    }
    if multi_lengths:
        found["multi"] = NeedleEvaluationTask(
            task=evaluation.multi,
            lengths=multi_lengths,
            questions_longest=evaluation.questions,
            **common,
        )
    return found


def score_by_length(
    model: Any, corpus: Corpus, evaluation: EvaluationConfig, *, title: str
) -> dict[str, list[NeedleScore]]:
    """Score a model on both tasks at every length, shortest first, with progress bars."""
    scores: dict[str, list[NeedleScore]] = {task: [] for task in TASKS}
    for task, asked in needle_evaluations(evaluation).items():
        scores[task] = asked.score(model, corpus, title=f"{title}, {task}")
    return scores


def as_records(scores: dict[str, list[NeedleScore]]) -> dict[str, Any]:
    """The scores as JSON-ready lists of mappings."""
    return {task: as_rows(row) for task, row in scores.items()}


def format_table(models: dict[str, dict[str, Any]]) -> str:
    """A plain-text table of exact match and recall by length, for all models and tasks.

    Args:
        models: name -> record with "single" and "multi" lists, as in results.json.
    """
    return format_scores(
        {
            name: {task: model[task] for task in TASKS if task in model}
            for name, model in models.items()
        }
    )
