"""Compiled layers: the same numbers, few graphs, and nothing else of the model changes."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from drt import DRTForCausalLM
from drt.testing import assert_within_budget, tiny_config
from drt.training import RunConfig, compile_layers, run, train
from drt.training.compilation import RECOMPILE_LIMIT


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    # Set back after the test, which raises it.
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


def make(**changes: Any) -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(tiny_config(**changes)).train()


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def step(
    model: DRTForCausalLM, length: int, *, rows: int = 3, early: float = 0.0, **options: Any
) -> dict[str, Tensor]:
    """The loss and the gradients of a batch that these numbers decide."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 61, (rows, length), generator=generator)
    ends = torch.rand(ids.shape, generator=generator) < early if early else None
    loss = model(ids, labels=ids, chunk_ends=ends, generator=generator, **options).loss
    model.zero_grad()
    loss.backward()
    grads = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {"loss": loss.detach(), **grads}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


TWO_LAYERS = {"num_hidden_layers": 2, "retrieval_groups": [1]}
ALIBI = {"position_embedding": "alibi", "landmark_size": 8}


@pytest.mark.parametrize(
    ("changes", "autocast", "early"),
    [
        (TWO_LAYERS, False, 0.05),
        pytest.param({}, False, 0.0, marks=pytest.mark.slow),
        pytest.param({}, True, 0.05, marks=pytest.mark.slow),
        pytest.param(ALIBI, False, 0.05, marks=pytest.mark.slow),
        pytest.param(ALIBI, True, 0.0, marks=pytest.mark.slow),
    ],
)
def test_losses_and_gradients_are_those_of_the_layers_as_they_are(
    changes: dict[str, Any], autocast: bool, early: float
) -> None:
    plain, compiled = make(**changes), make(**changes)
    compile_layers(compiled, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, actual = (step(x, 70, early=early) for x in (plain, compiled))
    # aot_eager runs the same operators in the same order.
    assert_equal(actual, expected)
    assert num_graphs() > 0


def test_documents_and_padding() -> None:
    plain, compiled = make(), make()
    compile_layers(compiled, backend="eager")
    documents = torch.arange(90).expand(3, -1) // 25
    mask = torch.arange(90) >= torch.tensor([[0], [7], [20]])
    options = {"document_ids": documents, "attention_mask": mask.long()}
    assert_equal(step(compiled, 90, **options), step(plain, 90, **options))


@pytest.mark.parametrize("early", [0.0, 0.05])
def test_few_graphs_serve_all_lengths(early: float) -> None:
    """As the stages of a curriculum have them, and chunks closed where chance decides."""
    plain, compiled = make(), make()
    compile_layers(compiled, backend="eager")
    shapes = [(9, 50), (7, 77), (7, 83), (5, 120), (3, 160), (3, 161)]
    for rows, length in shapes:
        expected, actual = (step(x, length, rows=rows, early=early) for x in (plain, compiled))
        assert_equal(actual, expected)
    # Three kinds of layers, and here and there a graph more for sizes that are equal by chance.
    assert num_graphs() <= 9


@pytest.mark.slow
def test_checkpointed_layers_are_recomputed() -> None:
    plain, compiled = make(), make()
    expected = step(plain, 70)
    compile_layers(compiled, backend="aot_eager")
    kept = saved_numbers(compiled)
    compiled.gradient_checkpointing_enable()
    torch._dynamo.reset()
    # Layers keep their inputs only; what is left is of the embedding, the retrieval and the head.
    assert saved_numbers(compiled) < kept / 2
    assert_equal(step(compiled, 70), expected)


def saved_numbers(model: DRTForCausalLM) -> int:
    """How many numbers the graph of a step keeps for its backward."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {x.untyped_storage().data_ptr() for x in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step(model, 70)
    return sum(size for pointer, size in sizes.items() if pointer not in parameters)


def test_decoding_is_left_as_it_is() -> None:
    plain, compiled = make(), make()
    compile_layers(compiled, backend="eager")
    ids = torch.randint(0, 61, (2, 40))
    outputs = [
        model.eval().generate(ids, max_new_tokens=20, do_sample=False)
        for model in (plain, compiled)
    ]
    assert torch.equal(*outputs)
    logits = []
    for model in (plain.train(), compiled.train()):
        state = model.new_state(2)
        with torch.no_grad():
            logits.append([model(part, past_key_values=state).logits for part in ids.split(17, 1)])
    assert all(torch.equal(x, y) for x, y in zip(*logits, strict=True))
    # The chunk encoder alone, which has no state.
    assert num_graphs() <= 2
    names = [name for name, x in compiled.named_modules() if x._compiled_call_impl is not None]
    assert names == [
        *(f"model.layers.{number}" for number in range(4)),
        "model.chunk_encoder.layers.0",
    ]


def test_names_copies_and_files_are_those_of_the_model(tmp_path: Path) -> None:
    plain, compiled = make(), make()
    compile_layers(compiled, backend="eager")
    step(compiled, 70)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    compiled.save_pretrained(tmp_path)
    loaded = DRTForCausalLM.from_pretrained(tmp_path).train()
    copied = copy.deepcopy(compiled)
    expected, before = step(plain, 70), num_graphs()
    for model in (loaded, copied):
        assert_equal(step(model, 70), expected)
    assert num_graphs() == before


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ValueError, match="fullgraph is False"):
        compile_layers(make(), fullgraph=False)
    with pytest.raises(ValueError, match="Linear has no DRT layers"):
        compile_layers(torch.nn.Linear(2, 2))


def test_a_higher_limit_of_graphs_stays() -> None:
    for limit in (8, 100):
        with torch._dynamo.config.patch(recompile_limit=limit):
            compile_layers(make())
            assert torch._dynamo.config.recompile_limit == max(limit, RECOMPILE_LIMIT)


def losses(config: RunConfig) -> list[float]:
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_compiles_when_it_is_told_to(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a change of length, and with chunks closed early."""
    model = {**run_config.model, "early_close_rate": 0.5}
    training = replace(run_config.training, num_steps=48, save_every=48)
    plain = replace(run_config, model=model, training=training)
    compiled = replace(
        plain,
        output_dir=str(tmp_path / "compiled"),
        training=replace(training, compile_layers=True),
    )
    monkeypatch.setattr(run, "compile_layers", lambda x: compile_layers(x, backend="eager"))
    train(plain)
    assert num_graphs() == 0
    train(compiled)
    assert 0 < num_graphs() <= 9
    assert losses(compiled) == losses(plain)


@pytest.mark.slow
def test_gradients_of_compiled_kernels() -> None:
    plain, compiled, exact = make(), make(), make().double()
    compile_layers(compiled)
    for length, early in ((70, 0.0), (90, 0.05)):
        expected = step(exact, length, early=early)
        baseline, actual = (step(x, length, early=early) for x in (plain, compiled))
        for name, truth in expected.items():
            assert_within_budget(actual[name], truth, baseline=baseline[name], name=name)


@pytest.mark.slow
def test_a_run_with_compiled_kernels(run_config: RunConfig, tmp_path: Path) -> None:
    plain = replace(run_config, training=replace(run_config.training, num_steps=48))
    compiled = replace(
        plain,
        output_dir=str(tmp_path / "compiled"),
        training=replace(plain.training, compile_layers=True),
    )
    train(plain)
    final = train(compiled)
    # 48 steps on gradients that differ by float32 rounding.
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-2)
    assert DRTForCausalLM.from_pretrained(final).dtype == torch.float32
