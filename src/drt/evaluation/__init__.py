"""Evaluation: needles by length, and what a run shows of itself."""

from drt.evaluation.needles import NeedleScore, ask, evaluate_needles

__all__ = ["NeedleScore", "ask", "evaluate_needles"]
