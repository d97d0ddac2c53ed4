"""bAbI as an evaluation task: a model that answers from the context, one that never can."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from drt import DRTConfig, DRTForCausalLM
from drt.checkpoints import Checkpoint
from drt.data import Corpus, byte_tokenizer, load_corpus
from drt.evaluation import babi
from drt.evaluation.babi import BabiTask
from drt.evaluation.intervals import wilson_interval
from drt.evaluation.reading import Answer
from drt.retrieval import Retrieval

CHUNK = 16


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    stories = [
        {
            "task": task,
            "facts": ["Mary went to the garden.", "John went to the office."],
            "question": f"Where is {person}?",
            "answer": place,
            "supporting": [number],
        }
        for task in (1, 4)
        for number, (person, place) in enumerate((("Mary", "garden"), ("John", "office")))
    ]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stories))
    (tmp_path / "book.txt").write_text("It rained. Nobody came. The night was long. " * 200)
    return {
        "facts": str(tmp_path / "stories.jsonl"),
        "corpus": str(tmp_path / "book.txt"),
        "tasks": [1, 4],
        "lengths": [512, 256],
        "n": 9,
    }


@pytest.fixture
def checkpoint(small_model: dict[str, Any], tmp_path: Path) -> Checkpoint:
    model = DRTForCausalLM(DRTConfig(vocab_size=258, **small_model)).eval()
    return Checkpoint(tmp_path, model, byte_tokenizer(), "float32")


class KnowingReader:
    """Stands in for a reading: it looks answers up, and retrieved what it is told to."""

    chunks: tuple[int, ...] = ()
    wrong = ""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.text = b""

    def __enter__(self) -> "KnowingReader":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, ids: torch.Tensor) -> None:
        self.text += bytes(ids.tolist())

    def answer(self, ids: torch.Tensor, num_tokens: int) -> Answer:
        """The place of the fact about whom the question names, if the name is not ``wrong``."""
        person = bytes(ids.tolist()).rpartition(b"Where is ")[2].partition(b"?")[0]
        place = self.text.rpartition(person + b" went to the ")[2].partition(b".")[0]
        said = list(b" " + place)
        if person.decode() == self.wrong:
            said[-1] += 1
        assert len(said) == num_tokens
        found = torch.tensor([[list(self.chunks)]])
        return Answer(said, (Retrieval(found, found.float(), found.float()),) * 2)


def test_scores_by_task_and_length(
    settings: dict[str, Any], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AllButJohn(KnowingReader):
        chunks = tuple(range(100))
        wrong = "John"

    monkeypatch.setattr(babi, "start_reading", AllButJohn)
    record = BabiTask(**settings).evaluate(checkpoint, title="test")
    cells = [(row["length"], row["task"]) for row in record["scores"]]
    assert cells == [(256, 1), (256, 4), (512, 1), (512, 4)]
    for row in record["scores"]:
        # Nine were wanted, there are two of each task; one of them is about John.
        assert (row["n"], row["num_right"], row["exact_match"]) == (2, 1, 0.5)
        assert row["exact_match_interval"] == wilson_interval(1, 2)
        assert row["recall"] == 1.0
    assert json.loads(json.dumps(record))["settings"]["n"] == 9


def test_recall_is_of_the_supporting_facts(
    settings: dict[str, Any], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = BabiTask(**{**settings, "tasks": [1], "lengths": [256]})
    corpus: Corpus = load_corpus(settings["corpus"], checkpoint.tokenizer)
    needed = []
    for index in range(2):
        example = babi.BabiStories(settings["facts"], tasks=[1]).evaluation_example(
            corpus, seed=task.seed, index=index, length=256, chunk_size=CHUNK
        )
        needed.append(example.questions[0].needle_chunks)

    class FirstChunkOfTheFirst(KnowingReader):
        chunks = (needed[0][0],)

    monkeypatch.setattr(babi, "start_reading", FirstChunkOfTheFirst)
    (row,) = task.evaluate(checkpoint, title="test")["scores"]
    shares = [(needed[0][0] in chunks) / len(chunks) for chunks in needed]
    assert row["recall"] == pytest.approx(sum(shares) / 2)
    other = BabiTask(**{**settings, "tasks": [1], "lengths": [256], "chunk_size": 32})
    # The model's chunks are not those that the question counts in.
    assert other.evaluate(checkpoint, title="test")["scores"][0]["recall"] is None


def test_a_real_model_is_asked(settings: dict[str, Any], checkpoint: Checkpoint) -> None:
    record = BabiTask(**settings).evaluate(checkpoint, title="test")
    assert {row["n"] for row in record["scores"]} == {2}
    # An untrained model does not spell six letters right.
    assert {row["num_right"] for row in record["scores"]} == {0}
    assert all(0 <= row["recall"] <= 1 for row in record["scores"])
    table = BabiTask.table({"drt": record, "a longer name": record})
    assert table.count("exact match") == 4
    assert "0.000 of 2" in table
    assert "0.000-0.658" in table


def test_wrong_settings_are_refused(
    settings: dict[str, Any], checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="n is 0"):
        BabiTask(**{**settings, "n": 0})
    with pytest.raises(ValueError, match="neither may be"):
        BabiTask(**{**settings, "lengths": []})
    task = BabiTask(**{**settings, "lengths": [256, 1000]})
    monkeypatch.setattr(task.__class__, "_ask", lambda *_: pytest.fail("a model was asked"))
    with pytest.raises(ValueError, match="length is 1000; it must be a multiple of chunk_size"):
        task.evaluate(checkpoint, title="test")
    with pytest.raises(ValueError, match=r"no story of tasks \[1\] fits"):
        BabiTask(**{**settings, "lengths": [64]}).evaluate(checkpoint, title="test")
