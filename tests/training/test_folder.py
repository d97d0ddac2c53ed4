"""The folder of a run, and what a kill in the middle of a write leaves in it."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import TrainerControl, TrainerState

from drt.data.summaries import SummaryData
from drt.run_config import CONFIG_FILE
from drt.training import RunConfig, TextData
from drt.training.callbacks import CheckpointFiles, MetricsFile, latest_checkpoint
from drt.training.curriculum import Curriculum
from drt.training.folder import check_folder, differences, read_metrics


class KilledError(Exception):
    pass


def kill_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many files or names be brought to the medium, and raise at the next."""
    sync, left = os.fsync, iter(range(count))

    def killed(descriptor: int) -> None:
        if next(left, None) is None:
            raise KilledError
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", killed)


class Named:
    """A tokenizer, of which nothing is written."""

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)


def save_checkpoint(config: RunConfig, step: int, *, with_curriculum: bool) -> None:
    curriculum = Curriculum(config.stages) if with_curriculum else None
    tokenizer: Any = Named()
    arguments: Any = type("Arguments", (), {"output_dir": config.output_dir})
    state = TrainerState(global_step=step, is_world_process_zero=True)
    CheckpointFiles(tokenizer, config, curriculum).on_save(arguments, state, TrainerControl())


@pytest.mark.parametrize("with_curriculum", [True, False])
def test_a_kill_at_any_write_leaves_the_checkpoint_before(
    run_config: RunConfig, monkeypatch: pytest.MonkeyPatch, with_curriculum: bool
) -> None:
    folder = Path(run_config.output_dir)
    save_checkpoint(run_config, 10, with_curriculum=with_curriculum)
    assert latest_checkpoint(folder) == folder / "checkpoint-10"
    # Two files, each brought to the medium and then its name.
    for count in range(3):
        with monkeypatch.context() as patch:
            kill_after(count, patch)
            with pytest.raises(KilledError):
                save_checkpoint(run_config, 20, with_curriculum=with_curriculum)
        assert latest_checkpoint(folder) == folder / "checkpoint-10"
    save_checkpoint(run_config, 20, with_curriculum=with_curriculum)
    assert latest_checkpoint(folder) == folder / "checkpoint-20"
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-10 copy")
    assert latest_checkpoint(folder) == folder / "checkpoint-20"


def test_a_kill_while_a_run_is_resumed_loses_no_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(0, monkeypatch)
    file, arguments = tmp_path / "metrics.jsonl", cast(Any, None)
    text = "".join(json.dumps({"step": step, "seconds": 1.0}) + "\n" for step in range(4))
    file.write_text(text)
    state = TrainerState(global_step=2, is_world_process_zero=True)
    with pytest.raises(KilledError):
        MetricsFile(file).on_train_begin(arguments, state, TrainerControl())
    assert file.read_text() == text


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 0.1, "seconds": 1.0}) for step in (1, 2, 3)]
    file.write_text("\n".join([*lines, lines[2][:9]]))
    assert read_metrics(file) == [json.loads(line) for line in lines]
    state = TrainerState(global_step=2, is_world_process_zero=True)
    MetricsFile(file).on_train_begin(cast(Any, None), state, TrainerControl())
    assert file.read_text() == f"{lines[0]}\n{lines[1]}\n"
    file.write_text("\n".join([lines[0][:9], *lines]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not JSON"):
        read_metrics(file)


def test_a_configuration_that_was_not_written_in_full_is_no_other_run(
    run_config: RunConfig,
) -> None:
    folder = Path(run_config.output_dir)
    folder.mkdir()
    (folder / f"{CONFIG_FILE}.new").write_text("output_")
    check_folder(folder, run_config, resume=False, overwrite=False)
    (folder / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        check_folder(folder, run_config, resume=False, overwrite=False)


def test_what_is_measured_and_saved_on_the_way_is_no_other_run(run_config: RunConfig) -> None:
    now = replace(
        run_config.training,
        save_every=7,
        log_every=7,
        evaluate_every=0,
        tensorboard=True,
        gradient_checkpointing=True,
    )
    assert differences(run_config, replace(run_config, training=now)) == []
    now = replace(now, weight_decay=0.5)
    assert len(differences(run_config, replace(run_config, training=now))) == 1


def test_a_path_may_be_written_in_another_way(run_config: RunConfig) -> None:
    before = replace(run_config, stages=[], text=TextData("data/x", length=64))
    assert differences(before, replace(before, text=TextData("./data//x/", length=64))) == []
    assert differences(before, replace(before, text=TextData("data/y", length=64))) == [
        "text.corpus was 'data/x' and is 'data/y'"
    ]
    kept = SummaryData(path="rows", length=64, max_summary_tokens=16)
    before = replace(run_config, stages=[], summaries=kept)
    assert differences(before, replace(before, summaries=replace(kept, path="rows/"))) == []
    for name in ("corpus", "tokenizer", "initial"):
        one, other = (replace(run_config, **{name: path}) for path in ("a/b", "a/c/../b/"))
        assert differences(one, other) == []
        assert differences(one, replace(run_config, **{name: None}))
