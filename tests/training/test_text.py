"""Training on prepared text: what is learned from, any architecture, and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from drt.architectures import make_config, make_model
from drt.checkpoints import load_checkpoint
from drt.data import byte_tokenizer
from drt.data.bpe import train_bpe
from drt.data.prepared import CorpusConfig, TokenRows, find_sources, prepare
from drt.run_config import RunConfig, load_config, overlay
from drt.training import train
from drt.training.batches import TextSteps

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared corpus of bytes; what follows a line can be learned within some steps."""
    for split, count in (("train", 12), ("validation", 4)):
        (tmp_path / "texts" / split).mkdir(parents=True)
        for number in range(count):
            text = "abcdefgh" * 40 + f"{number}\n"
            (tmp_path / "texts" / split / f"{number}.txt").write_text(text)
    config = CorpusConfig(tokenizer="bytes")
    sources = find_sources(config, [tmp_path / "texts"])
    prepare(config, byte_tokenizer(), sources, tmp_path / "prepared")
    return tmp_path / "prepared"


def text_run(prepared: Path, model: dict[str, Any], **training: Any) -> RunConfig:
    data = {
        "output_dir": str(prepared.parent / "run"),
        "model": model,
        "text": {"corpus": str(prepared), "length": 64, "validation_rows": 2},
        "training": {
            "num_steps": 30,
            "tokens_per_step": 256,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "log_every": 5,
            "save_every": 10,
            "evaluate_every": 10,
            **training,
        },
    }
    file = prepared.parent / "text.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_config(file)


def metrics(config: RunConfig) -> list[dict[str, Any]]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_model_learns_text_and_says_how(prepared: Path, small_model: dict[str, Any]) -> None:
    config = text_run(prepared, small_model, num_steps=60)
    final = train(config)
    lines = metrics(config)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] > 4.0
    assert losses[-1] < 0.7 * losses[0]
    validation = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(validation) == 6
    assert validation[-1] < validation[0]
    last = next(line for line in reversed(lines) if "loss" in line)
    assert last["tokens_per_second"] > 0
    # Four chunks a row, of which two are retrieved: the last landmark has a choice.
    assert 0 <= last["retrieval_entropy_0"] <= math.log(2) + 1e-6
    assert 0.5 <= last["retrieval_top_weight_0"] <= 1.0
    assert load_checkpoint(final).tokenizer.vocab_size == byte_tokenizer().vocab_size


def test_the_logged_loss_is_that_of_the_rows(prepared: Path, small_model: dict[str, Any]) -> None:
    config = text_run(prepared, small_model, num_steps=1, log_every=1, save_every=1)
    train(config)
    rows = TokenRows(prepared / "train", length=64)
    with torch.no_grad():
        model = make_model(make_config(config.model, byte_tokenizer()), seed=0).eval()
        total = count = 0.0
        for index in range(4):
            row = {name: each[None] for name, each in rows[index].items()}
            wanted = int((row["labels"][:, 1:] != -100).sum())
            total += float(model(**row).loss) * wanted
            count += wanted
    # Two candidates of two are retrieved with or without noise but at the last landmark, whose
    # retrieval nobody in the row uses; float32 sums in another order.
    logged = next(line["loss"] for line in metrics(config) if "loss" in line)
    assert logged == pytest.approx(total / count, rel=1e-4)


def test_short_documents_are_padded_and_count_as_much_as_their_tokens(
    prepared: Path, small_model: dict[str, Any]
) -> None:
    model_config = {**small_model, "retrieval_noise": 0.0}
    config = text_run(prepared, model_config, num_steps=1, log_every=1, tokens_per_step=1024)
    assert config.text is not None
    data = replace(config.text, length=256, documents="apart", last_piece="pad")
    config = replace(config, text=data)
    train(config)
    rows = TokenRows(prepared / "train", length=256, documents="apart", last_piece="pad")
    spans = [rows.span(index) for index in range(4)]
    assert min(stop - start for start, stop in spans) < 256
    with torch.no_grad():
        model = make_model(make_config(config.model, byte_tokenizer()), seed=0).eval()
        total = count = 0.0
        for start, stop in spans:
            ids = torch.from_numpy(rows.split.tokens(start, stop).astype("int64"))[None]
            total += float(model(input_ids=ids, labels=ids).loss) * (stop - start - 1)
            count += stop - start - 1
    logged = next(line["loss"] for line in metrics(config) if "loss" in line)
    assert logged == pytest.approx(total / count, rel=1e-4)


def test_a_corpus_that_is_not_there_is_not_looked_for_on_the_hub(
    prepared: Path, small_model: dict[str, Any]
) -> None:
    config = text_run(prepared, small_model)
    assert config.text is not None
    with pytest.raises(ValueError, match=r"text\.corpus is 'my/corpus', where .* has written no"):
        train(replace(config, text=replace(config.text, corpus="my/corpus")))


