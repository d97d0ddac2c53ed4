"""Costs are measured, and what is counted is right: bytes held and floating-point operations."""

import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from drt import DRTForCausalLM
from drt.checkpoints import Checkpoint
from drt.data.tokenization import byte_tokenizer
from drt.evaluation.cost import CostTask
from drt.evaluation.held_bytes import held_bytes
from drt.evaluation.length_figures import draw_cost, draw_perplexity
from drt.evaluation.memory import peak_growth, resident_bytes
from drt.evaluation.reading import start_reading
from drt.flops import flops_of_row
from drt.ops.flops import cross_attention
from drt.ops.gca import grouped_cross_attention
from drt.run_config import build
from drt.testing import tiny_config

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_garbage() -> Iterator[None]:
    """What the libraries have made is not looked through again at each measurement."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).eval()


def evaluate(model: Any, **settings: Any) -> dict[str, Any]:
    checkpoint = Checkpoint(Path("model"), model, byte_tokenizer(), "float32")
    record = build(CostTask, settings).evaluate(checkpoint, title="test")
    assert json.loads(json.dumps(record)) == record
    return record


@pytest.mark.parametrize("memory", ["device", "disk"])
def test_a_record_of_a_drt(memory: str) -> None:
    model = DRTForCausalLM(tiny_config()).eval()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    settings = {"lengths": [64, 160], "num_repeats": 2, "memory": memory}
    record = evaluate(model, **settings, training_length=64, training_rows=2)
    assert [row["length"] for row in record["rows"]] == [64, 160]
    for row in record["rows"]:
        assert len(row["prefill_seconds_samples"]) == 2
        # Two chunks of each repeat.
        assert len(row["decode_ms_samples"]) == 4
        assert row["tokens_per_second"] == pytest.approx(row["length"] / row["prefill_seconds"])
        assert row["decode_ms"] > 0
        assert set(row["held_bytes"]) == {"device", "host", "disk"}
        assert (row["held_bytes"]["disk"] > 0) == (memory == "disk")
        assert row["held_bytes"]["host"] > 0
    training = record["training"]
    assert training["flops"] == 2 * flops_of_row(model, 64)
    assert training["flops_per_token"] == training["flops"] / 128
    assert len(training["seconds_samples"]) == 2
    # Nothing of the model or of the noise of others has changed.
    assert not model.training
    assert all(torch.equal(weights[name], now) for name, now in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_table_and_a_figure_of_two_models(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lengths": [32, 64], "num_repeats": 1}
    records = {
        "DRT": evaluate(DRTForCausalLM(tiny_config()).eval(), **settings, training_length=32),
        "Llama": evaluate(llama(), **settings),
    }
    lines = CostTask.table(records).splitlines()
    assert lines[0] == "reading and decoding"
    assert [line.split()[:2] for line in lines[3:7]] == [
        ["DRT", "32"],
        ["DRT", "64"],
        ["Llama", "32"],
        ["Llama", "64"],
    ]
    assert lines[8] == "training"
    assert [line.split()[:3] for line in lines[11:]] == [["DRT", "1", "32"]]
    CostTask.draw(records, tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no records"):
        draw_cost({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"one mode, got \['book', 'sliding'\]"):
        draw_perplexity({"a": {"mode": "book"}, "b": {"mode": "sliding"}}, tmp_path / "none.png")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"lengths": []}, "lengths must be of at least 1 token"),
        ({"num_chunks": 1}, "num_chunks must be at least 2, got 1"),
        ({"num_repeats": 0}, "num_repeats must be at least 1"),
        ({"training_length": 1}, "training_length must be at least 2"),
        ({"lengths": [8], "training_length": 513}, "has 512 positions .* 513 tokens need more"),
        # The text, one token, and two chunks of 64.
        ({"lengths": [400]}, "has 512 positions .* 529 tokens need more"),
    ],
)
def test_errors(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        evaluate(llama(), **settings)


def test_what_a_cache_holds() -> None:
    reading = start_reading(llama(), segment_size=50)
    reading.read(torch.arange(70))
    # Keys and values of two layers, and the logits of the next token.
    assert held_bytes(reading) == {"device": 0, "host": 2 * 2 * 70 * 32 * 4 + 100 * 4, "disk": 0}
    model = DRTForCausalLM(tiny_config()).eval()
    state = model.new_state()
    model(torch.arange(60)[None], past_key_values=state)
    found = held_bytes(state)
    assert found["host"] > state.memory.bytes_by_tier()["host"] > 0


def test_each_storage_counts_once() -> None:
    whole = torch.zeros(100)
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    held = {"a": [whole, whole[:5], (whole[50:],)], "b": cache, "c": nn.Linear(9, 9)}
    assert held_bytes(held)["host"] == 400 + 2 * 48
    array = np.zeros(7)
    assert held_bytes([array, array[2:]])["host"] == 56


def test_flops_of_kernels_are_those_of_the_reference() -> None:
    query = torch.randn(2, 3, 16, 4, 8)
    key, value = torch.randn(2, 2, 5, 16, 2, 8)
    indices = torch.tensor([[[0, 1], [2, 3], [4, 0]]] * 2)
    weights = torch.rand(2, 3, 2)
    with FlopCounterMode(display=False) as counter:
        grouped_cross_attention(query, key, value, indices, weights, backend="reference")
    counted = counter.get_total_flops()
    shapes = (tensor.shape for tensor in (query, key, value, indices, weights))
    by_formula = cross_attention(*shapes)
    assert by_formula == 4 * 2 * 3 * 16 * 4 * 8 * 2 * 16
    # The reference weighs chunks with a product of K terms for each of the outputs as well.
    assert by_formula <= counted <= by_formula + 2 * 2 * 3 * 16 * 4 * 8 * 2


def test_flops_of_a_drt_grow_with_length_as_its_tokens_do() -> None:
    model = DRTForCausalLM(tiny_config())
    # Beyond the window all but the scores of landmarks, a hundredth, is a constant a token.
    assert math.isclose(flops_of_row(model, 1024), 2 * flops_of_row(model, 512), rel_tol=0.05)


def test_peaks_above_what_was_held() -> None:
    held = torch.ones(20 << 18)
    size = 64 << 20
    grown = peak_growth(lambda: torch.ones(size // 4).sum(), CPU)
    if grown is None or resident_bytes() is None:
        pytest.skip("the peak of resident memory cannot be reset here")
    # Pages of the interpreter and of PyTorch come and go: some MiB.
    assert size - (8 << 20) < grown < size + (16 << 20)
    again = peak_growth(lambda: None, CPU)
    assert again is not None
    assert again < 8 << 20
    assert held.sum() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_costs_on_a_gpu() -> None:
    model = DRTForCausalLM(tiny_config(hidden_size=64)).eval().cuda()
    record = evaluate(model, lengths=[256], training_length=128)
    (row,) = record["rows"]
    assert row["held_bytes"]["device"] > 0
    assert row["peak_bytes"] >= row["held_bytes"]["device"]
    assert record["training"]["peak_bytes"] > 0
    on_cpu = evaluate(model.cpu(), lengths=[256], training_length=128)["training"]["flops"]
    assert record["training"]["flops"] == on_cpu
