"""One training run from a configuration: corpus, model, Trainer, checkpoints, final model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed
from transformers.training_args import TrainingArguments

from drt.configuration import DRTConfig
from drt.data import Corpus, load_corpus, load_tokenizer
from drt.modeling import DRTForCausalLM
from drt.precision import uses_bfloat16
from drt.run_config import CONFIG_FILE, RunConfig, load_config, save_config
from drt.training.compilation import compile_layers
from drt.training.curriculum import Curriculum, NeedleBatches
from drt.training.evaluate import NeedleEvaluation
from drt.training.trainer import (
    CURRICULUM_FILE,
    CurriculumCheckpoint,
    MetricsFile,
    NeedleProgress,
    NeedleTrainer,
    latest_checkpoint,
)

FINAL_FOLDER = "model"
METRICS_FILE = "metrics.jsonl"


def build_model(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DRTForCausalLM:
    """The model of a run, initialized from its seed."""
    fields = {"vocab_size": len(tokenizer), **config.model}
    if tokenizer.eos_token_id is not None:
        fields.setdefault("eos_token_id", tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        fields.setdefault("pad_token_id", tokenizer.pad_token_id)
    model_config = DRTConfig(**fields)
    if model_config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size {model_config.vocab_size} is smaller than the tokenizer's "
            f"{len(tokenizer)} entries"
        )
    set_seed(config.seed)
    return DRTForCausalLM(model_config)


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    title: str = "train",
    corpus: Corpus | None = None,
) -> Path:
    """Train a model and save it with its tokenizer.

    Args:
        config: the run.
        resume: go on from the newest whole checkpoint in `config.output_dir`, if there is one.
        overwrite: remove what an earlier run left in `config.output_dir`.
        title: what the progress bar is called.
        corpus: the haystack, when it is loaded already.

    Returns:
        The folder of the final model.

    Raises:
        ValueError: the folder holds an earlier run and neither `resume` nor `overwrite` is set, or
            the run to resume had another configuration.
    """
    folder = Path(config.output_dir)
    _check_folder(folder, config, resume=resume, overwrite=overwrite)
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = corpus or load_corpus(config.corpus, tokenizer)
    model = build_model(config, tokenizer)
    # Only now that the run can begin is anything removed or written.
    if overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / CONFIG_FILE)
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.training.compile_layers:
        compile_layers(model)
    curriculum = Curriculum(config.stages)
    trainer = NeedleTrainer(
        model=model,
        args=_arguments(config),
        train_dataset=NeedleBatches(config, corpus, curriculum),
        # An item of the dataset is a batch already.
        data_collator=_only,
        text_loss_weight=config.training.text_loss_weight,
        first_token_weight=config.training.first_token_weight,
        curriculum=curriculum,
        optimizer_name=config.training.optimizer,
    )
    _replace_callbacks(trainer, config, corpus, title)
    checkpoint = latest_checkpoint(folder) if resume else None
    if checkpoint is not None:
        curriculum.load(checkpoint / CURRICULUM_FILE)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    final, partial = folder / FINAL_FOLDER, folder / f"{FINAL_FOLDER}.partial"
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    save_config(config, partial / CONFIG_FILE)
    # Renamed when it is whole: a folder of this name is a finished run.
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    return final


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder was trained to its end."""
    return (folder / FINAL_FOLDER / CONFIG_FILE).is_file()


def training_seconds(folder: Path) -> float:
    """Wall seconds that the run in this folder has trained, over all its restarts."""
    lines = (folder / METRICS_FILE).read_text().splitlines()
    return json.loads(lines[-1])["seconds"]


def _only(items: list[dict[str, Any]]) -> dict[str, Any]:
    (item,) = items
    return item


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


def _arguments(config: RunConfig) -> TrainingArguments:
    training = config.training
    return TrainingArguments(
        output_dir=config.output_dir,
        max_steps=training.num_steps,
        per_device_train_batch_size=1,
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
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )


def _replace_callbacks(
    trainer: NeedleTrainer, config: RunConfig, corpus: Corpus, title: str
) -> None:
    """Our progress bar and files in place of the Trainer's printing."""
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(NeedleProgress(title))
    trainer.add_callback(MetricsFile(Path(config.output_dir) / METRICS_FILE))
    trainer.add_callback(CurriculumCheckpoint(trainer.curriculum))
    if config.training.evaluate_every:
        trainer.add_callback(NeedleEvaluation(trainer, config, corpus))
