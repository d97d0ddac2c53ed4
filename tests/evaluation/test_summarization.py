"""Summaries written by tiny models: trained until they know them, in any batch, by any search."""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drt import DRTForCausalLM
from drt.data import byte_tokenizer
from drt.data.summaries import SummaryData
from drt.data.summary_batches import SummaryBatches
from drt.evaluation.rouge import Rouge
from drt.evaluation.summarization import SummarizationTask
from drt.testing import tiny_config

pytest.importorskip("rouge_score", reason="the extra `eval` is not installed")

EOS, PAD = 257, 256
SUMMARIES = ["red apples", "blue whales swim", "a second hill"]


class Loaded(NamedTuple):
    """What the task uses of a checkpoint."""

    model: Any
    tokenizer: Any
    precision: str = "float32"

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()


def tiny_drt() -> DRTForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "eos_token_id": EOS, "pad_token_id": PAD}
    return DRTForCausalLM(tiny_config(**sizes, initializer_range=0.1))


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Three documents of several chunks and different lengths, that differ in their first words."""
    lines = [
        {"id": f"d{n}", "document": f"{n * 'x'}{n}. Second. Third! {'z' * 20 * n}", "summary": each}
        for n, each in enumerate(SUMMARIES)
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def trained(path: str) -> DRTForCausalLM:
    """A model that has learned the three summaries by heart."""
    model = tiny_drt()
    data = SummaryData(path=path, split="test", length=128, max_summary_tokens=24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for batch in SummaryBatches(data, byte_tokenizer(), batch_size=3, num_steps=60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_what_was_learned_by_heart_is_written(path: str, tmp_path: Path) -> None:
    checkpoint = Loaded(trained(path), byte_tokenizer())
    task = SummarizationTask(path=path, max_summary_tokens=24, output=str(tmp_path / "texts"))
    record = task.evaluate(checkpoint, title="runs/my model")  # type: ignore[arg-type]
    for name in ("rouge1", "rouge2", "rougeL"):
        assert record[name] == {"mean": 100, "low": 100, "high": 100}
    assert {key: record[key] for key in ("n", "num_documents", "num_cut", "num_unfinished")} == {
        "n": 3,
        "num_documents": 3,
        "num_cut": 0,
        "num_unfinished": 0,
    }
    # A summary stands behind a space.
    assert record["summary_tokens"] == pytest.approx(sum(len(s) + 1 for s in SUMMARIES) / 3)
    assert record["settings"]["path"] == path
    lines = (tmp_path / "texts" / "runs-my-model.jsonl").read_text().splitlines()
    rows = {row["document"]: row for row in map(json.loads, lines)}
    assert {key: row["text"] for key, row in rows.items()} == {
        f"d{n}": text for n, text in enumerate(SUMMARIES)
    }
    assert all(row["rougeL"] == 100 and row["is_finished"] for row in rows.values())
    assert json.loads(json.dumps(record)) == record
    cut = SummarizationTask(path=path, max_summary_tokens=3)
    shorter = cut.evaluate(checkpoint, title="cut")  # type: ignore[arg-type]
    # " re", " bl", " a ": one word of three is right, of three in its reference.
    assert shorter["rouge1"]["mean"] == pytest.approx(100 * (0 + 0 + 2 * 1 / 4) / 3)
    assert (shorter["num_unfinished"], shorter["summary_tokens"]) == (3, 3)


def written(model: Any, path: str, folder: Path, **settings: Any) -> dict[str, str]:
    task = SummarizationTask(path=path, max_summary_tokens=12, output=str(folder), **settings)
    task.evaluate(Loaded(model, byte_tokenizer()), title="t")  # type: ignore[arg-type]
    lines = (folder / "t.jsonl").read_text().splitlines()
    return {row["document"]: row["text"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("num_beams", [1, 2])
def test_batches_write_what_documents_alone_get(path: str, tmp_path: Path, num_beams: int) -> None:
    model = tiny_drt()
    alone = written(model, path, tmp_path, num_beams=num_beams)
    together = written(model, path, tmp_path, num_beams=num_beams, batch_size=3)
    assert together == alone
    for number in range(3):
        row = {"document": f"{number * 'x'}{number}. Second. Third! {'z' * 20 * number}"}
        ids = torch.tensor([[*f"{row['document']} TL;DR:".encode()]])
        made = model.generate(
            ids, max_new_tokens=13, num_beams=num_beams, do_sample=False, eos_token_id=EOS,
            pad_token_id=EOS,
        )[0, ids.shape[1] :]  # fmt: skip
        bare = [each for each in made.tolist() if each < 256][:12]
        assert alone[f"d{number}"] == bytes(bare).decode(errors="replace").strip()


def test_other_models_write_up_to_their_positions(path: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=258, num_attention_heads=2, max_position_embeddings=64, **sizes)
    model = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"has 64 positions .*, 79 tokens need more"):
        written(model, path, tmp_path)
    found = written(model, path, tmp_path, length=64, batch_size=2)
    assert len(found) == 3
    assert written(model, path, tmp_path, beyond_limit=True) != found


def test_the_lead_is_scored_beside(path: str) -> None:
    task = SummarizationTask(path=path, max_summary_tokens=4, lead_sentences=2)
    record = task.evaluate(Loaded(tiny_drt(), byte_tokenizer()), title="t")  # type: ignore[arg-type]
    rouge = Rouge()
    leads = [f"{n * 'x'}{n}. Second." for n in range(3)]
    wanted = sum(rouge.score(a, [b])[0] for a, b in zip(leads, SUMMARIES, strict=True)) / 3
    assert record["lead"]["rouge1"]["mean"] == pytest.approx(wanted)
    assert wanted > 0
    head, _, *rows, note = SummarizationTask.table({"one": record, "two": record}).splitlines()
    assert head.split() == ["model", "ROUGE-1", "ROUGE-2", "ROUGE-L", "n"]
    assert [row.split()[0] for row in rows] == ["one", "two", "lead-2"]
    assert f"{wanted:.2f} [" in rows[2]
    assert note == "per cent, in brackets 95 % intervals over documents"


def test_examples_are_drawn_by_the_seed(path: str, tmp_path: Path) -> None:
    model = tiny_drt()
    drawn = {tuple(written(model, path, tmp_path, n=1, seed=seed)) for seed in range(6)}
    # One of three, six times: the same each time would happen once in 243 choices of seeds.
    assert len(drawn) > 1
    assert len(written(model, path, tmp_path, n=50)) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 0}, "n is 0; it must be 1 or more"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"lead_sentences": 0}, "lead_sentences is 0"),
        ({"length": 257}, "max_summary_tokens is 256; with length 257 it must be 255 or less"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SummarizationTask(path="x", **settings)
