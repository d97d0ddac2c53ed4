"""Losses in chunks: those of all logits, with their gradients, and never more than a chunk held."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from drt import DRTForCausalLM
from drt.loss import (
    IGNORED,
    LanguageModelHead,
    losses_of_labels,
    losses_of_logits,
    mean_loss,
    next_tokens,
)
from drt.precision import uses_bfloat16
from drt.testing import assert_within_budget, relative_error, tiny_config

WIDTH, VOCAB = 8, 50


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor


def make_case(shape: tuple[int, ...], seed: int = 0, vocab: int = VOCAB) -> Case:
    """Targets of which about a quarter is ignored, and gradients that differ from each other."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, vocab, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.25] = IGNORED
    return Case(
        torch.randn(*shape, WIDTH, generator=generator),
        torch.randn(vocab, WIDTH, generator=generator),
        targets,
        torch.rand(shape, generator=generator),
    )


class Result(NamedTuple):
    losses: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor


def chunked(case: Case, chunk_size: int) -> Result:
    head = LanguageModelHead(*reversed(case.weight.shape), dtype=case.weight.dtype)
    head.weight.data.copy_(case.weight)
    hidden = case.hidden.clone().requires_grad_()
    losses = head(hidden, case.targets, chunk_size)
    losses.backward(case.grad.to(losses.dtype))
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return Result(losses.detach(), hidden.grad, head.weight.grad)


def whole(case: Case, dtype: torch.dtype) -> Result:
    """All logits at once, by transformers' way of it: `F.cross_entropy` of float32 logits."""
    hidden, weight = (
        x.detach().to(dtype, copy=True).requires_grad_() for x in (case.hidden, case.weight)
    )
    logits = F.linear(hidden, weight)
    logits = logits if dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        logits.flatten(0, -2), case.targets.flatten(), reduction="none", ignore_index=IGNORED
    ).view(case.targets.shape)
    losses.backward(case.grad.to(losses.dtype))
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(losses.detach(), hidden.grad, weight.grad)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 130), st.integers(0, 10**6))
def test_losses_and_gradients_of_any_length_and_chunk(
    batch: int, length: int, chunk_size: int, seed: int
) -> None:
    case = make_case((batch, length), seed)
    plain, truth = whole(case, torch.float32), whole(case, torch.float64)
    for name, got, baseline, expected in zip(
        Result._fields, chunked(case, chunk_size), plain, truth, strict=True
    ):
        assert_within_budget(got, expected, baseline=baseline, name=name)


def test_float64_gradients_by_differences() -> None:
    case = make_case((5,), vocab=7)
    head = LanguageModelHead(WIDTH, 7, dtype=torch.float64)

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight}, (hidden, case.targets, 2))

    inputs = (x.double().requires_grad_() for x in (case.hidden, case.weight))
    assert torch.autograd.gradcheck(losses, tuple(inputs))


