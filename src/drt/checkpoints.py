"""From a folder or a name to a model that can be used, with its tokenizer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.logging import disable_progress_bar

from drt.architectures import attach_tokenizer
from drt.data import load_tokenizer
from drt.modeling import DRTForCausalLM
from drt.precision import Precision, autocast, uses_bfloat16
from drt.run_config import CONFIG_FILE, FINAL_FOLDER, load_config


class Checkpoint(NamedTuple):
    """A trained model and what belongs to it."""

    folder: Path
    """Where config.json is; for a model of the hub, its name."""
    model: Any
    """A causal language model, in evaluation mode."""
    tokenizer: Any
    """Its tokenizer."""
    precision: Precision
    """Precision of matrix products."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run the model in."""
        return autocast(self.precision, self.model.device)


def find_model(folder: Path) -> Path:
    """The folder that holds config.json: the given one, or the `model` folder of a run."""
    for candidate in (folder, folder / FINAL_FOLDER):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(
        f"{folder} holds no model: there is no config.json in it or in {folder / FINAL_FOLDER}"
    )


def locate_model(name: str | Path) -> Path:
    """What `load_checkpoint` loads under a name: the folder that holds config.json, or a hub name.

    Raises:
        ValueError: as `find_model`.
    """
    return Path(name) if is_hub_name(str(name)) else find_model(Path(name))


def load_model_config(model: Path) -> PreTrainedConfig:
    """The configuration of a model that `locate_model` has found, without its weights.

    Raises:
        ValueError: transformers cannot load it.
    """
    try:
        return AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        place = "holds no model" if model.exists() else "is no folder, and the hub does not give it"
        raise ValueError(f"{model} {place}: {reason}") from error


def load_checkpoint(name: str | Path, *, precision: Precision | None = None) -> Checkpoint:
    """Load a causal language model with its tokenizer, onto the GPU if there is one.

    Weights are float32; those of a model that is no run of `drt train` are bfloat16 if products are
    asked to be.

    Args:
        name: the folder of a run, or of any saved model that transformers can load; or, where
            there is no folder OWNER, the name OWNER/NAME of a model on the Hugging Face hub.
        precision: of matrix products; None = as in the run's configuration, float32 without one.

    Raises:
        ValueError: no such model or tokenizer, damaged or missing weights, or a tokenizer with more
            entries than the model.
        OSError: the hub has no such model, or cannot be reached.
    """
    disable_progress_bar()
    found = locate_model(name)
    run = found / CONFIG_FILE
    dtype = torch.float32
    if precision is None:
        precision = load_config(run).precision if run.is_file() else "float32"
    elif not run.is_file() and uses_bfloat16(precision):
        dtype = torch.bfloat16
    tokenizer: Any = load_tokenizer(str(found))
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(found), dtype=dtype, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"the weights in {found} are damaged: {error}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # They would be random.
        raise ValueError(
            f"{found} lacks {len(missing)} weights of a {type(model).__name__}, such as "
            f"{', '.join(missing[:3])}"
        )
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {found} has {len(tokenizer)} entries, its model "
            f"{model.config.vocab_size}"
        )
    attach_tokenizer(model, tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Checkpoint(found, model.eval().to(device), tokenizer, precision)


def is_hub_name(name: str) -> bool:
    """Whether a name can only be one of the hub's: a folder that is misspelt is not looked for."""
    path = Path(name)
    return len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()


def load_drt(name: str | Path) -> Checkpoint:
    """`load_checkpoint` for what only a DRT can do.

    Raises:
        ValueError: as `load_checkpoint`, or another kind of model.
    """
    checkpoint = load_checkpoint(name)
    if not isinstance(checkpoint.model, DRTForCausalLM):
        raise ValueError(f"{name} is a {type(checkpoint.model).__name__}, which has no memory")
    return checkpoint
