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


def test_shipped_configurations_are_extended_by_their_names(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: ladder-1m\nseed: 3")
    assert load_config(file) == replace(load_config(CONFIGS / "ladder-1m.yaml"), seed=3)
    # What lies beside the file comes first, and a file may be called as what it extends.
    (tmp_path / "ladder-1m.yaml").write_text("extends: ladder-1m\nseed: 4")
    assert load_config(file) == replace(load_config(CONFIGS / "ladder-1m.yaml"), seed=3)
    (tmp_path / "ladder-1m").write_text(DEMO.read_text())
    assert load_config(file) == replace(load_config(DEMO), seed=3)
    file.write_text("extends: ladder-1n")
    with pytest.raises(ValueError, match=r"'ladder-1n', which is no .*; did you mean ladder-1m"):
        load_config(file)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("traning.num_steps=3", "unknown key traning; did you mean training"),
        ("training.num_step=3", "unknown key training.num_step; did you mean training.num_steps"),
        ("training.num_steps=many", "training.num_steps must be int, got 'many'"),
        ("training.learning_rate=fast", "learning_rate must be a finite number, got 'fast'"),
        ("training.learning_rate=.nan", "learning_rate must be a finite number, got nan"),
        ("training.learning_rate=.inf", "learning_rate must be a finite number, got inf"),
        ("training.learning_rate=true", "learning_rate must be a finite number, got True"),
        ("training.learning_rate=0", "training.learning_rate must be above 0, got 0.0"),
        ("training.num_steps=0", "training.num_steps must be at least 1, got 0"),
        ("training.num_steps=-5", "training.num_steps must be at least 1, got -5"),
        ("training.tokens_per_step=0", "training.tokens_per_step must be at least 1, got 0"),
        ("training.num_micro_batches=0", "num_micro_batches must be at least 1, got 0"),
        ("training.log_every=0", "training.log_every must be at least 1, got 0"),
        ("training.max_grad_norm=-1", "training.max_grad_norm must be at least 0, got -1"),
        ("training.evaluate_every=-1", "training.evaluate_every must be at least 0, got -1"),
        ("training.adam_beta2=1", "adam_beta2 must be at least 0 and below 1, got 1.0"),
        (
            "training.learning_rate=1e-4",
            r"training.final_learning_rate 0\.\d+ is above the peak, training.learning_rate 0.0001",
        ),
        ("evaluation.lengths=[]", "evaluation.lengths is empty"),
        ("evaluation.lengths=[0]", "evaluation.lengths must be at least 1, got 0"),
        ("evaluation.questions=0", "evaluation.questions must be at least 1, got 0"),
        ("evaluation.seed=-1", "evaluation.seed must be at least 0, got -1"),
        ("training.peak_tflops=0", "training.peak_tflops must be above 0, got 0.0"),
        ("seed=-1", "seed must be at least 0, got -1"),
        ("training.gradient_checkpointing=1", "gradient_checkpointing must be bool, got 1"),
        ("precision=half", r"precision must be one of .'auto', 'float32', 'bfloat16'"),
        ("stages.9.length=3", "9 is no item of a list of"),
        ("stages.0.tasks.0.task.kind=triple", r"kind must be one of \['single', 'multi', 'hops'"),
        ("stages.0.length=100", "row length 100 must be a multiple of chunk_size 32"),
        ("stages.0.length=0", "stages.0.length must be at least 1, got 0"),
        ("stages.0.length=-256", "stages.0.length must be at least 1, got -256"),
        ("stages.1.tasks=[]", "stages.1.tasks is empty"),
        ("stages.2.tasks.0.weight=0", "stages.2.tasks.0.weight must be above 0, got 0.0"),
        ("stages.1.advance_below=0", r"stages.1.advance_below must be above 0, .* stages.2 never"),
        ("model.chunk_size=abc", "model.chunk_size must be int, got 'abc'"),
        ("model.chunk_size=null", "model.chunk_size must be int, got None"),
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


def test_text_out_of_range_is_refused() -> None:
    text = ["stages=[]", "text.corpus=x"]
    with pytest.raises(ValueError, match=r"training\.text_loss_weight 0\.\d+ is of needle rows"):
        load_config(DEMO, text)
    with pytest.raises(ValueError, match=r"text\.length must be at least 2, got 0"):
        load_config(DEMO, [*text, "text.length=0"])
    with pytest.raises(ValueError, match=r"text\.validation_rows must be at least 0, got -1"):
        load_config(DEMO, [*text, "text.validation_rows=-1"])


def test_zeros_that_mean_something_are_taken() -> None:
    names = ("save_every", "evaluate_every", "warmup_steps", "weight_decay", "max_grad_norm")
    training = load_config(DEMO, [f"training.{name}=0" for name in names]).training
    assert [getattr(training, name) for name in names] == [0] * 5
    # The last stage has no next one.
    assert load_config(DEMO, ["stages.2.advance_below=0"]).stages[2].advance_below == 0


def test_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("extends: second.yaml")
    second.write_text("extends: [second.yaml]")
    with pytest.raises(ValueError, match=r"extends leads back .*second\.yaml -> .*second\.yaml"):
        load_config(second)
    second.write_text(f"extends: ../{tmp_path.name}/first.yaml")
    with pytest.raises(ValueError, match=r"first\.yaml -> .*second\.yaml -> .*first\.yaml"):
        load_config(first)
    # One file that two others change is no way back.
    (tmp_path / "base.yaml").write_text(DEMO.read_text())
    first.write_text("extends: base.yaml")
    second.write_text("extends: [first.yaml, base.yaml]")
    assert load_config(second) == load_config(DEMO)


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
