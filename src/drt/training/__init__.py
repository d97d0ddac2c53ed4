"""Training: run configurations, the curriculum, and the wiring of transformers' Trainer."""

from drt.run_config import (
    EvaluationConfig,
    RunConfig,
    Stage,
    TaskMix,
    TextData,
    TrainingConfig,
    load_config,
    save_config,
)
from drt.training.compilation import compile_layers
from drt.training.run import train
from drt.training.trainer import RunTrainer

__all__ = [
    "EvaluationConfig",
    "RunConfig",
    "RunTrainer",
    "Stage",
    "TaskMix",
    "TextData",
    "TrainingConfig",
    "compile_layers",
    "load_config",
    "save_config",
    "train",
]
