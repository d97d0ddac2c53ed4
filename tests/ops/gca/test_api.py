"""What the operator refuses, and how it chooses a backend."""

import re
from collections.abc import Callable

import pytest
import torch

from drt.ops.gca import api, grouped_cross_attention


def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


# make_case's default sizes: B 2, C 3, Q 4, H 4, D 8, M 5, S 6, G 2, K 3.
REFUSED = {
    "query-rank": ({"query": zeros(2, 3, 4, 8)}, "(2, 3, 4, 8)"),
    "key-rank": ({"key": zeros(2, 5, 6, 8)}, "(2, 5, 6, 8)"),
    "key-batch": ({"key": zeros(3, 5, 6, 2, 8)}, "B = 2"),
    "key-width": ({"key": zeros(2, 5, 6, 2, 9)}, "D = 8"),
    "no-width": ({"query": zeros(2, 3, 4, 4, 0), "key": zeros(2, 5, 6, 2, 0)}, "D = 0"),
    "heads": ({"query": zeros(2, 3, 4, 5, 8)}, "H = 5 and G = 2"),
    "no-key-heads": ({"key": zeros(2, 5, 6, 0, 8)}, "G = 0"),
    "value": ({"value": zeros(2, 5, 7, 2, 8)}, "(2, 5, 7, 2, 8)"),
    "indices-rank": ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, "got (2, 3)"),
    "indices-shape": ({"indices": torch.zeros(2, 4, 3, dtype=torch.int64)}, "got (2, 4, 3)"),
    "indices-dtype": ({"indices": torch.zeros(2, 3, 3, dtype=torch.int32)}, "torch.int32"),
    "indices-high": ({"indices": torch.full((2, 3, 3), 5)}, "[-1, 4], got values in [5, 5]"),
    "indices-low": ({"indices": torch.full((2, 3, 3), -2)}, "[-1, 4], got values in [-2, -2]"),
    "weights-shape": ({"weights": zeros(2, 3, 4)}, "(2, 3, 4)"),
    "weights-dtype": ({"weights": torch.zeros(2, 3, 3, dtype=torch.int64)}, "torch.int64"),
    "key-dtype": ({"key": zeros(2, 5, 6, 2, 8, dtype=torch.float32)}, "torch.float32"),
    "value-dtype": ({"value": zeros(2, 5, 6, 2, 8, dtype=torch.bfloat16)}, "torch.bfloat16"),
    "query-dtype": ({"query": torch.zeros(2, 3, 4, 4, 8, dtype=torch.int64)}, "torch.int64"),
    "device": ({"weights": zeros(2, 3, 3).to("meta")}, "weights must be on cpu, got meta"),
    "lengths-shape": ({"key_lengths": torch.ones(2, 6, dtype=torch.int64)}, "got (2, 6)"),
    "lengths-dtype": ({"key_lengths": torch.ones(2, 5)}, "torch.float32"),
    "lengths-high": ({"key_lengths": torch.full((2, 5), 7)}, "[0, 6], got values in [7, 7]"),
    "lengths-low": ({"key_lengths": torch.full((2, 5), -1)}, "[0, 6], got values in [-1, -1]"),
    "lengths-device": (
        {"key_lengths": torch.ones(2, 5, dtype=torch.int64).to("meta")},
        "key_lengths must be on cpu, got meta",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make_case: Callable, changes: dict[str, torch.Tensor], message: str) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=re.escape(message)):
        case._replace(**changes).run(grouped_cross_attention)


def test_a_memory_without_chunks_has_no_index(make_case: Callable) -> None:
    case = make_case()
    with pytest.raises(ValueError, match=re.escape("[-1, -1], got values in [-1, 3]")):
        case._replace(key=case.key[:, :0], value=case.value[:, :0]).run(grouped_cross_attention)


def test_unknown_backend(make_case: Callable) -> None:
    with pytest.raises(ValueError, match="'fast'; there are blocked, reference, triton"):
        make_case().run(grouped_cross_attention, backend="fast")


def test_unavailable_backend_says_why(make_case: Callable) -> None:
    case = make_case()
    elsewhere = [None if tensor is None else tensor.to("meta") for tensor in case]
    with pytest.raises(RuntimeError, match=r"'blocked' is unavailable: .* query is on meta"):
        type(case)(*elsewhere).run(grouped_cross_attention, backend="blocked")


@pytest.mark.parametrize(("device", "expected"), [("cpu", "blocked"), ("meta", "reference")])
def test_default_backend(
    make_case: Callable, monkeypatch: pytest.MonkeyPatch, device: str, expected: str
) -> None:
    asked: list[str] = []

    def recorder(name: str) -> api.Backend:
        def run(query: torch.Tensor, *others: torch.Tensor, **options: object) -> torch.Tensor:
            asked.append(name)
            return query

        return api.BACKENDS[name]._replace(run=run)

    monkeypatch.setattr(api, "BACKENDS", {name: recorder(name) for name in api.BACKENDS})
    case = make_case()
    case._replace(**{name: getattr(case, name).to(device) for name in case._fields[:5]}).run(
        grouped_cross_attention
    )
    assert asked == [expected]


def test_reference_runs_on_meta_tensors(make_case: Callable) -> None:
    """Shapes without numbers: range checks have nothing to read."""
    case = make_case(ragged=True)
    elsewhere = type(case)(*(tensor.to("meta") for tensor in case))
    assert elsewhere.run(grouped_cross_attention).shape == case.query.shape


def test_inputs_are_left_alone(make_case: Callable) -> None:
    case = make_case(ragged=True)
    before = [tensor.detach().clone() for tensor in case]
    case.results(grouped_cross_attention)
    for tensor, copy in zip(case, before, strict=True):
        assert torch.equal(tensor, copy)
