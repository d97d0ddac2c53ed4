"""`torch.compile(fullgraph=True)`: the operator and a whole layer are one graph each."""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from drt.chunking import ChunkRules, Cursor, Marks, plan_segment
from drt.layers import DRTDecoderLayer, rotary_factors
from drt.ops.window import banded, flex, sliding_window_attention, varlen
from drt.testing import tiny_config


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch._dynamo.reset()


def draw() -> list[Tensor]:
    """Query, key and value with 10 cached keys, and a gradient of the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 100, 4, 8), (2, 110, 2, 8), (2, 110, 2, 8), (2, 100, 4, 8)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def first_keys(kind: str) -> Tensor | None:
    """(2, 100): none, all 0, or documents of 30 positions behind 5 unused places."""
    if kind == "none":
        return None
    if kind == "zero":
        return torch.zeros(2, 100, dtype=torch.int64)
    return (torch.arange(10, 110) // 30 * 30).clamp(min=5).expand(2, -1)


kinds = pytest.mark.parametrize("kind", ["none", "zero", "documents"])
with_alibi = pytest.mark.parametrize("alibi", [False, True])


@kinds
@with_alibi
def test_banded_forward_and_backward(kind: str, alibi: bool) -> None:
    *tensors, grad = draw()
    leaves = [x.requires_grad_() for x in tensors]
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125]) if alibi else None

    def attend(*leaves: Tensor, firsts: Tensor | None) -> Tensor:
        return sliding_window_attention(*leaves, window=16, first_keys=firsts, alibi_slopes=slopes)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    results = []
    for call in (attend, compiled):
        out = call(*leaves, firsts=first_keys(kind))
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    # The same code on the same numbers.
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@with_alibi
def test_banded_is_an_operator(alibi: bool) -> None:
    *tensors, grad = draw()
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125]) if alibi else None
    firsts = torch.arange(20).expand(2, -1) // 6 * 6 if alibi else None
    options = (16, 0.5, slopes, firsts)
    leaves = [x[:, :20].detach().requires_grad_() for x in tensors]
    torch.library.opcheck(banded.attend, (*leaves, *options))
    inputs = [x.detach() for x in (grad[:, :20], *leaves)]
    for wants in ([True, False, True], [False, True, False]):
        torch.library.opcheck(banded.attend_backward, (*inputs, *options, wants))


def test_banded_computes_only_what_is_wanted() -> None:
    *tensors, grad = draw()
    query, key, value = tensors
    key.requires_grad_()
    compiled = torch.compile(_attend, backend="aot_eager", fullgraph=True)
    empty = []
    backward = banded._backward_part

    def note(*arguments: Any, **options: Any) -> None:
        empty.append([x is None for x in arguments[4:]])
        backward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(banded, "_backward_part", note)
        results = [
            torch.autograd.grad(call(query, key, value), key, grad) for call in (_attend, compiled)
        ]
    assert torch.equal(*(x for (x,) in results))
    assert empty
    assert all(x == [True, False, True] for x in empty)


def _attend(*tensors: Tensor) -> Tensor:
    return sliding_window_attention(*tensors, window=16)


def test_one_graph_of_banded_serves_rows_of_any_length() -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(_attend, backend=graphs, fullgraph=True, dynamic=True)
    # No two sizes are equal: what is equal at first would have to stay so.
    for rows, length in ((3, 100), (5, 157), (7, 33)):
        tensors = [torch.randn(rows, length, heads, 8).requires_grad_() for heads in (4, 2, 2)]
        pairs = [torch.autograd.grad(f(*tensors).sum(), tensors) for f in (_attend, compiled)]
        assert all(torch.equal(x, y) for x, y in zip(*pairs, strict=True))
    assert graphs.frame_count == 1


@kinds
@with_alibi
def test_flex_forward(kind: str, alibi: bool) -> None:
    query, key, value, _ = (x.double() for x in draw())
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125]) if alibi else None

    def attend(firsts: Tensor | None, backend: str) -> Tensor:
        return sliding_window_attention(
            query, key, value, window=16, first_keys=firsts, alibi_slopes=slopes, backend=backend
        )

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    expected = attend(first_keys(kind), "reference")
    # both are float64: sums of some ten terms of order 1 in another order
    torch.testing.assert_close(compiled(first_keys(kind), "flex"), expected, rtol=1e-12, atol=1e-12)


def test_varlen_forward_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA tensors without numbers, which need no GPU."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def attend(*tensors: Tensor) -> Tensor:
        return sliding_window_attention(*tensors, window=16)

    with FakeTensorMode(), torch.no_grad():
        tensors = [
            torch.empty(2, length, heads, 8, device="cuda", dtype=torch.bfloat16)
            for length, heads in ((100, 4), (110, 2), (110, 2))
        ]
        out = torch.compile(attend, backend=keep, fullgraph=True)(*tensors)
    assert out.shape == tensors[0].shape
    (graph,) = graphs
    assert sum("_varlen_attn" in str(node.target) for node in graph.graph.nodes) == 1


@pytest.mark.filterwarnings("error")
def test_what_is_asked_of_the_installation_is_a_constant_of_a_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    answers = (varlen._takes_groups(), varlen._runs_on(0), flex.has_triton())

    def ask(x: Tensor) -> tuple[Tensor, ...]:
        found = (varlen._takes_groups(), varlen._runs_on(0), flex.has_triton())
        return tuple(x + 1 if answer else x for answer in found)

    compiled = torch.compile(ask, backend="eager", fullgraph=True)
    expected = [float(answer) for answer in answers]
    assert [x.item() for x in compiled(torch.zeros(()))] == expected


@pytest.mark.parametrize("position_embedding", ["rope", "alibi"])
def test_a_lower_layer_in_training(position_embedding: str) -> None:
    config = tiny_config(position_embedding=position_embedding)
    layer = DRTDecoderLayer(config, upper=False).train()
    device = torch.device("cpu")
    layout, _ = plan_segment(
        [Cursor()] * 2,
        80,
        rules=ChunkRules(config.chunk_size, landmark_starts_block=True),
        marks=Marks(None, None, None),
        device=device,
    )
    count = layout.num_positions
    uses_rope = position_embedding == "rope"
    rotary = rotary_factors(0, count, config=config, device=device) if uses_rope else None
    hidden = torch.randn(2, count, config.hidden_size, requires_grad=True)
    leaves = [hidden, *layer.parameters()]
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        out = call(hidden, rotary, layout)
        results.append([out, *torch.autograd.grad(out, leaves, hidden.detach())])
    # aot_eager runs the same operators in the same order
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
