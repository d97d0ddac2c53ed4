"""From a folder on the command line to a model that can be used."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, NamedTuple


class Checkpoint(NamedTuple):
    """A trained model and what belongs to it."""

    folder: Path
    """Where config.json is."""
    model: Any
    """The `DRTForCausalLM`, in evaluation mode."""
    tokenizer: Any
    """Its tokenizer."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Precision of matrix products, as in the run's configuration."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context to run the model in."""
        from drt.precision import autocast

        return autocast(self.precision, self.model.device)


def find_model(folder: Path) -> Path:
    """The folder that holds config.json: the given one, or the `model` folder of a run."""
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"{folder} holds no model: there is no config.json in it or in {folder}/model")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load a run's model, or a saved one, with its tokenizer, onto the GPU if there is one."""
    import torch
    from safetensors import SafetensorError
    from transformers.utils.logging import disable_progress_bar

    from drt.data import load_tokenizer
    from drt.modeling import DRTForCausalLM
    from drt.run_config import CONFIG_FILE, load_config

    disable_progress_bar()
    found = find_model(folder)
    run = found / CONFIG_FILE
    precision = load_config(run).precision if run.is_file() else "float32"
    tokenizer = load_tokenizer(str(found))
    try:
        model: Any = DRTForCausalLM.from_pretrained(found).eval()
    except SafetensorError as error:
        raise ValueError(f"the weights in {found} are damaged: {error}") from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {found} has {len(tokenizer)} entries, its model "
            f"{model.config.vocab_size}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Checkpoint(found, model.to(device), tokenizer, precision)