def test_any_causal_model_can_be_trained(prepared: Path) -> None:
    config = text_run(prepared, LLAMA)
    with pytest.raises(ValueError, match="packed, and a LlamaForCausalLM cannot keep documents"):
        train(config)
    assert config.text is not None
    crossing = replace(config, text=replace(config.text, documents="crossing"))
    model = AutoModelForCausalLM.from_pretrained(train(crossing))
    assert type(model).__name__ == "LlamaForCausalLM"
    losses = [line["loss"] for line in metrics(crossing) if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_run_goes_on_from_another_model(prepared: Path, small_model: dict[str, Any]) -> None:
    first = text_run(prepared, small_model)
    final = train(first)
    config = replace(
        first, model={"retrieval_topk": 1}, initial=str(final), output_dir=str(final) + "-on"
    )
    second = load_checkpoint(train(config)).model
    assert second.config.use_cache
    assert second.generation_config.use_cache
    assert second.config.retrieval_topk == 1
    assert metrics(config)[0]["loss"] < 0.9 * metrics(first)[0]["loss"]
    with pytest.raises(ValueError, match="the initial model does not fit"):
        train(replace(config, model={"hidden_size": 32}, output_dir=str(final) + "-x"))
    with pytest.raises(ValueError, match="cannot go on from an initial model of type drt"):
        train(replace(config, model=LLAMA, output_dir=str(final) + "-y"))


def test_a_model_does_not_go_on_in_other_tokens(
    tmp_path: Path, prepared: Path, small_model: dict[str, Any]
) -> None:
    # As many entries as bytes have, and other ones.
    tokenizer = train_bpe(["abcd efgh ijkl mnop " * 9], 258)
    model = make_model(make_config(small_model, tokenizer), seed=0)
    for part in (model, tokenizer):
        part.save_pretrained(str(tmp_path / "initial"))
    config = text_run(prepared, {})
    with pytest.raises(ValueError, match=r"is not the initial model's: \d+ of its 258 entries are"):
        train(replace(config, initial=str(tmp_path / "initial")))
    assert not Path(config.output_dir).exists()


def test_every_row_comes_once_an_epoch(prepared: Path) -> None:
    rows = TokenRows(prepared / "train", length=64, num_epochs=2)
    steps = TextSteps(rows, rows_per_step=4)
    count = rows.num_rows // 4 * 4
    seen = torch.cat([steps.rows(step)["input_ids"] for step in range(count // 4)])
    assert len(seen) == count
    assert torch.equal(seen, torch.stack([rows[index]["input_ids"] for index in range(count)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 48}, "row length 48 must divide tokens_per_step"),
        ({"validation_rows": 100}, "rows of 64 tokens, text.validation_rows is 100"),
        ({"split": "training"}, "training"),
    ],
)
def test_what_does_not_fit_is_refused(
    prepared: Path, small_model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    config = text_run(prepared, small_model)
    assert config.text is not None
    with pytest.raises(ValueError, match=message):
        train(replace(config, text=replace(config.text, **changes)))
    assert not Path(config.output_dir).exists()


def test_without_rows_of_the_validation_loss_no_such_split_is_needed(
    prepared: Path, small_model: dict[str, Any]
) -> None:
    config = text_run(prepared, small_model, num_steps=2, save_every=0, evaluate_every=1)
    assert config.text is not None
    shutil.rmtree(prepared / "validation")
    train(replace(config, text=replace(config.text, validation_rows=0)))
    assert "validation_loss" not in (Path(config.output_dir) / "metrics.jsonl").read_text()


def test_micro_batches_that_do_not_share_out_are_refused(
    prepared: Path, small_model: dict[str, Any]
) -> None:
    config = text_run(prepared, small_model, num_micro_batches=3)
    with pytest.raises(ValueError, match="4 rows of 64 tokens a step cannot be shared out over 1"):
        train(config)


def test_one_process_does_not_take_several_gpus(
    prepared: Path, small_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="one process sees 2 GPUs: start one a GPU, with torchrun"):
        train(text_run(prepared, small_model))


def test_fields_of_another_kind_of_model_are_left_behind() -> None:
    below = {"model": {"hidden_size": 16, "chunk_size": 8}, "seed": 1}
    merged = overlay(below, {"model": {"model_type": "llama", "num_hidden_layers": 3}})
    assert merged["model"] == {"hidden_size": 16, "model_type": "llama", "num_hidden_layers": 3}
    with pytest.raises(ValueError, match=r"unknown key model\.hiden_size of a llama model"):
        make_config({"model_type": "llama", "hiden_size": 3}, byte_tokenizer())
    with pytest.raises(ValueError, match="'lama' is no model"):
        make_config({"model_type": "lama"}, byte_tokenizer())
