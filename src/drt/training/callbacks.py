"""What happens beside training: metrics, a progress bar, what a checkpoint needs to go on."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from drt.memory.files import write_whole
from drt.run_config import CONFIG_FILE, RunConfig, save_config
from drt.training.curriculum import Curriculum
from drt.training.folder import read_metrics

PROGRESS_FILE = "progress.json"
"""In each checkpoint, written last and in full: a checkpoint without it is not whole."""


class MetricsFile(TrainerCallback):
    """Appends what is logged to metrics.jsonl, one JSON object a line, in the first process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Drop lines of steps that a resumed run will take again."""
        if not state.is_world_process_zero:
            return
        kept: list[dict[str, Any]] = []
        if self.path.is_file() and state.global_step:
            kept = [each for each in read_metrics(self.path) if each["step"] <= state.global_step]
        write_whole(self.path, "".join(json.dumps(each) + "\n" for each in kept))
        before = kept[-1]["seconds"] if kept else 0.0
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
        if not logs or "train_runtime" in logs or not state.is_world_process_zero:
            return
        seconds = round(time.monotonic() - self.started, 2)
        record = {"step": state.global_step, **logs, "seconds": seconds}
        record.pop("epoch", None)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


class CheckpointFiles(TrainerCallback):
    """Puts into each checkpoint what makes it a model to evaluate, and the curriculum's progress.

    Args:
        tokenizer: of the model.
        config: of the run.
        curriculum: of needle rows, if there is one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: RunConfig,
        curriculum: Curriculum | None,
    ) -> None:
        self.tokenizer, self.config, self.curriculum = tokenizer, config, curriculum

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Save and log as often as is asked for now: a checkpoint's state has what was before."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Log before each checkpoint, which holds no part of a mean."""
        control.should_log |= control.should_save

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Write them beside the weights, progress.json when all processes have written theirs."""
        PartialState().wait_for_everyone()
        if not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self.tokenizer.save_pretrained(folder)
        save_config(self.config, folder / CONFIG_FILE)
        file = folder / PROGRESS_FILE
        if self.curriculum is None:
            write_whole(file, "{}")
        else:
            self.curriculum.save(file)


class Progress(TrainerCallback):
    """A progress bar with row length and losses; plain lines where there is no terminal."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Open the bar at the step that training starts from."""
        steps, done = state.max_steps, state.global_step
        hidden = not state.is_world_process_zero
        self.bar = tqdm(
            total=steps, initial=done, desc=self.title, unit="step", mininterval=1.0, disable=hidden
        )

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
        if not logs or "loss" not in logs:
            return
        shown = {"loss": f"{logs['loss']:.3f}"}
        if "answer_loss" in logs:
            shown = {"length": str(logs["length"]), "answers": f"{logs['answer_loss']:.3f}"}
            shown["text"] = f"{logs['text_loss']:.3f}"
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Close the bar."""
        self.bar.close()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint under `folder`, or None."""
    whole = {step: path for step, path in _checkpoints(folder).items() if _is_whole(path)}
    return whole[max(whole)] if whole else None


def remove_cut_checkpoints(folder: Path) -> None:
    """Remove the checkpoints under `folder` whose writing was cut short."""
    for path in _checkpoints(folder).values():
        if not _is_whole(path):
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> dict[int, Path]:
    """By step; a copy that somebody has made is called otherwise."""
    named = ((path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*"))
    return {int(step): path for step, path in named if step.isdecimal() and path.is_dir()}


def _is_whole(checkpoint: Path) -> bool:
    return (checkpoint / PROGRESS_FILE).is_file()
