"""transformers' Trainer on batches that carry the weight of each token's loss."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer import Trainer

from drt.loss import losses_of_logits
from drt.training.batches import needle_masks
from drt.training.curriculum import Curriculum
from drt.training.optimizer import MuonWithAdamW, split_parameters
from drt.training.retrieval_metrics import RetrievalMetrics
from drt.training.speed import SpeedMeter

MODEL_INPUTS = ("input_ids", "attention_mask", "chunk_ends", "document_ids")
"""Of a batch, what a model reads; chunk_ends and document_ids only where it knows of them."""

NEEDLE_LOSSES = ("answer_loss", "first_token_loss", "text_loss")


class RunTrainer(Trainer):
    """Trains any causal language model on `StepParts`.

    The loss of a step is the weighted sum of its tokens' losses, over all processes and
    micro-batches. Gumbel noise and chunks closed early follow from (seed, part), so that going on
    after a stop needs no state of random numbers.
    """

    def __init__(
        self,
        *,
        curriculum: Curriculum | None = None,
        optimizer_name: str = "adamw",
        speed: SpeedMeter,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # The Trainer would divide the loss by the micro-batches otherwise.
        self.model_accepts_loss_kwargs = True
        self.optimizer_name, self.curriculum = optimizer_name, curriculum
        self.speed = speed
        model: Any = self.model
        self._accepts = set(inspect.signature(model.forward).parameters)
        self._sums = torch.zeros(len(NEEDLE_LOSSES), 2, dtype=torch.float64)
        self._of_step = torch.zeros(2, dtype=torch.float64)
        self._retrieval = RetrievalMetrics(
            len(getattr(model.config, "retrieval_groups", ())),
            retrieves_all=not getattr(model.config, "exclude_window_chunks", False),
        )

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's; sharded models keep the precision of others."""
        super().create_accelerator_and_postprocess()
        cast_products_only(getattr(self.accelerator.state, "fsdp_plugin", None))

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager[Any]:
        """Autocast around sharded models, as accelerate has it around the forward of others."""
        if not (self.is_fsdp_enabled and self.args.bf16):
            return nullcontext()
        # A cache would hold the whole model in bfloat16.
        kind = self.accelerator.device.type
        return torch.autocast(kind, torch.bfloat16, cache_enabled=False)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        return torch.ones((), device=device)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the losses; the curriculum hears of that of the answers."""
        self.speed.begin()
        outputs, losses = self.token_losses(model, inputs)
        loss = (losses * inputs["token_weights"][:, 1:]).sum()
        if "answer_mask" in inputs:
            self._observe(inputs, losses.detach())
        if getattr(outputs, "retrievals", None):
            self._retrieval.add(outputs.retrievals)
        if self._ends_step(inputs):
            rows, length = inputs["input_ids"].shape
            parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
            self.speed.step(rows * parts, length)
        # Gradients are averaged over the processes.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def token_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Any, Tensor]:
        """What the model returns, and (B, T - 1) losses of tokens 1 .. T - 1."""
        given = {
            name: inputs[name] for name in MODEL_INPUTS if name in inputs and name in self._accepts
        }
        if "generator" in self._accepts and model.training:
            given["generator"] = self._generator(inputs["index"])
        if "output_retrievals" in self._accepts and model.training and self._logs_next:
            given["output_retrievals"] = True
        if "output_token_losses" in self._accepts:
            outputs = model(**given, labels=inputs["labels"], output_token_losses=True)
            return outputs, outputs.token_losses
        outputs = model(**given, use_cache=False)
        return outputs, losses_of_logits(outputs.logits[:, :-1], inputs["labels"][:, 1:])

    def _generator(self, index: int) -> torch.Generator:
        mixed = np.random.SeedSequence([self.args.seed, index]).generate_state(1, np.uint64)
        return torch.Generator(self.args.device).manual_seed(int(mixed[0]))

    @property
    def _logs_next(self) -> bool:
        return (self.state.global_step + 1) % self.args.logging_steps == 0

    def _observe(self, inputs: dict[str, Any], losses: Tensor) -> None:
        """Add up the losses of answers and text; tell the curriculum at the end of a step."""
        masks = torch.stack([mask[:, 1:] for mask in needle_masks(inputs["answer_mask"])])
        sums = [(losses.double() * masks).sum((1, 2)), masks.sum((1, 2)).double()]
        # One wait for the device, however many the sums.
        parts = torch.stack(sums, dim=1).cpu()
        self._sums += parts
        self._of_step += parts[0]
        if self.curriculum is not None and self._ends_step(inputs):
            total, count = self._over_processes(self._of_step).tolist()
            self.curriculum.observe(inputs["step"], total / count)
            self._of_step.zero_()

    def _ends_step(self, inputs: dict[str, Any]) -> bool:
        """Whether this is the last micro-batch of a step in this process."""
        number = inputs["index"] // self.accelerator.num_processes
        return (number + 1) % self.args.gradient_accumulation_steps == 0

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return sums
        return self.accelerator.reduce(sums.to(self.args.device), reduction="sum").cpu()  # type: ignore[union-attr]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add losses, row length, retrieval and speed to what is logged."""
        if "loss" in logs:
            if self.curriculum is not None:
                totals = self._over_processes(self._sums)
                means = (totals[:, 0] / totals[:, 1]).tolist()
                logs.update(zip(NEEDLE_LOSSES, means, strict=True))
                self._sums.zero_()
                logs["length"] = self.curriculum.stage_at(self.state.global_step - 1).length
            logs.update(self._retrieval.take(self._over_processes))
            logs.update(self.speed.take())
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model for `from_pretrained`; all processes call this.

        A checkpoint of a sharded model is written in shards elsewhere, and needs no whole one.
        """
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            model: Any = self.model
            state = get_model_state_dict(model, options=options)
            for name in _second_names(model):
                state.pop(name, None)
            self._save(output_dir, state_dict=state)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.speed.pause():
            super()._save_checkpoint(*args, **kwargs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices are decayed; norms, biases and vectors are not."""
        return [name for name, each in model.named_parameters() if each.dim() > 1]

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
        # Item i is part i: the order is the data.
        return SequentialSampler(train_dataset or self.train_dataset)  # type: ignore[arg-type]


def cast_products_only(plugin: Any) -> None:
    """Leave FSDP2's own mixed precision out, None = no FSDP: the Trainer casts in its place.

    accelerate would cast what goes into each layer, what comes out of the model and the gradients
    that are summed to bfloat16; with autocast only matrix products are.
    """
    if plugin is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()


def _second_names(model: Any) -> list[str]:
    """Names of parameters that are other parameters: a head that is tied to the embeddings."""
    first = {name for name, _ in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return [name for name, _ in every if name not in first]
