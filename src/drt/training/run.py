"""One training run from a configuration: data, model, Trainer, checkpoints, final model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers.training_args import TrainingArguments

from drt.data import Corpus
from drt.run_config import CONFIG_FILE, FINAL_FOLDER, RunConfig, save_config
from drt.training.arguments import training_arguments
from drt.training.batches import StepParts, first_part
from drt.training.callbacks import (
    PROGRESS_FILE,
    CheckpointFiles,
    MetricsFile,
    Progress,
    latest_checkpoint,
    remove_cut_checkpoints,
)
from drt.training.compilation import compile_layers
from drt.training.evaluate import NeedleEvaluation, ValidationLoss
from drt.training.folder import (
    INITIAL_CONFIG_FILE,
    METRICS_FILE,
    check_folder,
    check_same_run,
    initial_config,
    is_finished,
)
from drt.training.materials import Materials, make_materials
from drt.training.speed import speed_meter
from drt.training.trainer import RunTrainer

T = TypeVar("T")


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    title: str = "train",
    corpus: Corpus | None = None,
) -> Path:
    """Train a model and save it with its tokenizer.

    Under torchrun each process calls this; the first one writes.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in `config.output_dir`, if there is one; a
            run that is finished stays as it is. The number of processes may be another than before.
        overwrite: remove what an earlier run left in `config.output_dir`.
        title: what the progress bar is called.
        corpus: the haystack, when it is loaded already.

    Returns:
        The folder of the final model.

    Raises:
        ValueError: the folder holds an earlier run and neither `resume` nor `overwrite` is set, the
            run to resume had another configuration or is not seen by all processes, the rows of a
            step cannot be shared out, or model and data do not go together.
    """
    # While the first one gets data ready, the others wait.
    processes = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=1))
    folder = Path(config.output_dir)
    final, partial = folder / FINAL_FOLDER, folder / f"{FINAL_FOLDER}.partial"
    if resume and not overwrite:
        _check_shared(folder)
    if resume and not overwrite and is_finished(folder):
        _in_turn(lambda: check_same_run(folder, config), lambda: None)
        if processes.is_main_process:
            print(f"{folder} holds a finished run: there is nothing to resume")
        return final

    def prepare() -> tuple[Materials, TrainingArguments]:
        check_processes(config, processes.num_processes)
        materials = make_materials(config, corpus)
        if config.training.gradient_checkpointing:
            materials.model.gradient_checkpointing_enable()
        if config.training.compile_layers:
            compile_layers(materials.model)
        return materials, training_arguments(config, materials.model)

    def prepare_first() -> tuple[Materials, TrainingArguments]:
        check_folder(folder, config, resume=resume, overwrite=overwrite)
        prepared, initial = prepare(), initial_config(config)
        # Only now that the run can begin is anything removed or written.
        if overwrite:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / CONFIG_FILE)
        if initial is not None and latest_checkpoint(folder) is None:
            save_config(initial, folder / INITIAL_CONFIG_FILE)
        return prepared

    materials, args = _in_turn(prepare_first, prepare)
    trainer = _trainer(config, materials, args, title=title)
    checkpoint = latest_checkpoint(folder) if resume else None
    if resume and processes.is_main_process:
        # Of the newest that are kept it would take the place of a whole one.
        remove_cut_checkpoints(folder)
    if resume and checkpoint is None and processes.is_main_process:
        print(f"{folder} holds no checkpoint to resume from: training begins at step 0")
    if checkpoint is not None and materials.curriculum is not None:
        materials.curriculum.load(checkpoint / PROGRESS_FILE)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model(str(partial))
    if processes.is_main_process:
        materials.tokenizer.save_pretrained(partial)
        save_config(config, partial / CONFIG_FILE)
        # Renamed when it is whole: a folder of this name is a finished run.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    processes.wait_for_everyone()
    return final


def _in_turn(first: Callable[[], T], others: Callable[[], T]) -> T:
    """Run `first` in the first process and then `others` in each other; an error there ends all.

    Without it the others would wait for a process that is gone.
    """
    failure = [""]
    if PartialState().is_main_process:
        try:
            result = first()
        except Exception as error:
            broadcast_object_list([str(error) or repr(error)])
            raise
        broadcast_object_list(failure)
        return result
    broadcast_object_list(failure)
    if failure[0]:
        raise ValueError(failure[0])
    return others()


def _check_shared(folder: Path) -> None:
    """Refuse to go on with a run that processes on other machines do not see."""
    newest = getattr(latest_checkpoint(folder), "name", "none")
    here = FINAL_FOLDER if is_finished(folder) else newest
    seen = gather_object([here])
    if any(each != here for each in seen):
        raise ValueError(
            f"the processes do not see the same run in {folder} (newest there: "
            f"{', '.join(seen)}): machines that train together share output_dir"
        )


def check_processes(config: RunConfig, num_processes: int) -> None:
    """Refuse rows that cannot be shared out, and sharding where there is nothing to do it.

    Raises:
        ValueError: so many processes cannot train the run here.
    """
    parts = num_processes * config.training.num_micro_batches
    for length in config.row_lengths:
        rows = config.training.rows_per_step(length)
        if rows % parts:
            raise ValueError(
                f"{rows} rows of {length} tokens a step cannot be shared out over {num_processes} "
                f"processes with {config.training.num_micro_batches} micro-batches each"
            )
    if num_processes == 1 and torch.cuda.device_count() > 1:
        # The Trainer would spread the rows of a part over them in one process.
        raise ValueError(
            f"one process sees {torch.cuda.device_count()} GPUs: start one a GPU, with torchrun or "
            "--processes of a study, or choose one with CUDA_VISIBLE_DEVICES"
        )
    if config.training.sharding == "fsdp":
        if not torch.cuda.is_available():
            raise ValueError(
                "training.sharding is fsdp: accelerate shards on GPUs only and would train "
                "without; use none"
            )
        if num_processes == 1:
            raise ValueError(
                "training.sharding is fsdp: there is one process and nobody to share the model "
                "with; start several with torchrun, or use none"
            )


def _trainer(
    config: RunConfig, materials: Materials, args: TrainingArguments, *, title: str
) -> RunTrainer:
    training, model = config.training, materials.model
    trainer = RunTrainer(
        model=model,
        args=args,
        train_dataset=StepParts(
            materials.source,
            num_steps=training.num_steps,
            num_parts=args.world_size * training.num_micro_batches,
        ),
        data_collator=first_part,
        curriculum=materials.curriculum,
        optimizer_name=training.optimizer,
        speed=speed_meter(config, model, args),
    )
    _replace_callbacks(trainer, config, materials, title)
    return trainer


def _replace_callbacks(
    trainer: RunTrainer, config: RunConfig, materials: Materials, title: str
) -> None:
    """Our progress bar and files in place of the Trainer's printing."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(title))
    trainer.add_callback(MetricsFile(Path(config.output_dir) / METRICS_FILE))
    trainer.add_callback(CheckpointFiles(materials.tokenizer, config, trainer.curriculum))
    if config.training.evaluate_every and materials.corpus is not None:
        trainer.add_callback(NeedleEvaluation(trainer, config, materials.corpus))
    if materials.validation:
        every = config.training.evaluate_every
        trainer.add_callback(ValidationLoss(trainer, materials.validation, every=every))
