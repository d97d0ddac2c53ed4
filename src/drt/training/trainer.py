"""transformers' Trainer, told what a needle batch is and when to lengthen the rows."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from tqdm import tqdm
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from drt.training.curriculum import Curriculum
from drt.training.optimizer import MuonWithAdamW, split_parameters

CURRICULUM_FILE = "curriculum.json"


class NeedleLosses(NamedTuple):
    """Mean next-token losses of a batch, in nats a token."""

    answer: Tensor
    """Of answer tokens."""
    first: Tensor
    """Of the first token of each answer: the one that no earlier token of it gives away."""
    text: Tensor
    """Of all other tokens."""


def needle_losses(losses: Tensor, answer_mask: Tensor) -> NeedleLosses:
    """The losses of a needle batch.

    Args:
        losses: (B, T - 1), of predicting the tokens 1 .. T - 1.
        answer_mask: (B, T) bool, as `drt.data.batch` makes it.
    """
    answer = answer_mask[:, 1:]
    first = answer & ~answer_mask[:, :-1]
    return NeedleLosses(losses[answer].mean(), losses[first].mean(), losses[~answer].mean())


class NeedleTrainer(Trainer):
    """Trains on needle batches.

    loss = answer + first_token_weight * first + text_loss_weight * text, each a mean.
    """

    def __init__(
        self,
        *,
        text_loss_weight: float,
        first_token_weight: float = 0.0,
        curriculum: Curriculum,
        optimizer_name: str = "adamw",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.optimizer_name = optimizer_name
        self.text_loss_weight = text_loss_weight
        self.first_token_weight = first_token_weight
        self.curriculum = curriculum
        self._sums = dict.fromkeys(("answer_loss", "first_token_loss", "text_loss"), 0.0)
        self._count = 0

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted losses; the curriculum hears of that of the answers."""
        given = {key: inputs[key] for key in ("input_ids", "chunk_ends", "labels")}
        outputs = model(**given, output_token_losses=True)
        losses = needle_losses(outputs.token_losses, inputs["answer_mask"])
        self.curriculum.observe(int(inputs["step"]), float(losses.answer.detach()))
        for name, value in zip(self._sums, losses, strict=True):
            self._sums[name] += float(value.detach())
        self._count += 1
        loss = (
            losses.answer
            + self.first_token_weight * losses.first
            + self.text_loss_weight * losses.text
        )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses and the row length to what is logged."""
        if "loss" in logs and self._count:
            logs.update({key: value / self._count for key, value in self._sums.items()})
            logs["length"] = self.curriculum.stage_at(self.state.global_step - 1).length
            self._sums = dict.fromkeys(self._sums, 0.0)
            self._count = 0
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW as the Trainer makes it, or Muon with AdamW."""
        if self.optimizer is not None or self.optimizer_name == "adamw":
            return super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        matrices, others = split_parameters(trained)
        self.optimizer = MuonWithAdamW(
            matrices,
            others,
            lr=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
        )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # Item i is the batch of step i: the order is the data.
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]


class MetricsFile(TrainerCallback):
    """Appends what is logged to metrics.jsonl, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop lines of steps that a resumed run will take again."""
        kept: list[str] = []
        if self.path.is_file() and state.global_step:
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.path.write_text("".join(line + "\n" for line in kept))
        before = json.loads(kept[-1])["seconds"] if kept else 0.0
        self.started = time.monotonic() - before

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Write one line: the step, what was logged, and seconds trained over all restarts."""
        if not logs or "train_runtime" in logs:
            return
        seconds = round(time.monotonic() - self.started, 2)
        record = {"step": state.global_step, **logs, "seconds": seconds}
        record.pop("epoch", None)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class CurriculumCheckpoint(TrainerCallback):
    """Puts the curriculum's progress into each checkpoint; written last, it marks a whole one."""

    def __init__(self, curriculum: Curriculum) -> None:
        self.curriculum = curriculum

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write curriculum.json beside the weights."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.curriculum.save(folder / CURRICULUM_FILE)


class NeedleProgress(TrainerCallback):
    """A progress bar with row length and losses; plain lines where there is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar at the step that training starts from."""
        steps, done = state.max_steps, state.global_step
        self.bar = tqdm(total=steps, initial=done, desc=self.title, unit="step", mininterval=1.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        self.bar.update(1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show row length and losses."""
        if logs and "answer_loss" in logs:
            shown = {"length": str(logs["length"]), "answers": f"{logs['answer_loss']:.3f}"}
            self.bar.set_postfix({**shown, "text": f"{logs['text_loss']:.3f}"}, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, or None."""
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{CURRICULUM_FILE}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
