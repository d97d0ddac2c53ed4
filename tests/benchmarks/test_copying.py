"""The copy model on texts whose repetitions are known."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import copying
from drt import DRTForCausalLM
from drt.data.prepared import CorpusConfig, find_sources, prepare
from drt.data.tokenization import byte_tokenizer
from drt.evaluation.windows import Window
from drt.testing import tiny_config


def letters(count: int, seed: int) -> np.ndarray:
    """So many that four in a row hardly ever stand twice."""
    return np.random.default_rng(seed).integers(0, 60000, size=count).astype(np.uint16)


def test_repetitions_are_found() -> None:
    once = letters(100, 0)
    found = copying.find_copies(np.concatenate([once, once]), 100)
    # Nothing is known of the first four; then ever longer matches, up to the longest.
    assert not found.kind[:4].any()
    assert (found.share[4:] == 1).all()
    kinds = found.kind[[4, 5, 6, 8, 12, 16, 24]]
    assert len(set(kinds)) == 7
    assert found.kind[[7, 11, 99]].tolist() == kinds[[2, 3, 6]].tolist()
    assert not copying.find_copies(letters(100, 2), 50).kind.any()


def test_followers_that_disagree() -> None:
    key, others = letters(4, 0), letters(3, 1)
    row = np.concatenate([*([*key, other] for other in others), [*key, others[0]]])
    found = copying.find_copies(row.astype(np.uint16), 1)
    assert found.share == pytest.approx(1 / 3)
    agreed = np.concatenate([*([*key, others[0]] for _ in others), [*key, others[0]]])
    assert copying.find_copies(agreed.astype(np.uint16), 1).kind != found.kind


def test_a_mixture_is_fitted_on_other_documents() -> None:
    chances = np.full((2, 100), 0.1)
    share = np.stack([np.ones(100), np.tile([1.0, 0.0], 50)])
    kind = np.ones((2, 100), np.int64)
    copies = copying.Copies(share, kind)
    found = copying.mixed(chances, copies, np.array([True, False]))
    # The second's copies are right half of the time: w / (w + 0.1 (1 - w)) = w / 0.5 at its best.
    weight = 4 / 9
    assert found[0] == pytest.approx(weight + (1 - weight) * 0.1, abs=1e-3)
    # The first's always, so that the second trusts them as far as any.
    assert found[1, 1] == pytest.approx(0.001 * 0.1)
    none = copies._replace(kind=np.zeros_like(kind))
    assert (copying.mixed(chances, none, np.array([True, False])) == chances).all()


def test_what_stands_twice_is_scored_twice() -> None:
    """A model that knows what it has read: certain of all but the first of each token."""

    class Reader:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            following = torch.nn.functional.pad(input_ids, (0, 1))[0, 1:]
            logits = torch.zeros(1, input_ids.shape[1], 60000)
            for at, token in enumerate(following.tolist()):
                if token in input_ids[0, : at + 1].tolist():
                    logits[0, at, token] = 50
            return SimpleNamespace(logits=logits)

    tokens = np.random.default_rng(0).permutation(60000)[:1000].astype(np.uint16)
    split = SimpleNamespace(document=lambda number: SimpleNamespace(tokens=tokens))
    text: Any = SimpleNamespace(split=split, windows=[Window(0, 30, 40, 50)] * 2)
    found = copying.planted(Reader(), text, 200, count=2)
    assert found["first"] == pytest.approx(np.log2(60000))
    assert found["second"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="no stretch of the split has 1,224 tokens"):
        copying.planted(Reader(), text, 1000, count=2)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        once = np.random.default_rng(number).integers(97, 123, size=600).astype(np.uint8)
        (texts / f"{number}.txt").write_bytes(np.concatenate([once, once]).tobytes())
    config = CorpusConfig(tokenizer="bytes", end_of_text=False)
    prepare(config, byte_tokenizer(), find_sources(config, [texts]), tmp_path / "data")
    model = tmp_path / "model"
    DRTForCausalLM(tiny_config(vocab_size=258)).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    words = [str(tmp_path / "data" / "train"), str(model), "--json", str(tmp_path / "json")]
    lengths = ["--context", "600", "--lengths", "600", "1200", "--distances", "96", "400"]
    copying.main([*words, *lengths])
    (record,) = json.loads((tmp_path / "json").read_text())["models"].values()
    # In 600 tokens nothing is repeated, in 1,200 everything: the copies are 0.999 of the mixture.
    assert record["with_copies"]["600"] == pytest.approx(record["alone"], abs=0.05)
    assert record["with_copies"]["1200"] < 0.1
    assert [each["distance"] for each in record["planted"]] == [96, 400]
    assert "+ copies of the last 1,200" in capsys.readouterr().out
    for wrong in (["--lengths", "512"], ["--distances", "95"]):
        with pytest.raises(SystemExit):
            copying.main([*words, *wrong])
    with pytest.raises(ValueError, match="2,000 tokens of one document are needed"):
        copying.main([*words, "--lengths", "2000"])
