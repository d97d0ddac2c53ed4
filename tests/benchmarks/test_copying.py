"""The copy model on texts whose repetitions are known."""

import json
from pathlib import Path

import numpy as np
import pytest

import copying
from drt import DRTForCausalLM
from drt.data.prepared import CorpusConfig, find_sources, prepare
from drt.data.tokenization import byte_tokenizer
from drt.testing import tiny_config


def letters(count: int, seed: int) -> np.ndarray:
    """So many that four in a row hardly ever stand twice."""
    return np.random.default_rng(seed).integers(0, 60000, size=count).astype(np.uint16)


def test_a_repetition_is_found_at_its_distance() -> None:
    once = letters(100, 0)
    found = copying.find_copies(np.concatenate([once, once]), 100)
    # Nothing is known of the first four; then ever longer matches, up to the longest.
    assert not found.order[:4].any()
    assert found.order[[4, 5, 7, 8, 12, 16, 24, 99]].tolist() == [4, 5, 6, 8, 12, 16, 24, 24]
    assert found.is_right[4:].all()
    assert (found.distance[4:] == 100).all()
    assert (found.share[4:] == 1).all()


def test_followers_that_disagree() -> None:
    key, others = letters(4, 0), letters(3, 1)
    row = np.concatenate([*([*key, other] for other in others), [*key, others[0]]])
    found = copying.find_copies(row.astype(np.uint16), 1)
    assert found.share == pytest.approx(1 / 3)
    assert found.distance == 5
    assert not found.is_right
    assert not copying.find_copies(letters(100, 2), 50).kind.any()


def test_a_mixture_is_fitted_on_other_documents() -> None:
    chances = np.full((2, 100), 0.1)
    share = np.stack([np.ones(100), np.tile([1.0, 0.0], 50)])
    kind, ones = np.ones((2, 100), np.int64), np.ones((2, 100), np.int64)
    copies = copying.Copies(share, kind, ones, ones, share > 0)
    found = copying.mixed(chances, copies, np.array([True, False]))
    # The second's copies are right half of the time: w / (w + 0.1 (1 - w)) = w / 0.5 at its best.
    weight = 4 / 9
    assert found[0] == pytest.approx(weight + (1 - weight) * 0.1, abs=1e-3)
    # The first's always, so that the second trusts them as far as any.
    assert found[1, 1] == pytest.approx(0.001 * 0.1)
    none = copies._replace(kind=np.zeros_like(kind))
    assert (copying.mixed(chances, none, np.array([True, False])) == chances).all()


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
    copying.main([*words, "--context", "600", "--lengths", "600", "1200"])
    (record,) = json.loads((tmp_path / "json").read_text())["models"].values()
    # In 600 tokens nothing is repeated, in 1,200 everything: the copies are 0.999 of the mixture.
    assert record["with_copies"]["600"] == pytest.approx(record["alone"], abs=0.05)
    assert record["with_copies"]["1200"] < 0.1
    (repeats,) = record["repeats"]
    assert (repeats["from"], repeats["to"], repeats["right"]) == (512, 1024, 1)
    assert "+ copies of the last 1,200" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        copying.main([*words, "--lengths", "512"])
    with pytest.raises(ValueError, match="2,000 tokens of one document are needed"):
        copying.main([*words, "--lengths", "2000"])
