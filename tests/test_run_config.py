"""Run configurations: typed, overridable, strict about names."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from drt.architectures import make_config, make_model
from drt.configuration import DRTConfig
from drt.data import byte_tokenizer
from drt.training import RunConfig, load_config, save_config

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_builds(path: Path) -> None:
    config = load_config(path)
    with torch.device("meta"):
        model = make_model(make_config(config.model, byte_tokenizer()), seed=0)
    assert all(stage.length % model.config.chunk_size == 0 for stage in config.stages)


def test_the_papers_model_has_the_papers_choices() -> None:
    config = DRTConfig(**load_config(CONFIGS / "paper-128m.yaml").model)
    assert config.retrieval_onset == "chunk"
    assert config.position_embedding == "alibi"
    assert config.softmax_plus_one
    assert (config.chunk_size, config.sliding_window, config.retrieval_topk) == (64, 512, 8)
    assert (config.num_lower_layers, config.num_upper_layers) == (6, 6)


def test_the_baseline_has_the_size_and_budget_of_the_demo() -> None:
    demo, baseline = load_config(DEMO), load_config(CONFIGS / "demo-baseline.yaml")
    configs = [make_config(run.model, byte_tokenizer()) for run in (demo, baseline)]
    sizes = [make_model(config, seed=0).num_parameters() for config in configs]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[0]
    assert baseline.model["retrieval_groups"] == []
    assert replace(baseline, model=demo.model, output_dir=demo.output_dir) == demo


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    config = load_config(DEMO, ["training.learning_rate=1e-3", "stages.0.length=128"])
    assert config.training.learning_rate == 1e-3
    assert config.stages[0].length == 128
    save_config(config, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config


def test_extends_merges_mappings_and_replaces_the_rest(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(DEMO.read_text())
    above = {"extends": "below.yaml", "seed": 3, "training": {"num_steps": 7}}
    (tmp_path / "above.yaml").write_text(yaml.safe_dump(above))
    below, config = load_config(tmp_path / "below.yaml"), load_config(tmp_path / "above.yaml")
    assert config == replace(below, seed=3, training=replace(below.training, num_steps=7))
    # Of several, later ones win over earlier ones, and the file itself over all.
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({"seed": 5, "training": {"num_steps": 9}}))
    several = {"extends": ["below.yaml", "part.yaml"], "seed": 3}
    (tmp_path / "above.yaml").write_text(yaml.safe_dump(several))
    config = load_config(tmp_path / "above.yaml")
    assert config == replace(below, seed=3, training=replace(below.training, num_steps=9))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traning.num_steps=3", "unknown key traning; did you mean training"),
        ("training.num_step=3", "unknown key training.num_step; did you mean training.num_steps"),
        ("training.num_steps=many", "training.num_steps must be int, got 'many'"),
        ("training.learning_rate=fast", "training.learning_rate must be a number, got 'fast'"),
        ("training.gradient_checkpointing=1", "gradient_checkpointing must be bool, got 1"),
        ("precision=half", r"precision must be one of .'auto', 'float32', 'bfloat16'"),
        ("stages.9.length=3", "9 is no item of a list of"),
        ("stages.0.tasks.0.task.kind=triple", r"kind must be one of \['single', 'multi', 'hops'"),
        ("stages.0.length=100", "row length 100 must be a multiple of chunk_size 32"),
        ("chunk_size=48", "row length 256 must be a multiple of chunk_size 48"),
        ("chunk_size=-1", "chunk_size must be at least 1, got -1"),
        ("chunk_size=0", "chunk_size must be at least 1, got 0"),
        ("stages=[]", "exactly one of stages .needles., text and summaries, got none"),
        ("seed", "an override reads key=value, got 'seed'"),
        ("seed.deep=1", "seed is a plain value"),
        ("training=5", "training must be a mapping, got 5"),
    ],
)
def test_wrong_values_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(DEMO, [override])


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no configuration file at"):
        load_config(tmp_path / "none.yaml")
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1")
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(file)
    file.write_text("- 1")
    with pytest.raises(ValueError, match="must hold a mapping, got list"):
        load_config(file)
    file.write_text("extends: 3")
    with pytest.raises(ValueError, match="extends must name files, got 3"):
        load_config(file)
    file.write_text("seed: 1")
    with pytest.raises(ValueError, match="missing key output_dir"):
        load_config(file)


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused() -> None:
    config: RunConfig = load_config(DEMO, ["model.vocab_size=100"])
    with pytest.raises(ValueError, match=r"vocab_size 100 is smaller than the tokenizer's 258"):
        make_config(config.model, byte_tokenizer())
