"""From a run configuration to what transformers' Trainer is told."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.integration_utils import is_tensorboard_available
from transformers.training_args import TrainingArguments

from drt.baselines import BlockRecurrentForCausalLM
from drt.precision import uses_bfloat16
from drt.run_config import RunConfig


def training_arguments(config: RunConfig, model: PreTrainedModel) -> TrainingArguments:
    """The Trainer's arguments for a run of this model.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """
    training = config.training
    if training.tensorboard and not is_tensorboard_available():
        raise ValueError(
            "training.tensorboard needs the package tensorboard: "
            "pip install 'drt-lm[tensorboard]', or set training.tensorboard=false"
        )
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
        # Only what is saved of it matters: a model that is saved without does not generate.
        use_cache=True,
        use_cpu=not torch.cuda.is_available(),
        # Rows of one block carry no state on: what carries it has no part in them.
        ddp_find_unused_parameters=isinstance(model, BlockRecurrentForCausalLM),
        # Each process takes its own parts.
        accelerator_config={
            "dispatch_batches": False,
            "even_batches": False,
            "non_blocking": torch.cuda.is_available(),
        },
        # A loss that is no number would be logged as 0.
        logging_nan_inf_filter=False,
        **(fsdp_arguments(model) if training.sharding == "fsdp" else {}),
    )


def fsdp_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that shard each layer, and the rest of the model, over the processes (FSDP2).

    Checkpoints are written by all processes in shards, which any number of them can read.
    """
    present = {type(module).__name__ for module in model.modules()}
    # A model without retrieval has no encoder layers, and accelerate refuses names without modules.
    layers = [name for name in model._no_split_modules or () if name in present]
    return {
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": layers,
            "state_dict_type": "SHARDED_STATE_DICT",
        },
    }
