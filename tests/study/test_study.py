"""A small study from start to end, stopped, gone on with, and what it refuses."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from drt import hardware
from drt.checkpoints import load_checkpoint
from drt.cli.main import main
from drt.data import byte_tokenizer
from drt.data.bpe import train_bpe
from drt.data.prepared import CorpusConfig, find_sources, prepare
from drt.evaluation.tasks import make_task
from drt.run_config import read_mapping
from drt.study import Job, load_study, plan_jobs, run_job
from drt.study.config import Column, Curve, run_config, run_folder
from drt.study.figures import draw_curve
from drt.study.jobs import alone, check_jobs, facts_of, is_done, results_of, run_all
from drt.study.report import Results, _best, find, find_problems, write_page

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def study_file(tmp_path: Path, small_model: dict[str, Any]) -> Path:
    """Two rows, the second of which goes on from the first; some steps of 256 bytes each."""
    for split in ("train", "test"):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for number in range(4):
            text = f"text {number}: " + "so it goes, and on it goes. " * 20
            (tmp_path / "texts" / split / f"{number}.txt").write_text(text)
    config = CorpusConfig(tokenizer="bytes")
    sources = find_sources(config, [tmp_path / "texts"])
    prepare(config, byte_tokenizer(), sources, tmp_path / "prepared")
    training = {"num_steps": 4, "tokens_per_step": 256, "warmup_steps": 1, "evaluate_every": 0}
    base = {
        "output_dir": "unused",
        "model": small_model,
        "text": {"corpus": "{corpus}", "length": 128, "documents": "crossing"},
        "training": {**training, "log_every": 1},
    }
    perplexity = {"data": "{corpus}/test", "mode": "sliding", "lengths": [32, 128], "stride": 16}
    curve = {"measurement": "test", "values": "rows"}
    study = {
        "title": "A small study",
        "base": "base.yaml",
        "parameters": {"corpus": str(tmp_path / "prepared")},
        "rows": {
            "window": {"model": {"retrieval_groups": []}},
            "more of it": {"initial": {"row": "window"}, "model": {}},
        },
        "seeds": [0, 1],
        "measurements": {"test": {"task": "perplexity", "settings": perplexity}},
        "columns": {
            "at 128": {
                "measurement": "test",
                "value": "rows.length=128.perplexity",
                "paper": {"window": 13.5},
            }
        },
        "comparisons": [["more of it", "window"]],
        "curves": {"by length": {**curve, "x": "length", "y": "perplexity"}},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path / "small.yaml"


def test_a_study_makes_its_page_and_goes_on_where_it_was(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    first, second = plan_jobs(study)
    assert (first, second) == (Job("window", 0), Job("more of it", 0))
    run_job(study, first, folder)
    assert is_done(study, first, folder)
    assert not is_done(study, second, folder)
    page = study_file.parent / "small.md"
    write_page(study, folder, page, command="drt study small")
    assert "Not all runs are done" in page.read_text()
    file = run_folder(folder, "window", 0) / "results.json"
    stamps = [file.stat().st_mtime_ns]
    run_job(study, first, folder)
    run_job(study, second, folder)
    # What was there was not made again.
    assert [file.stat().st_mtime_ns] == stamps
    write_page(study, folder, page, command="drt study small")
    text = page.read_text()
    results = Results(study, folder)
    perplexity = find(results.record("window", 0, "test"), "rows.length=128.perplexity")
    assert f"{perplexity:.3f} \\| 13.5" in text.replace("**", "")
    assert "more of it / window" in text
    assert "Not all runs" not in text
    assert (page.parent / "small-by-length.png").stat().st_size > 1000


def test_pretrained_runs_are_trained_but_not_measured(study_file: Path) -> None:
    data = yaml.safe_load(study_file.read_text())
    data["pretrained"] = {"before": {"model": {"retrieval_groups": []}}}
    data["rows"] = {"after": {"initial": {"row": "before"}, "model": {}}}
    data["columns"]["at 128"]["paper"], data["comparisons"] = {}, []
    study_file.write_text(yaml.safe_dump(data, sort_keys=False))
    folder, page = study_file.parent / "runs", study_file.parent / "page.md"
    words = ["study", str(study_file), "seeds=[0]", "--output", str(folder), "--page", str(page)]
    assert main(words) == 0
    assert not (run_folder(folder, "before", 0) / "results.json").exists()
    text = page.read_text()
    assert "| after |" in text
    assert "before" not in text
    with pytest.raises(ValueError, match="'after' and 'After' would share the file name"):
        load_study(study_file, ["pretrained.After={}"])


def test_what_was_measured_is_kept_without_the_models(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    first, page = study_file.parent / "first.md", study_file.parent / "page.md"
    write_page(study, folder, first, command="drt study small")
    kept = study_file.parent / "kept"
    for name in ("run.yaml", "facts.json", "results.json"):
        for file in folder.rglob(name):
            copy = kept / file.relative_to(folder)
            if file.parent.name == "seed-0":
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
    write_page(study, kept, page, command="drt study small")
    assert page.read_text() == first.read_text().replace("(first-", "(page-")
    # Nothing is trained again, unless a run that is not done begins with it.
    for job in plan_jobs(study):
        run_job(study, job, kept)
    assert not list(kept.rglob("model"))
    (kept / "more-of-it" / "seed-0" / "results.json").unlink()
    window = Job("window", 0)
    assert not is_done(study, window, kept)
    run_job(study, window, kept)
    assert is_done(study, window, kept)
    assert (kept / "window" / "seed-0" / "model").is_dir()


def test_pretrained_runs_are_not_needed_once_all_is_measured(study_file: Path) -> None:
    data = yaml.safe_load(study_file.read_text())
    data["pretrained"] = {"before": {"model": {"retrieval_groups": []}}, "alone": {}}
    data["rows"] = {"after": {"initial": {"row": "before"}, "model": {}}}
    data["columns"]["at 128"]["paper"], data["comparisons"] = {}, []
    study_file.write_text(yaml.safe_dump(data, sort_keys=False))
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    before, after = Job("before", 0), Job("after", 0)
    for job in (before, after):
        assert not is_done(study, job, folder)
        run_job(study, job, folder)
    shutil.rmtree(run_folder(folder, "before", 0))
    assert is_done(study, before, folder)
    assert not is_done(study, Job("alone", 0), folder)
    (run_folder(folder, "after", 0) / "results.json").unlink()
    assert not is_done(study, before, folder)


def test_studies_share_runs(
    study_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study_file.parent)
    named = ["seeds=[0]", "runs=all of {corpus}", "parameters.corpus=prepared"]
    assert main(["study", str(study_file), *named]) == 0
    assert Path("runs/studies/all-of-prepared/window/seed-0/model").is_dir()
    # The other study has a row less and extends two files, of which the second one wins.
    data = yaml.safe_load(study_file.read_text())
    Path("rows.yaml").write_text(yaml.safe_dump({"rows": {"window": data["rows"]["window"]}}))
    rest = {**data, "rows": {}, "comparisons": [], "title": "Another"}
    Path("rest.yaml").write_text(yaml.safe_dump(rest))
    Path("other.yaml").write_text("extends: [rest.yaml, rows.yaml]\ntitle: The other\n")
    capsys.readouterr()
    assert main(["study", "other.yaml", *named]) == 0
    assert "window, seed 0" not in capsys.readouterr().out
    text = Path("docs/results/other.md").read_text()
    assert text.startswith("# The other")
    assert "| window |" in text


def test_other_settings_are_measured_again_without_training_again(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    job = Job("window", 0)
    run_job(study, job, folder)
    weights = run_folder(folder, "window", 0) / "model" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    other = load_study(study_file, ["measurements.test.settings.stride=8", "seeds=[0]"])
    assert results_of(other, job, folder) == {}
    run_job(other, job, folder)
    assert is_done(other, job, folder)
    assert weights.stat().st_mtime_ns == before
    # Beside the first ones, which another study may show.
    assert is_done(study, job, folder)
    assert results_of(other, job, folder) != results_of(study, job, folder)


def test_the_command_runs_all_in_processes_of_their_own(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = study_file.parent / "runs", study_file.parent / "page.md"
    words = ["study", str(study_file), "seeds=[0]", "--output", str(folder), "--page", str(page)]
    assert main([*words, "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "window, seed 0: done" in out
    assert "more of it, seed 0: done" in out
    assert "A small study" in page.read_text()
    assert (folder / "window" / "seed-0-log.txt").is_file()


def test_data_that_rows_share_is_checked_once(
    study_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr("drt.study.jobs.check_data", lambda run, _: looked.append(run.output_dir))
    study = load_study(study_file, ["rows.longer={text: {length: 64}}"])
    check_jobs(study, study_file.parent / "runs")
    assert [Path(each).parent.name for each in looked] == ["window", "longer"]


@pytest.mark.slow
def test_several_processes_train_a_run(study_file: Path) -> None:
    folder, page = study_file.parent / "runs", study_file.parent / "page.md"
    words = ["study", str(study_file), "seeds=[0]", "--output", str(folder), "--page", str(page)]
    assert main([*words, "--processes", "2"]) == 0
    assert "--processes 2" in page.read_text()
    assert "Not all runs" not in page.read_text()


def test_a_run_that_fails_is_named_and_others_go_on(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load(study_file.read_text())
    data["rows"] = {"wrong": {}, "window": data["rows"]["window"]}
    data["comparisons"] = []
    study_file.write_text(yaml.safe_dump(data, sort_keys=False))
    folder, page = study_file.parent / "runs", study_file.parent / "page.md"
    (folder / "wrong" / "seed-0").mkdir(parents=True)
    (folder / "wrong" / "seed-0" / "letters.txt").write_text("not a run")
    late = "columns.late={measurement: test, value: rowz.0}"
    words = ["study", str(study_file), late, "seeds=[0]"]
    assert main([*words, "--output", str(folder), "--page", str(page)]) == 2
    said = capsys.readouterr()
    assert "1 runs failed: wrong 0, exit status 2" in said.err
    # Before all is trained.
    assert "note: column 'late' finds no 'rowz.0' in any record of 'test', but task, " in said.out
    log = (folder / "wrong" / "seed-0-log.txt").read_text()
    assert "is not empty and holds no run of this program" in log
    assert "| window |" in page.read_text()


def test_a_row_whose_source_failed_is_not_waited_for(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    ended = list(run_all(study, folder, num_workers=2, command=lambda _: ["-c", "exit(3)"]))
    assert [(job.row, status) for job, _, status in ended] == [("window", 3)]


def test_rows_are_compared_where_both_were_measured(study_file: Path) -> None:
    data = yaml.safe_load(study_file.read_text())
    data["rows"]["third"] = {}
    data["exceptions"] = {"third": {"test": {"lengths": [128]}}}
    data["comparisons"] = [["more of it", "third"], ["more of it", "window"]]
    study_file.write_text(yaml.safe_dump(data, sort_keys=False))
    study, folder = load_study(study_file, []), study_file.parent / "runs"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    page = study_file.parent / "page.md"
    write_page(study, folder, page, command="drt study small")
    table = [line.split(" | ") for line in page.read_text().splitlines() if " / " in line]
    assert [(cells[0], cells[1]) for cells in table] == [
        (f"| more of it / {other}", seed)
        for other in ("third", "window")
        for seed in ("0", "1", "all")
    ]
    assert "| test | seed | 128 (4 documents) | 32 (4 documents) |" in page.read_text()
    assert all(cells[3] == " |" for cells in table[:3])
    assert all(cells[3] != " |" for cells in table[3:])


def test_a_row_may_be_measured_otherwise(study_file: Path) -> None:
    study = load_study(study_file, ["exceptions.window.test={lengths: [64]}", "seeds=[0]"])
    job, folder = Job("window", 0), study_file.parent / "runs"
    run_job(study, job, folder)
    record = results_of(study, job, folder)["test"]
    assert [row["length"] for row in record["rows"]] == [64]
    assert results_of(load_study(study_file, []), job, folder) == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("columns.x={measurement: tset, value: a}", "shows 'tset', which is not among"),
        ("comparisons=[[window, wall]]", "a comparison names two rows"),
        ("rows.more of it.initial={row: wind}", "begins with 'wind', which is no row"),
        ("rows={}", "rows is empty"),
        ("exceptions.window.tset={}", "an exception names a row and its measurements"),
        ("sedes=[0]", "unknown key sedes; did you mean seeds"),
        ("seeds=[0, 0]", "seeds must be different numbers of 0 or more"),
        ("seeds=[]", "seeds must be different numbers of 0 or more"),
        ("seeds=[0", "is not YAML"),
        ("rows.More-of it={}", "'more of it' and 'More-of it' would share the file name"),
        ("rows.+={}", r"'\+' has no letter or digit"),
        ("rows={1: {}}", "rows has the key 1, which is not text"),
        ("rows.window.initial={row: more of it}", "begin with each other: window -> more of it ->"),
        ("rows.window.initial={rows: a}", "initial of row 'window' must be"),
        ("columns.at 128.paper={wind: 1}", "figures of the paper for wind, which is no row"),
        ("rows.window.initial={row: [a]}", "initial of row 'window' must be"),
        ("rows.window.seed=9", "row 'window' sets seed, which the study sets itself"),
        ("measurements.test={task: needle}", "comparisons are of perplexities"),
        ("parameters.corpus=3", "parameters must be texts by name"),
        ("corpus", "a parameter reads corpus=value, got 'corpus'"),
    ],
)
def test_wrong_studies_are_refused(study_file: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_study(study_file, [override])


def test_parameters_are_texts(study_file: Path) -> None:
    data = yaml.safe_load(study_file.read_text())
    for given, message in (({"n": 100}, "must be texts by name"), ([1], "must be texts by name")):
        study_file.write_text(yaml.safe_dump({**data, "parameters": given}))
        with pytest.raises(ValueError, match=message):
            load_study(study_file, [])
    study_file.write_text(yaml.safe_dump({**data, "parameters": None}))
    assert load_study(study_file, []).parameters == {}


def test_a_study_of_ones_own_begins_with_a_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: ablations-1m\nseeds: [7]\n")
    shipped = Path(__file__).parents[2] / "configs"
    study = load_study(file, [])
    assert study == replace(load_study(shipped / "studies" / "ablations-1m.yaml", []), seeds=[7])
    assert Path(study.base) == shipped / "ladder-1m.yaml"
    file.write_text("extends: ablations-1m\nbase: ladder-1n\n")
    with pytest.raises(ValueError, match=r"base, .*: no configuration file ladder-1n; shipped"):
        load_study(file, [])


def test_a_folder_that_the_shell_completed_is_the_same(study_file: Path) -> None:
    study = load_study(study_file, ["corpus=data/mine/"])
    assert study == load_study(study_file, ["corpus=data/mine"])
    assert load_study(study_file, ["corpus=/"]).parameters == {"corpus": "/"}


def test_a_study_in_the_folder_one_is_in(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (study_file.parent / "inner").mkdir()
    study_file.rename(study_file.parent / "inner" / "small.yaml")
    monkeypatch.chdir(study_file.parent / "inner")
    study = load_study(Path("small.yaml"), ["base=base"])
    assert Path(study.base).samefile(study_file.parent / "base.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rows.last={model: {retrieval_topkk: 1}}",
            "row 'last': unknown key model.retrieval_topkk",
        ),
        ("rows.last={training: {num_step: 1}}", "row 'last': unknown key training.num_step"),
        ("rows.last={model: {retrieval_groups: [5, 5]}}", "row 'last': "),
        ("rows.last={model: {sliding_window: -3}}", "row 'last': "),
        (
            "rows.last={initial: {row: window}, model: {model_type: landmark_attention}}",
            "row 'last': model_type landmark_attention cannot go on from",
        ),
        (
            "rows.last={text: null, stages: [{length: 128, tasks: [{task: {num_keys: 60, kind: "
            "multi}}]}]}",
            "row 'last': stages.0.tasks.0: ",
        ),
        ("measurements.more={task: perplexitee}", "no task 'perplexitee'"),
        (
            "exceptions.window.test={lengths: [64]}",
            "'test' scores other tokens of row 'more of it'",
        ),
        (
            "rows.more of it.model={retrieval_topkk: 1}",
            "unknown key model.retrieval_topkk of a drt",
        ),
        ("exceptions.window.test={lengths: [1]}", "lengths must be of at least 2 tokens"),
        ("parameters.corpus=no/where", "no/where"),
        ("rows.last={text: {corpus: no/where}}", "row 'last': text.corpus is 'no/where'"),
        ("rows.last={text: {length: 65536}}", "row 'last': "),
        (
            "rows.last={text: null, summaries: {path: no/where, length: 512}, "
            "training: {tokens_per_step: 512}}",
            "row 'last': ",
        ),
        ("measurements.more={task: perplexity, settings: {data: no/where}}", "no/where holds no"),
        ("measurements.more={task: babi, settings: {facts: no/where}}", "no stories at no/where"),
        ("measurements.more={task: single, settings: {corpus: no/where}}", "no/where"),
        (
            "measurements.more={task: single, settings: {lengths: [1000]}}",
            "length is 1000; it must be a multiple of chunk_size",
        ),
        (
            "rows.last={model: {model_type: llama, max_position_embeddings: 100}}",
            "row 'last': a llama has 100 positions (max_position_embeddings), 128 tokens need more",
        ),
        (
            "measurements.more={task: cost, settings: {segment_size: 0}}",
            "segment_size must be at least 1",
        ),
        (
            "measurements.more={task: summarization, settings: {path: no/where}}",
            "no/where",
        ),
    ],
)
def test_nothing_is_trained_before_all_rows_are_seen_to_be_right(
    study_file: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    folder = study_file.parent / "runs"
    assert main(["study", str(study_file), override, "--output", str(folder)]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()


def test_rows_that_processes_cannot_share_are_refused_first(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = study_file.parent / "runs"
    words = ["study", str(study_file), "--output", str(folder), "--processes", "3"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "row 'window': 2 rows of 128 tokens a step cannot be shared out over 3" in said
    assert not folder.exists()
    # What is trained may be measured anywhere.
    study = load_study(study_file, ["seeds=[0]"])
    for job in plan_jobs(study):
        run_job(study, job, folder)
    check_jobs(study, folder, num_processes=3)


def test_a_text_in_tokens_of_another_row_is_refused(study_file: Path) -> None:
    folder = study_file.parent / "bpe"
    train_bpe(["it rains, and on it rains. "], 260).save_pretrained(str(folder))
    stages = "[{length: 128, tasks: [{task: {}}]}]"
    row = f"rows.last={{text: null, tokenizer: {folder}, stages: {stages}}}"
    with pytest.raises(ValueError, match=r"row 'last': .*test was prepared with another tokenizer"):
        check_jobs(load_study(study_file, [row]), study_file.parent / "runs")


def test_questions_must_end_alike_for_all_rows(
    study_file: Path, capsys: pytest.CaptureFixture[str], small_model: dict[str, Any]
) -> None:
    folder = study_file.parent / "runs"
    sizes = sorted([8, small_model["chunk_size"]])
    words = ["rows.last={model: {chunk_size: 8}}", "measurements.more={task: needle}"]
    assert main(["study", str(study_file), *words, "--output", str(folder)]) == 2
    message = f"'more' has no chunk_size, and rows have chunks of {sizes} tokens"
    assert message in capsys.readouterr().err
    assert not folder.exists()
    # Without chunks of its own a row is asked as if it had some of 64 tokens.
    words[0] = "rows.last={model: {model_type: block_recurrent}}"
    assert main(["study", str(study_file), *words, "--output", str(folder)]) == 2
    sizes = [small_model["chunk_size"], 64]
    message = f"'more' has no chunk_size, and rows have chunks of {sizes} tokens"
    assert message in capsys.readouterr().err


def test_no_row_is_the_best_of_a_table_that_is_not_whole(study_file: Path) -> None:
    study, folder = load_study(study_file, []), study_file.parent / "runs"
    page = study_file.parent / "page.md"
    jobs = plan_jobs(study)
    for job in jobs[:-1]:
        run_job(study, job, folder)
    write_page(study, folder, page, command="drt study small")
    (name,) = study.columns
    assert _best(Results(study, folder), study.columns[name]) == set()
    assert "rows are means over other seeds, and none is marked" in page.read_text()
    run_job(study, jobs[-1], folder)
    write_page(study, folder, page, command="drt study small")
    assert "not done" not in page.read_text()
    (best,) = _best(Results(study, folder), study.columns[name])
    assert hardware.describe() in page.read_text()
    # A run that diverged is none either, whatever row it is of.
    for seed in study.seeds:
        file = run_folder(folder, best, seed) / "results.json"
        text = re.sub(r'"perplexity": [\d.]+', '"perplexity": NaN', file.read_text())
        file.write_text(text)
    (other,) = _best(Results(study, folder), study.columns[name])
    assert other != best
    # What is the same for all rows marks none.
    size = {"at 128": Column("test", "parameters")}
    assert _best(Results(replace(study, columns=size), folder), size["at 128"]) == set()


def test_a_row_that_is_changed_is_not_shown_with_what_it_was(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    run_job(study, Job("window", 0), folder)
    other = load_study(study_file, ["seeds=[0]", "rows.window.model.num_hidden_layers=3"])
    message = "row 'window', seed 0, .* model.num_hidden_layers was 2 and is 3"
    with pytest.raises(ValueError, match=message):
        run_job(other, Job("window", 0), folder)
    with pytest.raises(ValueError, match=message):
        check_jobs(other, folder)
    with pytest.raises(ValueError, match=message):
        write_page(other, folder, study_file.parent / "page.md", command="drt study small")


def test_a_row_that_begins_with_a_model_of_another_kind_is_not_taken_for_a_drt(
    study_file: Path,
) -> None:
    folder = study_file.parent / "llama"
    LlamaConfig(vocab_size=258, hidden_size=8, num_attention_heads=2).save_pretrained(folder)
    byte_tokenizer().save_pretrained(str(folder))
    row = f"rows.other={{initial: {folder}, model: {{max_position_embeddings: 128}}}}"
    check_jobs(load_study(study_file, [row]), study_file.parent / "runs")
    wrong = row.replace("max_position", "max_positions")
    with pytest.raises(ValueError, match=r"unknown key model\.max_positions_embeddings of a llama"):
        check_jobs(load_study(study_file, [wrong]), study_file.parent / "runs")
    with pytest.raises(ValueError, match="row 'other': no/where/at/all holds no model"):
        check_jobs(load_study(study_file, ["rows.other={initial: no/where/at/all}"]), Path("runs"))
    drt = "rows.other={model: {max_position_embeddings: 64, rope_scaling: 1}}"
    with pytest.raises(ValueError, match=r"unknown key model\.rope_scaling of a drt"):
        check_jobs(load_study(study_file, [drt]), study_file.parent / "runs")


def test_what_began_with_a_run_that_has_changed_is_not_shown(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    changed = load_study(study_file, ["seeds=[0]", "rows.window.model.intermediate_size=24"])
    # As the error says; the other row's own configuration is what it was.
    shutil.rmtree(run_folder(folder, "window", 0))
    message = r"'more of it'.*of the initial run, model\.intermediate_size was 16 and is 24"
    with pytest.raises(ValueError, match=message):
        check_jobs(changed, folder)
    with pytest.raises(ValueError, match=message):
        write_page(changed, folder, study_file.parent / "page.md", command="drt study small")
    check_jobs(study, folder)


def test_a_figure_that_a_seed_lacks_is_said_to_be_of_the_others(study_file: Path) -> None:
    study, folder = load_study(study_file, []), study_file.parent / "runs"
    page = study_file.parent / "page.md"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    (best,) = _best(Results(study, folder), study.columns["at 128"])
    file = run_folder(folder, best, 1) / "results.json"
    file.write_text(re.sub(r'"perplexity": [\d.]+', '"perplexity": null', file.read_text()))
    write_page(study, folder, page, command="drt study small")
    assert "(1 of 2 seeds)" in page.read_text()
    assert best not in _best(Results(study, folder), study.columns["at 128"])


def test_seeds_that_agree_have_no_bars(tmp_path: Path) -> None:
    # Their mean is 0.9499999999999998.
    seeds = [[{"depth": 0.5, "x": 0.95}]] * 3
    curve = Curve(measurement="test", values="rows", x="depth", y="x")
    draw_curve(tmp_path / "x.png", {"a": seeds}, curve=curve, title="x")
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_folder_of_runs_may_be_moved(study_file: Path) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    # As if it had been stopped after the first run.
    shutil.rmtree(run_folder(folder, "more of it", 0) / "model")
    moved = folder.rename(study_file.parent / "moved")
    check_jobs(study, moved)
    for job in plan_jobs(study):
        run_job(study, job, moved)
    write_page(study, moved, study_file.parent / "page.md", command="drt study small")


def test_a_run_that_another_process_works_on_is_waited_for(
    study_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    job = Job("window", 0)
    second = Thread(target=run_job, args=(study, job, folder))
    # Two open files of one process exclude each other as those of two do.
    with alone(job, folder):
        second.start()
        second.join(timeout=0.5)
        assert second.is_alive()
        assert not run_folder(folder, *job).exists()
    second.join(timeout=60)
    assert is_done(study, job, folder)
    assert "waiting until it has ended" in capsys.readouterr().out


def test_a_page_of_nothing_is_not_written(study_file: Path) -> None:
    page = study_file.parent / "page.md"
    words = ["study", str(study_file), "--output", str(study_file.parent / "none")]
    assert main([*words, "--page", str(page), "--page-only"]) == 2
    assert not page.exists()


def test_a_column_that_finds_nothing_is_an_error(study_file: Path) -> None:
    overrides = ["seeds=[0]", "rows.more of it={}", "comparisons=[]"]
    study, folder = load_study(study_file, overrides), study_file.parent / "runs"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    wrong = "columns.at 128.value=rows.length=256.perplexity"
    with pytest.raises(
        ValueError, match=r"'at 128' finds no .* but a list of 2: length=32, length=128"
    ):
        write_page(
            load_study(study_file, [*overrides, wrong]),
            folder,
            study_file.parent / "page.md",
            command="drt study small",
        )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("columns.at 128.value=settings", "'settings' of 'test' is no number but a dict"),
        ("curves.by length.values=rowz", "curve 'by length' finds no 'rowz' in any record"),
        ("curves.by length.values=settings", "curve 'by length': 'settings' of 'test' is no list"),
        ("curves.by length.x=lenght", "no list of points with numbers above 0 as 'lenght'"),
        ("curves.by length.x=label", "no list of points with numbers above 0 as 'label'"),
        ("curves.by length.y=perplexty", "no list of .* and numbers as 'perplexty'"),
        ("columns.at 128.value=rows.perplexity", "'perplexity' is no item of a list"),
        ("curves.by length.values=rows.x.y", "'x' is no item of a list"),
        ("curves.by length.x=num_documents", "several points of a run have one num_documents"),
    ],
)
def test_what_is_no_figure_is_an_error(study_file: Path, override: str, message: str) -> None:
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    for job in plan_jobs(study):
        run_job(study, job, folder)
    wrong = load_study(study_file, ["seeds=[0]", override])
    # Said after the first run, which nothing of it may stop.
    assert re.search(message, "; ".join(find_problems(Results(wrong, folder))))
    with pytest.raises(ValueError, match=message):
        write_page(wrong, folder, study_file.parent / "page.md", command="drt study small")


def test_threads_are_shared_out(study_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drt.study.jobs.hardware.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    words = ["-c", "import os; print('threads', os.environ['OMP_NUM_THREADS'])"]
    for workers, processes, threads in ((1, 1, 8), (2, 1, 4), (2, 3, 1)):
        list(
            run_all(
                study, folder, num_workers=workers, num_processes=processes, command=lambda _: words
            )
        )
        log = run_folder(folder, "window", 0).with_name("seed-0-log.txt")
        assert log.read_text().splitlines()[-1] == f"threads {threads}"


def test_runs_shorter_than_the_way_to_a_line_of_metrics_have_a_page(study_file: Path) -> None:
    base = yaml.safe_load((study_file.parent / "base.yaml").read_text())
    base["training"]["log_every"] = 100
    (study_file.parent / "base.yaml").write_text(yaml.safe_dump(base))
    study, folder = load_study(study_file, ["seeds=[0]"]), study_file.parent / "runs"
    run_job(study, Job("window", 0), folder)
    # The last checkpoint has one.
    seconds = facts_of(Job("window", 0), folder)["seconds"]
    page = study_file.parent / "page.md"
    write_page(study, folder, page, command="drt study small")
    model = load_checkpoint(run_folder(folder, "window", 0)).model
    row = f"| window | {model.num_parameters():,} | 1.00 | {seconds:,.0f} | 1 |"
    assert row in page.read_text()


def test_records_are_searched_by_key_number_and_entry() -> None:
    record = {"rows": [{"length": 8, "x": 1.5}, {"length": 16, "x": 2.5}]}
    assert find(record, "rows.1.x") == 2.5
    assert find(record, "rows.length=8.x") == 1.5
    assert find(record, "rows.length=9.x") is None
    assert find(record, "rows.7.x") is None
    assert find(record, "") == record
    assert find({"rows": [1, 2]}, "rows.a=1") is None
    with pytest.raises(ValueError, match="'length' is no item of a list"):
        find(record, "rows.length")
    # Of two depths neither is meant.
    record["rows"].append({"length": 16, "x": 3.5})
    with pytest.raises(ValueError, match="2 items have length=16"):
        find(record, "rows.length=16.x")
    assert find([{"depth": 0.5, "x": [4, 5]}], "depth=0.5.x.1") == 5
    curve = Curve(measurement="test", values="rows", x="length", y="x")
    with pytest.raises(ValueError, match="several points of a run have one length"):
        draw_curve(Path("unwritten.png"), {"a": [record["rows"]]}, curve=curve, title="x")


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_row_of_a_shipped_study_is_a_run(path: Path, tmp_path: Path) -> None:
    from drt.architectures import make_config

    study = load_study(path, [])
    base = read_mapping(Path(study.base))
    # Nothing that is given on the command line is without effect.
    for name in study.parameters:
        assert "{" + name + "}" in yaml.safe_dump([read_mapping(path), base])
    for row in study.trained:
        config = run_config(study, base, row, 3, tmp_path)
        assert config.seed == 3
        if config.text is not None:
            assert config.text.corpus == study.parameters["corpus"]
        for measurement in study.measurements_of(row).values():
            make_task(measurement.task, measurement.settings)
        # Fields beside those of another row are checked when there is one.
        if config.initial is None:
            assert make_config(config.model, byte_tokenizer()).vocab_size == 258
