"""Records hold what was measured and what was left out; tables and figures show them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from drt import DRTForCausalLM
from drt.checkpoints import Checkpoint
from drt.data import NeedleTask, byte_tokenizer
from drt.evaluation.needle_evaluation import NeedleEvaluationTask
from drt.evaluation.needles import evaluate_needles
from drt.testing import tiny_config

TASK = NeedleTask(num_digits=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"Line {n} of a long and even text.\n" for n in range(800)))
    return str(path)


@pytest.fixture(scope="module")
def drt() -> Checkpoint:
    model = DRTForCausalLM(tiny_config(vocab_size=258)).eval()
    return Checkpoint(Path("runs/a/model"), model, byte_tokenizer(), "float32")


@pytest.fixture(scope="module")
def gpt2() -> Checkpoint:
    config = GPT2Config(
        vocab_size=258, n_embd=16, n_layer=1, n_head=2, n_positions=200, bos_token_id=257
    )
    return Checkpoint(Path("gpt2"), GPT2LMHeadModel(config).eval(), byte_tokenizer(), "float32")


def test_a_record_has_a_score_for_each_length_and_depth(drt: Checkpoint, text: str) -> None:
    from drt.data import load_corpus

    task = NeedleEvaluationTask(
        task=TASK, lengths=[256, 128], depths=[0.0, 1.0], questions=2, seeds=[1, 5], corpus=text
    )
    record = json.loads(json.dumps(task.evaluate(drt, title="a")))
    points = [(row["length"], row["depth"], row["n"]) for row in record["scores"]]
    assert points == [(128, 0, 4), (128, 1, 4), (256, 0, 4), (256, 1, 4)]
    corpus = load_corpus(text, drt.tokenizer)
    parts = [
        evaluate_needles(
            drt.model, corpus, task=TASK, length=256, num_questions=2, seed=seed, depth=1.0
        )
        for seed in (1, 5)
    ]
    last = record["scores"][-1]
    assert last["num_right"] == sum(part.num_right for part in parts)
    assert last["recall"] == sum(part.recall or 0 for part in parts) / 2
    assert last["recall"] is not None
    assert (record["left_out"], record["position_limit"]) == ([], None)
    assert record["settings"]["seeds"] == [1, 5]


def test_longer_lengths_get_fewer_questions(drt: Checkpoint, text: str) -> None:
    task = NeedleEvaluationTask(
        task=TASK, lengths=[128, 256], questions=3, long_from=128, questions_longest=1, corpus=text
    )
    scores = task.evaluate(drt, title="a")["scores"]
    assert [(row["length"], row["n"]) for row in scores] == [(128, 3), (256, 1)]


def test_lengths_beyond_a_model_are_refused_or_left_out(gpt2: Checkpoint, text: str) -> None:
    settings: dict[str, Any] = {"task": TASK, "lengths": [128, 192, 256], "corpus": text}
    for choice in ("refuse", "go_on"):
        with pytest.raises(ValueError, match=r"has 200 positions .*257 tokens need more$"):
            NeedleEvaluationTask(**settings, beyond_limit=choice).evaluate(gpt2, title="g")
    task = NeedleEvaluationTask(**settings, questions=1, beyond_limit="leave_out")
    record = task.evaluate(gpt2, title="g")
    assert [row["length"] for row in record["scores"]] == [128, 192]
    assert (record["left_out"], record["position_limit"]) == ([256], 200)
    assert not record["beyond_limit"]
    table = task.table({"g": record})
    assert table.splitlines()[-1] == "note: g has positions for 200 tokens: 256 left out"
    # 192 of the context and question, one token of the answer, and the first.
    first = NeedleEvaluationTask(**settings, begin_with_bos=True, beyond_limit="leave_out")
    gpt2.model.config.n_positions = 193
    lengths = [row["length"] for row in first.evaluate(gpt2, title="g")["scores"]]
    gpt2.model.config.n_positions = 200
    assert lengths == [128]


def test_a_record_says_that_an_answer_went_beyond_the_limit(text: str) -> None:
    """128 tokens of context and question fit; the first digit of the answer is one more."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    checkpoint = Checkpoint(Path("llama"), model, byte_tokenizer(), "float32")
    task = NeedleEvaluationTask(
        task=TASK, lengths=[128], questions=1, corpus=text, beyond_limit="go_on"
    )
    record = task.evaluate(checkpoint, title="l")
    assert (record["position_limit"], record["beyond_limit"]) == (128, True)
    model.config.max_position_embeddings = 129
    assert not task.evaluate(checkpoint, title="l")["beyond_limit"]


