"""Each benchmark runs from end to end at its smallest, and its JSON has the fields it should."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import devices
import model
import model_length
import model_train
import operators
from common import PASSES
from drt.ops.gca import api
from drt.testing import tiny_config
from gca_variants import Sizes

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def tiny_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Sizes(chunks=0, heads=4, kv_heads=2, width=16)
    monkeypatch.setattr(operators, "SHAPES", (shape,))
    monkeypatch.setattr("ceilings.CPU_SIZES", (64,))
    monkeypatch.setattr("ceilings.CPU_BYTES", 1 << 20)


@pytest.mark.usefixtures("tiny_operators")
def test_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "operators.json"
    operators.main(["--quick", "--device", "cpu", "--json", str(path)])
    results = json.loads(path.read_text())
    assert set(results) == {
        *("hardware", "device", "ceilings", "cases", "deterministic", "decoding"),
    }
    assert set(results["ceilings"]["flops"]) == {"fp32", "bf16"}
    assert results["ceilings"]["bandwidth"] > 0
    # Two precisions of the shape, with 64 and with 65 queries.
    assert len(results["deterministic"]) == 4
    assert all(results["deterministic"].values())
    assert [x["passes"] for x in results["cases"]] == [*PASSES] * 4
    for case in results["cases"]:
        timed = {"ours", "chunk SDPA", "grouped einsum", "full causal", "window 512"}
        assert {name: len(x) for name, x in case["seconds"].items()} == dict.fromkeys(timed, 3)
        assert case["failures"] == {"NSA": "needs CUDA", "MoBA": "needs CUDA"}
        assert case["rates"]["of_flops"] > 0
    assert "NSA: needs CUDA" in capsys.readouterr().out


def test_flops_and_bytes_of_a_case() -> None:
    sizes = Sizes(chunks=256, heads=12, kv_heads=4)
    case = operators.Case("bf16", sizes)
    # 16384 queries, 512 keys each, 12 heads of 64; a product and a sum, for scores and for values.
    assert case.flops("forward") == 2 * 2 * 16384 * 512 * 12 * 64
    query, memory = 16384 * 12 * 64 * 2, 16384 * 4 * 64 * 2
    assert case.least_bytes("forward") == 2 * query + 2 * memory
    assert case.least_bytes("forward+backward") == 5 * query + 6 * memory


@pytest.fixture
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        model_train, "CPU_QUICK", model_train.CPU_QUICK._replace(length=64, repeats=2)
    )
    monkeypatch.setattr("length_models.CHECKED_LENGTH", 128)
    monkeypatch.setattr(model_length, "NUM_CHUNKS", 1)
    monkeypatch.setattr(model_length, "NUM_SAMPLES", 2)


@pytest.mark.usefixtures("tiny_models")
def test_training(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    model.main(["--quick", "--device", "cpu", "--part", "train", "--json", str(path)])
    results = json.loads(path.read_text())
    assert set(results) == {"hardware", "device", "train"}
    train = results["train"]
    names = set(train["parameters"])
    assert {"sliding window", "sliding window + 2 layers", "DRT x1", "DRT x2"} < names
    for samples in train["seconds"].values():
        assert {name: len(x) for name, x in samples.items()} == dict.fromkeys(names, 2)
    assert set(train["peak_bytes"]) == names
    assert (train["batch"], train["length"]) == (1, 64)


@pytest.mark.usefixtures("tiny_models")
def test_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: checked in float32, measured in bfloat16.
    monkeypatch.setattr(model_length, "inference_dtype", lambda device: torch.bfloat16)
    path = tmp_path / "model.json"
    options = ["--quick", "--device", "cpu", "--part", "length", "--lengths", "96"]
    model.main([*options, "--json", str(path)])
    results = json.loads(path.read_text())
    assert set(results) == {"hardware", "device", "length"}
    found = results["length"]
    readers = ["DRT device", "DRT host", "Llama", "DRT device, graph", "DRT host, graph"]
    assert [(line["length"], line["name"]) for line in found["lines"]] == [
        (96, name) for name in readers
    ]
    for line in found["lines"]:
        assert line["failure"] is None
        assert len(line["decoding"]["landmark"]) == 3
        assert len(line["prefill"]) == (0 if "graph" in line["name"] else 2)
    assert set(found["deviations"]) == {*readers} - {"DRT host, graph"}
    assert found["dtype"] == "torch.bfloat16"
    # Tied weights are still tied.
    sizes = model_length.load_model("demo", None)
    assert found["parameters"]["DRT"] == model_length.num_parameters(sizes)


def test_the_backend_of_a_model_can_be_chosen() -> None:
    key = torch.empty(1, 1, 1, 1, 1)
    with model_train.gca_backend("reference"):
        assert api.default_backend(key, key) == "reference"
    assert api.default_backend(key, key) == "blocked"
    trained = model_train.make_trained(
        tiny_config(), torch.device("cpu"), backend="nonsense", compiled=False
    )
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        trained.step(torch.zeros(1, 40, dtype=torch.int64), update=False)


def test_the_reference_does_not_decide_how_large_a_batch_is() -> None:
    class Fits:
        def __init__(self, rows: int) -> None:
            self.rows = rows

        def step(self, ids: torch.Tensor, *, update: bool) -> None:
            if len(ids) > self.rows:
                raise torch.OutOfMemoryError

    models: Any = {model_train.BASELINE: Fits(8), "DRT x1": Fits(4), model_train.REFERENCE: Fits(1)}
    setting = model_train.CPU_QUICK._replace(batches=(8, 4, 2, 1), length=8)
    batch, peaks, failures = model_train.largest_batch(models, setting, torch.device("cpu"))
    assert (batch, list(peaks)) == (4, [model_train.BASELINE, "DRT x1"])
    assert failures == {model_train.REFERENCE: "out of memory"}


def test_full_attention_stops_at_the_budget() -> None:
    before = model_length.Line(1024, "Llama", prefill=[2.0, 4.0, 3.0])
    ours = model_length.Line(1024, "DRT host", prefill=[0.5])
    assert model_length.expected_seconds("Llama", 4096, [before, ours]) == 48.0
    assert model_length.expected_seconds("DRT host", 4096, [before, ours]) == 2.0
    assert model_length.expected_seconds("DRT device", 4096, [before, ours]) == 0.0


def test_what_does_not_fit_is_an_entry() -> None:
    def raises(error: Exception) -> Any:
        def call() -> None:
            raise error

        return call

    calls = {
        "able": lambda: None,
        "large": raises(torch.OutOfMemoryError("no room")),
        "theirs": raises(AssertionError("wants 16\nheads")),
    }
    found = devices.runnable(calls, foreign=["theirs"])
    assert list(found.variants) == ["able"]
    assert found.failures == {"large": "out of memory", "theirs": "AssertionError: wants 16"}
    with pytest.raises(ValueError, match="ours"):
        devices.runnable({"ours": raises(ValueError("ours"))}, foreign=["theirs"])


@pytest.mark.slow
# The longest, gca.py, took 146 s on two busy cores.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("script", "options", "fields"),
    [
        ("gca.py", [], {"time", "memory", "long"}),
        ("window.py", [], {"2048"}),
        ("search.py", [], {"search", "step", "read"}),
        ("length.py", ["--models", "demo", "--lengths", "16K", "--tiers", "device"], {"models"}),
        ("operators.py", ["--device", "cpu"], {"cases", "ceilings"}),
        ("model.py", ["--device", "cpu"], {"train", "length"}),
    ],
)
def test_scripts(script: str, options: list[str], fields: set[str], tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / script), "--quick", "--json", str(tmp_path / "json")]
    folder = ["--output", str(tmp_path)] if script == "length.py" else []
    done = subprocess.run(
        [*command, *options, *folder], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert fields <= set(json.loads((tmp_path / "json").read_text()))