def test_bfloat16_does_not_lose_the_gradient_of_late_chunks() -> None:
    case = make_case((512,))
    case = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    plain, truth = whole(case, torch.bfloat16), whole(case, torch.float64)
    made = chunked(case, 4)

    def error(of: Tensor) -> float:
        return relative_error(of, truth.grad_weight)

    # Each of 128 parts is rounded to bfloat16 once more than the sum: measured 1.02 times.
    limit = 1.5 * error(plain.grad_weight)
    assert error(made.grad_weight) < limit
    # So the assertion can fail: this is what a running sum in bfloat16 makes of it.
    summed = torch.zeros_like(case.weight)
    for hidden, targets, grad in zip(
        *(x.split(4) for x in (case.hidden, case.targets, case.grad)), strict=True
    ):
        summed += chunked(Case(hidden, case.weight, targets, grad), 4).grad_weight
    assert error(summed) > limit


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    case = make_case((3, 200), vocab=1000)
    hidden, weight = case.hidden.to("cuda", dtype), case.weight.to("cuda", dtype)
    case = Case(hidden, weight, case.targets.cuda(), case.grad.cuda())
    plain, truth = whole(case, dtype), whole(case, torch.float64)
    for name, got, baseline, expected in zip(
        Result._fields, chunked(case, 64), plain, truth, strict=True
    ):
        assert_within_budget(got, expected, baseline=baseline, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_than_a_chunk_of_logits_is_held(dtype: torch.dtype, largest_tensor: Any) -> None:
    vocab, chunk_size = 3000, 16
    case = make_case((2, 400), vocab=vocab)
    case = case._replace(hidden=case.hidden.to(dtype), weight=case.weight.to(dtype))
    with largest_tensor:
        chunked(case, chunk_size)
    # The head and its gradient have 8 rows of logits' worth of numbers: they do not hide anything.
    assert largest_tensor.numel == chunk_size * vocab
    with largest_tensor:
        whole(case, dtype)
    assert largest_tensor.numel == 800 * vocab


def test_a_frozen_head_has_no_gradient() -> None:
    case = make_case((9,))
    head = LanguageModelHead(WIDTH, VOCAB).requires_grad_(False)
    hidden = case.hidden.requires_grad_()
    head(hidden, case.targets, 4).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_a_target_beyond_the_vocabulary_raises() -> None:
    head = LanguageModelHead(WIDTH, VOCAB)
    with pytest.raises(IndexError, match="Target 50 is out of bounds"):
        head(torch.zeros(3, WIDTH), torch.tensor([0, 1, VOCAB]), 2)


def test_no_token_to_predict_has_no_gradient() -> None:
    head = LanguageModelHead(WIDTH, VOCAB)
    targets = torch.full((2, 3), IGNORED)
    hidden = torch.randn(2, 3, WIDTH, requires_grad=True)
    loss = mean_loss(head(hidden, targets, 2), targets)
    # As F.cross_entropy has it: the mean of nothing, and no gradient.
    assert loss.isnan()
    loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert mean_loss(head(hidden, targets, 2), targets, num_items_in_batch=7) == 0


def test_targets_and_means_by_hand() -> None:
    assert next_tokens(torch.tensor([[3, 4, -100, 6]])).tolist() == [[4, -100, 6, -100]]
    labels = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 6, 7], [3, 4, 5, 6, 7]])
    content = torch.tensor([[0, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]) > 0
    none = [-100] * 5
    wanted = [[-100, 7, -100, -100, -100], [4, 5, -100, -100, -100], none]
    assert next_tokens(labels, content).tolist() == wanted
    losses = torch.arange(15.0).view(3, 5)
    assert losses_of_labels(losses).tolist() == losses[:, :-1].tolist()
    assert losses_of_labels(losses, content).tolist() == [[0, 0, 0, 1], [5, 6, 0, 0], [0] * 4]
    targets = torch.tensor([[1, IGNORED]])
    losses = losses_of_logits(torch.zeros(1, 2, 4), targets)
    assert losses.tolist() == [[pytest.approx(1.3862944), 0.0]]
    assert mean_loss(losses, targets) == losses[0, 0]
    for items in (4, torch.tensor(4)):
        assert mean_loss(losses, targets, num_items_in_batch=items) == losses[0, 0] / 4


class PaddedRows(NamedTuple):
    """Rows of unequal lengths with padding anywhere, of which the labels know nothing."""

    columns: list[Tensor]
    ids: Tensor
    labels: Tensor
    mask: Tensor
    documents: Tensor

    @classmethod
    def draw(cls, seed: int, sides: list[str], width: int = 45) -> "PaddedRows":
        g = torch.Generator().manual_seed(seed)
        columns = []
        for side in sides:
            place = {"left": torch.arange(width).flip(0), "right": torch.arange(width)}
            order = place.get(side, torch.randperm(width, generator=g))
            columns.append(order[: torch.randint(2, width, (), generator=g)].sort().values)
        shape = (len(sides), width)
        ids = torch.randint(0, 61, shape, generator=g)
        labels = ids.masked_fill(torch.rand(shape, generator=g) < 0.2, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, chosen in enumerate(columns):
            mask[row, chosen] = 1
        documents = (torch.rand(shape, generator=g) < 0.05).long().cumsum(1)
        return cls(columns, ids, labels, mask, documents)


@settings(max_examples=15)
@given(
    st.integers(0, 10**6),
    st.lists(st.sampled_from(["left", "right", "anywhere"]), min_size=1, max_size=3),
    st.sampled_from([None, 1, 7, 1000]),
    st.booleans(),
    st.sampled_from(["chunk", "landmark"]),
)
def test_the_loss_of_padded_rows_is_that_of_each_row_alone(
    seed: int, sides: list[str], chunk_size: int | None, documents: bool, onset: str
) -> None:
    config = tiny_config(retrieval_onset=onset, retrieval_noise=0.0, loss_chunk_size=chunk_size)
    model = DRTForCausalLM(config).double().train()
    rows = PaddedRows.draw(seed, sides)
    marks = {"document_ids": rows.documents} if documents else {}
    wanted, count = torch.zeros_like(rows.ids, dtype=torch.float64), 0
    for row, columns in enumerate(rows.columns):
        # Without the loss of the package.
        ids, labels = rows.ids[row, columns][None], rows.labels[row, columns]
        logits = model(ids, **{name: mark[row, columns][None] for name, mark in marks.items()})
        losses = F.cross_entropy(logits.logits[0, :-1], labels[1:], reduction="none")
        wanted[row, columns[1:]] = losses
        count += int((labels[1:] != IGNORED).sum())
    weights, total = list(model.parameters()), max(count, 1)
    alone = torch.autograd.grad(wanted.sum() / total, weights, materialize_grads=True)
    kwargs = {"attention_mask": rows.mask, "labels": rows.labels, **marks}
    out = model(rows.ids, output_token_losses=True, num_items_in_batch=total, **kwargs)
    # All are float64, in another order of summation.
    torch.testing.assert_close(out.token_losses, wanted[:, 1:], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(out.loss, wanted.sum() / total, atol=1e-11, rtol=1e-11)
    padded = torch.autograd.grad(out.loss, weights, materialize_grads=True)
    for got, one in zip(padded, alone, strict=True):
        torch.testing.assert_close(got, one, atol=1e-10, rtol=1e-10)
    if count:
        assert torch.allclose(model(rows.ids, **kwargs).loss, out.loss)


def test_a_label_left_out_where_a_document_begins_is_left_out_behind_padding() -> None:
    """Who is not asked how the next document begins is not asked across padding either."""
    model = DRTForCausalLM(tiny_config()).eval()
    ids, mask = torch.randint(0, 61, (1, 30)), torch.ones(1, 30, dtype=torch.int64)
    documents = (torch.arange(30) >= 14).long()[None]
    mask[0, 10:17] = 0
    labels = ids.clone()
    # The first of the second document, as `drt.data.prepared.rows` has it.
    labels[0, 17] = IGNORED
    out = model(
        ids, attention_mask=mask, document_ids=documents, labels=labels, output_token_losses=True
    )
    assert out.token_losses[0].nonzero()[:, 0].tolist() == [*range(9), *range(17, 29)]
    assert torch.allclose(out.loss, out.token_losses.sum() / 21)


def train_step(model: DRTForCausalLM, ids: Tensor, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad()
    labels = ids.clone()
    labels[0, 20:50] = -100
    out = model(ids, labels=labels, generator=torch.Generator().manual_seed(3), **kwargs)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 100, 1000])
def test_the_model_learns_the_same_in_chunks(tied: bool, chunk_size: int) -> None:
    model = DRTForCausalLM(tiny_config(tie_word_embeddings=tied)).train()
    ids = torch.randint(0, 61, (2, 150))
    for kwargs in ({}, {"num_items_in_batch": 777}, {"output_token_losses": True}):
        model.config.loss_chunk_size = None
        wanted, gradients = train_step(model, ids, **kwargs)
        model.config.loss_chunk_size = chunk_size
        out, got = train_step(model, ids, **kwargs)
        assert out.logits is None
        assert wanted.logits.shape == (2, 150, 61)
        # float32 sums of 300 losses of order 1, and of products behind them, in another order.
        assert torch.allclose(out.loss, wanted.loss, rtol=1e-6)
        assert got.keys() == gradients.keys()
        assert all(torch.allclose(got[n], gradients[n], atol=1e-6, rtol=1e-4) for n in got)
    assert out.token_losses.shape == (2, 149)
    assert torch.allclose(out.token_losses, wanted.token_losses, atol=1e-5)
    assert not out.token_losses[0, 19:49].any()


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    model = DRTForCausalLM(tiny_config()).train()
    ids = torch.randint(0, 61, (2, 150))
    results = []
    for chunk_size in (None, 16):
        model.config.loss_chunk_size = chunk_size
        with torch.autocast("cpu", torch.bfloat16):
            results.append(train_step(model, ids))
    (wanted, gradients), (out, got) = results
    assert out.loss.dtype == torch.float32
    # The same bfloat16 products; the losses are float32 sums of them.
    assert torch.allclose(out.loss, wanted.loss, rtol=1e-6)
    # Parts of the head's gradient are rounded to 8 bits where all of it was.
    assert relative_error(got["model.embed_tokens.weight"], _truth(gradients)) < 2**-8


def test_a_device_without_autocast_has_losses() -> None:
    head = LanguageModelHead(WIDTH, VOCAB, device="meta")
    targets = torch.zeros(2, 3, dtype=torch.int64, device="meta")
    assert head(torch.zeros(2, 3, WIDTH, device="meta"), targets, 4).shape == (2, 3)


@pytest.mark.parametrize("major", [7, 8])
def test_a_gpu_that_emulates_bfloat16_is_not_given_any(
    major: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major)
    )
    # An emulated product works on any.
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert uses_bfloat16("auto") == (major == 8)
    assert uses_bfloat16("bfloat16")
    assert not uses_bfloat16("float32")


def _truth(gradients: dict[str, Tensor]) -> Tensor:
    return gradients["model.embed_tokens.weight"].double()


def test_evaluation_and_generation_have_logits() -> None:
    model = DRTForCausalLM(tiny_config(loss_chunk_size=16)).eval()
    ids = torch.randint(0, 61, (2, 40))
    out = model(ids, labels=ids)
    assert out.logits.shape == (2, 40, 61)
    wanted = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(out.loss, wanted)
    assert model.train()(ids).logits.shape == (2, 40, 61)
    assert list(model(ids, labels=ids).keys()) == ["loss"]


@pytest.mark.parametrize("tied", [True, False])
def test_a_resized_model_still_has_its_head(tied: bool) -> None:
    model = DRTForCausalLM(tiny_config(loss_chunk_size=16, tie_word_embeddings=tied)).train()
    model.resize_token_embeddings(70)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.randint(0, 70, (2, 40))
    assert model(ids, labels=ids).loss.isfinite()


def test_another_head_is_refused() -> None:
    model = DRTForCausalLM(tiny_config(loss_chunk_size=16)).train()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    ids = torch.randint(0, 61, (2, 40))
    with pytest.raises(ValueError, match=r"loss_chunk_size = 16 needs .* lm_head is a Sequential"):
        model(ids, labels=ids)


@pytest.mark.parametrize("chunk_size", [None, 16])
def test_labels_of_another_shape_are_refused(chunk_size: int | None) -> None:
    """Transposed ones have as many numbers as there are tokens."""
    model = DRTForCausalLM(tiny_config(loss_chunk_size=chunk_size)).train()
    ids = torch.randint(0, 61, (2, 40))
    with pytest.raises(ValueError, match=r"labels must be \(B, T\) = \(2, 40\), got \(40, 2\)"):
        model(ids, labels=ids.t())


def test_labels_of_no_tokens() -> None:
    ids = torch.zeros(2, 0, dtype=torch.int64)
    out = DRTForCausalLM(tiny_config())(ids, labels=ids)
    assert out.logits.shape == (2, 0, 61)
    assert out.loss.isnan()


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 61, (40,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def test_transformers_trainer_trains_and_evaluates_in_chunks(tmp_path: Any) -> None:
    losses = []
    for chunk_size in (None, 16):
        torch.manual_seed(0)
        config = tiny_config(loss_chunk_size=chunk_size, retrieval_noise=0.0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(
            model=DRTForCausalLM(config),
            args=arguments,
            train_dataset=Rows(),
            eval_dataset=Rows(),
            compute_metrics=lambda made: {"shape": made.predictions.shape},
        )
        trainer.train()
        evaluated = trainer.evaluate()
        assert evaluated["eval_shape"] == (8, 40, 61)
        history = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        losses.append([*history, evaluated["eval_loss"]])
    # Two steps of Adam on gradients that differ by float32 rounding.
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[0]) == 3
