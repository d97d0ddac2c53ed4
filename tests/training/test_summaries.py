"""Fine-tuning on documents and their summaries."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from drt.checkpoints import load_checkpoint
from drt.evaluation.summarization import SummarizationTask
from drt.run_config import RunConfig, load_config
from drt.training import train
from drt.training.materials import make_materials

WORDS = ("red", "blue", "green", "white")


@pytest.fixture
def config(tmp_path: Path, small_model: dict[str, Any]) -> RunConfig:
    """Documents that name a colour, and summaries that are the colour."""
    for split, count in (("train", 24), ("validation", 4), ("test", 4)):
        rows = [
            {"id": n, "document": f"{n} {WORDS[n % 4]} {n}", "summary": WORDS[n % 4]}
            for n in range(count)
        ]
        lines = [json.dumps(row) for row in rows]
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    data = {
        "output_dir": str(tmp_path / "run"),
        "model": small_model,
        "summaries": {"path": str(tmp_path / "set"), "length": 64, "max_summary_tokens": 8},
        "training": {
            "num_steps": 40,
            "tokens_per_step": 512,
            "learning_rate": 2e-2,
            "warmup_steps": 2,
            "log_every": 10,
            "save_every": 20,
            "evaluate_every": 20,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(data))
    return load_config(tmp_path / "run.yaml")


def test_summaries_are_learned_and_scored(config: RunConfig, tmp_path: Path) -> None:
    final = train(config)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert len([line for line in lines if "validation_loss" in line]) == 2
    task = SummarizationTask(path=str(tmp_path / "set"), n=2, max_summary_tokens=8, batch_size=2)
    record = task.evaluate(load_checkpoint(final), title="run")
    assert record["n"] == 2


@pytest.mark.parametrize("closes", [True, False])
def test_prompts_are_closed_in_validation_as_in_training(config: RunConfig, closes: bool) -> None:
    run = replace(config, model={**config.model, "close_prompt_chunk": closes})
    materials = make_materials(run)
    assert ("chunk_ends" in materials.source.rows(0)) == closes
    assert materials.validation
    assert all(("chunk_ends" in row) == closes for row in materials.validation)


def test_nothing_is_read_beyond_the_splits_there_are(config: RunConfig) -> None:
    assert config.summaries is not None
    missing = replace(config, summaries=replace(config.summaries, validation_split="held"))
    with pytest.raises(ValueError, match="held"):
        train(missing)
    with pytest.raises(ValueError, match="exactly one of stages"):
        replace(config, summaries=None)
