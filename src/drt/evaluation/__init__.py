"""Evaluation: what a model makes of a text, needles by length, and what a run shows of itself."""

from drt.evaluation.needles import NeedleScore, ScoredAnswer, ask, evaluate_needles
from drt.evaluation.reading import Answer, Reading, start_reading

__all__ = [
    "Answer",
    "NeedleScore",
    "Reading",
    "ScoredAnswer",
    "ask",
    "evaluate_needles",
    "start_reading",
]
