"""The main job: train a DRT and a sliding-window model, ask both, and show what came out."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from drt import hardware
from drt.checkpoints import load_drt
from drt.data import Corpus, load_corpus, load_tokenizer
from drt.data.tokenization import BYTES
from drt.evaluation import comparison, figure, report
from drt.evaluation.inspection import inspect_question
from drt.evaluation.memory import life_peak_rss
from drt.evaluation.needles import common_chunk_size
from drt.modeling import DRTForCausalLM
from drt.precision import autocast, uses_bfloat16
from drt.run_config import CONFIG_FILE, EvaluationConfig
from drt.training import RunConfig, train
from drt.training.folder import check_same_run, is_finished, training_seconds
from drt.training.materials import plan_of, plan_run

DRT, BASELINE = "drt", "baseline"
INSPECTED_LENGTH = 65536


def run_demo(
    configs: dict[str, RunConfig], output_dir: Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Train, evaluate and report.

    Training that was stopped goes on where it was; all questions are asked each time.

    Args:
        configs: "drt" and "baseline" runs of the same seed, corpus and tokenizer; their own
            output folders are replaced by folders under `output_dir`.
        output_dir: where results.json, figure.png, report.html and the two runs go.
        overwrite: train again even where a finished or half-finished run is found.

    Returns:
        The content of results.json.

    Raises:
        ValueError: a wrong setting of a run or of the evaluation, or a folder that holds another
            run.
    """
    started = time.perf_counter()
    configs = {
        name: replace(config, output_dir=str(output_dir / name)) for name, config in configs.items()
    }
    main = configs[DRT]
    corpus = load_corpus(main.corpus, load_tokenizer(main.tokenizer or BYTES))
    for config in configs.values():
        _check_evaluation(main.evaluation, corpus, config)
    seconds: dict[str, float] = {}
    models: dict[str, DRTForCausalLM] = {}
    for name, config in configs.items():
        models[name], seconds[f"train_{name}"] = _trained(config, name, corpus, overwrite)
    records: dict[str, Any] = {}
    for name, model in models.items():
        begun = time.perf_counter()
        with autocast(main.precision, model.device):
            scores = comparison.score_by_length(
                model, corpus, main.evaluation, title=f"evaluate {name}"
            )
        seconds[f"evaluate_{name}"] = time.perf_counter() - begun
        records[name] = {"parameters": model.num_parameters(), **comparison.as_records(scores)}
    # Training that an earlier call finished counts too.
    seconds["total"] = max(time.perf_counter() - started, sum(seconds.values()))
    results = {
        "train_length": main.train_length,
        "seed": main.seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "peak_rss_bytes": life_peak_rss(),
        "models": records,
        "precision": "bfloat16" if uses_bfloat16(main.precision) else "float32",
        "hardware": hardware.describe(),
    }
    _write(results, models[DRT], corpus, main, output_dir)
    return results


def _check_evaluation(evaluation: EvaluationConfig, corpus: Corpus, config: RunConfig) -> None:
    """Refuse, before anything is trained, what the model of a run could not be asked."""
    initial = None if config.initial is None else plan_of(config.initial)
    size = common_chunk_size([plan_run(config, initial).model_config])
    try:
        asked = comparison.needle_evaluations(evaluation)
        points = [(each.task, length) for each in asked.values() for length in each.lengths]
        for task, length in (*points, (evaluation.multi, _inspected_length(evaluation))):
            task.evaluation_example(
                corpus, seed=evaluation.seed, index=0, length=length, chunk_size=size
            )
    except ValueError as error:
        raise ValueError(f"evaluation: {error}") from error


def _inspected_length(evaluation: EvaluationConfig) -> int:
    """Tokens of the context and question that the report shows."""
    return min(max(evaluation.lengths), INSPECTED_LENGTH)


def _trained(
    config: RunConfig, name: str, corpus: Corpus, overwrite: bool
) -> tuple[DRTForCausalLM, float]:
    """The model of a run and the seconds its training took, trained now unless it is there."""
    folder = Path(config.output_dir)
    if is_finished(folder) and not overwrite:
        check_same_run(folder, config)
        print(f"{folder} holds a trained model: using it; --overwrite trains anew")
    else:
        resume = not overwrite and (folder / CONFIG_FILE).is_file()
        train(config, resume=resume, overwrite=overwrite, title=f"train {name}", corpus=corpus)
    return load_drt(folder).model, training_seconds(folder)


def _write(
    results: dict[str, Any], model: DRTForCausalLM, corpus: Corpus, config: RunConfig, to: Path
) -> None:
    """results.json, figure.png and report.html."""
    (to / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    figure.draw(results, to / "figure.png")
    length = _inspected_length(config.evaluation)
    task, seed = config.evaluation.multi, config.evaluation.seed
    # In the precision of the scores.
    with autocast(config.precision, model.device):
        inspection = inspect_question(model, corpus, task, length=length, seed=seed)
    report.write_report(results, inspection, to / "figure.png", to / "report.html")