def test_a_drt_gets_no_first_token(drt: Checkpoint, gpt2: Checkpoint, text: str) -> None:
    task = NeedleEvaluationTask(
        task=TASK, lengths=[128], questions=1, corpus=text, begin_with_bos=True
    )
    drt.model.config.bos_token_id = 257
    records = {"d": task.evaluate(drt, title="d"), "g": task.evaluate(gpt2, title="g")}
    assert [record["first_token_id"] for record in records.values()] == [None, 257]
    assert records["d"]["scores"][0]["recall"] is not None


def test_a_first_token_that_a_model_does_not_name_is_refused(gpt2: Checkpoint, text: str) -> None:
    nameless = GPT2LMHeadModel(GPT2Config(**{**gpt2.model.config.to_dict(), "bos_token_id": None}))
    checkpoint = gpt2._replace(model=nameless.eval())
    task = NeedleEvaluationTask(lengths=[128], questions=1, corpus=text, begin_with_bos=True)
    with pytest.raises(ValueError, match="a gpt2 has no bos_token_id"):
        task.evaluate(checkpoint, title="g")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"segment_size": 0}, "segment_size must be at least 1, got 0"),
        (
            {"task": NeedleTask(kind="variables"), "depths": [0.5]},
            "facts of 'variables' keep their order",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeedleEvaluationTask(**settings)


def row(length: int, share: float, *, depth: float | None = None, recall: Any = None) -> Any:
    return {
        "length": length,
        "depth": depth,
        "n": 8,
        "exact_match": share,
        "exact_match_interval": [share - 0.125, share + 0.125],
        "recall": recall,
    }


def record(*rows: Any, **changes: Any) -> dict[str, Any]:
    plain = {"left_out": [], "position_limit": None, "beyond_limit": False, "tokenizer": "t"}
    plain["haystack_tokens"] = 1024
    settings = {"settings": {"task": {"kind": "multi"}}}
    return {"scores": list(rows), **plain, **settings, **changes}


def test_the_table_has_rows_for_each_model() -> None:
    records = {
        "a": record(row(128, 0.5, recall=0.75), row(2048, 0.25, recall=1.0)),
        "longer-than-ten": record(
            row(128, 0.5), tokenizer="u", position_limit=64, beyond_limit=True
        ),
    }
    lines = [line.split() for line in NeedleEvaluationTask.table(records).splitlines()]
    assert lines[0] == ["model", "task", "figure", "128", "2,048"]
    assert lines[2:9] == [
        ["a", "multi", "exact", "match", "0.500", "0.250"],
        ["a", "multi", "95", "%", "0.375-0.625", "0.125-0.375"],
        ["a", "multi", "questions", "8", "8"],
        ["a", "multi", "recall@K", "0.750", "1.000"],
        ["longer-than-ten", "multi", "exact", "match", "0.500", "-"],
        ["longer-than-ten", "multi", "95", "%", "0.375-0.625", "-"],
        ["longer-than-ten", "multi", "questions", "8", "-"],
    ]
    notes = [" ".join(line) for line in lines[9:]]
    assert notes == [
        "note: the models have different tokenizers, so their tokens are not the same text",
        "note: the haystack of a has 1,024 tokens, which longer contexts repeat",
        "note: longer-than-ten was made for 64 tokens and went on beyond",
    ]


def test_the_table_has_a_line_for_each_depth() -> None:
    records = {"a": record(row(128, 0.5, depth=0.0), row(128, 0.25, depth=0.5))}
    lines = [line.split() for line in NeedleEvaluationTask.table(records).splitlines()[2:]]
    assert [line[2:] for line in lines if "exact" in line] == [
        ["exact", "@0", "0.500"],
        ["exact", "@0.5", "0.250"],
    ]


def test_figures_are_maps_or_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    shown: list[Any] = []
    plain = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, grid, **k: (shown.append(grid), plain(self, grid, **k))[1]
    )
    curves = {"a": record(row(128, 0.5), row(256, 0.25)), "b": record(row(128, 0.75))}
    NeedleEvaluationTask.draw(curves, tmp_path / "curves.png")
    assert shown == []
    # Rows of a map are depths, columns lengths; b has no score at 256.
    maps = {
        "a": record(row(256, 0.25, depth=0.0), row(128, 0.5, depth=0.0), row(128, 0.75, depth=1.0)),
        "b": record(row(128, 0.5, depth=0.5)),
    }
    NeedleEvaluationTask.draw(maps, tmp_path / "maps.png")
    assert shown[0] == [[0.5, 0.25], [0.75, pytest.approx(float("nan"), nan_ok=True)]]
    assert shown[1] == [[0.5]]
    for name in ("curves.png", "maps.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no scores to draw"):
        NeedleEvaluationTask.draw({"a": record()}, tmp_path / "none.png")
