"""Needle evaluation while training runs."""

from __future__ import annotations

from typing import Any

from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from drt.data import Corpus
from drt.evaluation.needles import evaluate_needles
from drt.precision import autocast
from drt.run_config import RunConfig

# Enough to see a trend; the evaluation proper comes after training.
QUESTIONS = 16


class NeedleEvaluation(TrainerCallback):
    """Asks a few questions at the final row length and logs the scores.

    It draws no random numbers of torch's, so training goes on as if it had not been there.
    """

    def __init__(self, trainer: Trainer, config: RunConfig, corpus: Corpus) -> None:
        self.trainer, self.config, self.corpus = trainer, config, corpus

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate every `evaluate_every` steps."""
        if state.global_step % self.config.training.evaluate_every:
            return
        model: Any = self.trainer.model
        evaluation, scores = self.config.evaluation, {}
        for name, task in (("single", evaluation.single), ("multi", evaluation.multi)):
            with autocast(self.config.precision, model.device):
                score = evaluate_needles(
                    model,
                    self.corpus,
                    task=task,
                    length=self.config.train_length,
                    num_questions=QUESTIONS,
                    seed=evaluation.seed + 1,
                )
            scores[f"{name}_exact_match"] = score.exact_match
        model.train()
        self.trainer.log(scores)
