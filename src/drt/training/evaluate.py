"""Evaluation while training runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from drt.data import Corpus
from drt.evaluation.needles import evaluate_needles
from drt.loss import IGNORED
from drt.modeling import DRTForCausalLM
from drt.precision import autocast
from drt.run_config import RunConfig
from drt.training.trainer import RunTrainer

# Enough to see a trend; the evaluation proper comes after training.
QUESTIONS = 16


class NeedleEvaluation(TrainerCallback):
    """Asks a few questions at the final row length and logs the scores.

    It draws no random numbers of torch's, so training goes on as if it had not been there.
    """

    def __init__(self, trainer: RunTrainer, config: RunConfig, corpus: Corpus) -> None:
        self.trainer, self.config, self.corpus = trainer, config, corpus

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let a model in shards gather its own parameters where a text is read, as in forward."""
        model = self.trainer.model
        if isinstance(model, FSDPModule) and isinstance(model, DRTForCausalLM):
            register_fsdp_forward_method(model, "read")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Evaluate every `evaluate_every` steps."""
        if state.global_step % self.config.training.evaluate_every:
            return
        with self.trainer.speed.pause():
            scores = self._scores()
        _log_beside(self.trainer, scores)

    def _scores(self) -> dict[str, float]:
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
                    chunk_size=self.config.chunk_size,
                    seed=evaluation.seed + 1,
                )
            scores[f"{name}_exact_match"] = score.exact_match
        model.train()
        return scores


class ValidationLoss(TrainerCallback):
    """Logs the mean loss of some rows, the same ones each time.

    Every process measures all of them.

    Args:
        trainer: whose model is measured.
        rows: what it reads, (T,) each, with `labels`.
        every: steps between measurements; the last step is measured too.
    """

    def __init__(
        self, trainer: RunTrainer, rows: Sequence[dict[str, torch.Tensor]], *, every: int
    ) -> None:
        self.trainer, self.rows, self.every = trainer, rows, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure at every `every`-th step and the last."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        with self.trainer.speed.pause():
            loss = self._loss(args.device)
        _log_beside(self.trainer, {"validation_loss": loss})

    @torch.no_grad()
    def _loss(self, device: torch.device) -> float:
        model: Any = self.trainer.model_wrapped
        total, count = 0.0, 0
        model.eval()
        for each in self.rows:
            row = {name: values[None].to(device) for name, values in each.items()}
            with self.trainer.compute_loss_context_manager():
                _, losses = self.trainer.token_losses(model, row)
            total += float(losses.double().sum())
            count += int((row["labels"][:, 1:] != IGNORED).sum())
        model.train()
        return total / count


def _log_beside(trainer: RunTrainer, scores: dict[str, float]) -> None:
    """Log scores, and leave the line of the step's own losses to be logged."""
    wanted = trainer.control.should_log
    trainer.log(scores)
    trainer.control.should_log = wanted
