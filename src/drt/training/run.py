"""One training run from a configuration: data, model, Trainer, checkpoints, final model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.training_args import TrainingArguments

from drt.data import Corpus
from drt.precision import uses_bfloat16
from drt.run_config import CONFIG_FILE, RunConfig, load_config, save_config
from drt.training.batches import StepParts, first_part
from drt.training.callbacks import (
    PROGRESS_FILE,
    MetricsFile,
    Progress,
    ProgressCheckpoint,
    latest_checkpoint,
)
from drt.training.compilation import compile_layers
from drt.training.evaluate import NeedleEvaluation, ValidationLoss
from drt.training.materials import Materials, make_materials, rows_per_step
from drt.training.trainer import RunTrainer

FINAL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"


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
        resume: go on from the newest whole checkpoint in `config.output_dir`, if there is one. The
            number of processes may be another than before.
        overwrite: remove what an earlier run left in `config.output_dir`.
        title: what the progress bar is called.
        corpus: the haystack, when it is loaded already.

    Returns:
        The folder of the final model.

    Raises:
        ValueError: the folder holds an earlier run and neither `resume` nor `overwrite` is set, the
            run to resume had another configuration, the rows of a step cannot be shared out, or
            model and data do not go together.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    folder = Path(config.output_dir)
    with processes.main_process_first():
        # The others find the folder as the first one has left it, and it has checked.
        if processes.is_main_process:
            _check_folder(folder, config, resume=resume, overwrite=overwrite)
        _check_processes(config, processes.num_processes)
        materials = make_materials(config, corpus)
        if processes.is_main_process:
            # Only now that the run can begin is anything removed or written.
            if overwrite:
                shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            save_config(config, folder / CONFIG_FILE)
    trainer = _trainer(config, materials, num_processes=processes.num_processes, title=title)
    checkpoint = latest_checkpoint(folder) if resume else None
    if checkpoint is not None and materials.curriculum is not None:
        materials.curriculum.load(checkpoint / PROGRESS_FILE)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final, partial = folder / FINAL_FOLDER, folder / f"{FINAL_FOLDER}.partial"
    trainer.save_model(str(partial))
    if processes.is_main_process:
        materials.tokenizer.save_pretrained(partial)
        save_config(config, partial / CONFIG_FILE)
        # Renamed when it is whole: a folder of this name is a finished run.
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    processes.wait_for_everyone()
    return final


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end."""
    return (folder / FINAL_FOLDER / CONFIG_FILE).is_file()


def training_seconds(folder: Path) -> float:
    """Wall seconds that the run in this folder has trained, over all its restarts."""
    lines = (folder / METRICS_FILE).read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


def _check_processes(config: RunConfig, num_processes: int) -> None:
    """Refuse rows that cannot be shared out, and sharding where there is nothing to do it."""
    parts = num_processes * config.training.num_micro_batches
    for length in config.row_lengths:
        rows = rows_per_step(config, length)
        if rows % parts:
            raise ValueError(
                f"{rows} rows of {length} tokens a step cannot be shared out over {num_processes} "
                f"processes with {config.training.num_micro_batches} micro-batches each"
            )
    if config.training.sharding == "fsdp" and not torch.cuda.is_available():
        raise ValueError(
            "training.sharding is fsdp: accelerate shards on GPUs only and would train without; "
            "use none"
        )


def _check_folder(folder: Path, config: RunConfig, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds another run, or anything else."""
    if (folder / CONFIG_FILE).is_file():
        if not (resume or overwrite):
            raise ValueError(
                f"{folder} holds an earlier run: resume it, overwrite it or choose another folder"
            )
        if not overwrite:
            check_same_run(folder, config)
    elif folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no run of this program")


def check_same_run(folder: Path, config: RunConfig) -> None:
    """Refuse to go on with a run that was trained with another configuration.

    What it is asked afterwards, its `evaluation`, may differ.
    """
    file = folder / CONFIG_FILE
    if replace(load_config(file), evaluation=config.evaluation) != config:
        raise ValueError(
            f"the run in {folder} has another configuration, see {file}: "
            "overwrite it or choose another folder"
        )


def _trainer(
    config: RunConfig, materials: Materials, *, num_processes: int, title: str
) -> RunTrainer:
    training, model = config.training, materials.model
    if training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if training.compile_layers:
        compile_layers(model)
    trainer = RunTrainer(
        model=model,
        args=_arguments(config),
        train_dataset=StepParts(
            materials.source,
            num_steps=training.num_steps,
            num_parts=num_processes * training.num_micro_batches,
        ),
        data_collator=first_part,
        curriculum=materials.curriculum,
        optimizer_name=training.optimizer,
        tokens_per_step=training.tokens_per_step,
    )
    _replace_callbacks(trainer, config, materials, title)
    return trainer


def _arguments(config: RunConfig) -> TrainingArguments:
    training = config.training
    sharding = {} if training.sharding == "none" else _FSDP
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=training.num_steps,
        # A part of a step is one item.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=training.num_micro_batches,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": training.final_learning_rate},
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        adam_beta2=training.adam_beta2,
        max_grad_norm=training.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=uses_bfloat16(config.precision),
        logging_steps=training.log_every,
        save_steps=training.save_every,
        save_total_limit=2,
        seed=config.seed,
        report_to=["tensorboard"] if training.tensorboard else "none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        # Each process takes its own parts.
        accelerator_config={"dispatch_batches": False, "even_batches": False},
        **sharding,
    )


# The layers that a model names as those not to be split are sharded one by one.
_FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "fsdp_version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "SHARDED_STATE_DICT",
    },
}


def _replace_callbacks(
    trainer: RunTrainer, config: RunConfig, materials: Materials, title: str
) -> None:
    """Our progress bar and files in place of the Trainer's printing."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(title))
    trainer.add_callback(MetricsFile(Path(config.output_dir) / METRICS_FILE))
    trainer.add_callback(ProgressCheckpoint(trainer.curriculum))
    if config.training.evaluate_every and materials.corpus is not None:
        trainer.add_callback(NeedleEvaluation(trainer, config, materials.corpus))
    if materials.validation:
        every = config.training.evaluate_every
        trainer.add_callback(ValidationLoss(trainer, materials.validation, every=every))
