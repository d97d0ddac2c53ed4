import numpy as np
import pytest
import torch

from drt.data import Corpus, NeedleTask, batch

ONE = NeedleTask()
MANY = NeedleTask(kind="multi", num_keys=3, num_questions=3)
ROWS = {"seed": 1, "length": 512, "chunk_size": 32}


def test_batch_stacks_rows(byte_corpus: Corpus) -> None:
    made = batch(MANY, byte_corpus, index=2, batch_size=3, **ROWS)
    assert set(made) == {"input_ids", "labels", "answer_mask", "chunk_ends"}
    assert made["input_ids"].dtype == made["labels"].dtype == torch.int64
    assert made["answer_mask"].dtype == torch.bool
    for number in range(3):
        row = MANY.training_row(byte_corpus, index=6 + number, **ROWS)
        assert (made["input_ids"][number].numpy() == row.input_ids).all()
        assert (made["answer_mask"][number].numpy() == row.answer_mask).all()
        ends = made["chunk_ends"][number].nonzero().flatten() + 1
        assert ends.tolist() == [question.question_span[1] for question in row.questions]


def test_labels_are_a_copy(byte_corpus: Corpus) -> None:
    made = batch(ONE, byte_corpus, index=0, batch_size=2, **ROWS)
    assert torch.equal(made["labels"], made["input_ids"])
    made["labels"][0, 0] = -100
    assert made["input_ids"][0, 0] != -100


def test_mixture_draws_tasks_by_weight(byte_corpus: Corpus) -> None:
    mixture = [(ONE, 1.0), (MANY, 3.0)]
    made = batch(mixture, byte_corpus, index=0, batch_size=400, **ROWS)
    num_answers = made["answer_mask"].sum(1) // 5
    assert set(num_answers.tolist()) == {1, 3}
    # 300 of 400 expected with a standard deviation of 8.7; 5 deviations are 44.
    assert abs(int((num_answers == 3).sum()) - 300) < 44


def test_rows_do_not_depend_on_how_they_are_batched(byte_corpus: Corpus) -> None:
    mixture = [(ONE, 1.0), (MANY, 1.0)]
    together = batch(mixture, byte_corpus, index=0, batch_size=6, **ROWS)
    apart = [batch(mixture, byte_corpus, index=index, batch_size=2, **ROWS) for index in range(3)]
    for name, tensor in together.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in apart]))


def test_batch_of_the_held_out_split(byte_corpus: Corpus) -> None:
    train = batch(ONE, byte_corpus, index=0, batch_size=1, **ROWS)
    held_out = batch(ONE, byte_corpus, index=0, batch_size=1, **ROWS, split="held_out")
    row = ONE.training_row(byte_corpus, index=0, **ROWS, split="held_out")
    assert (held_out["input_ids"][0].numpy() == row.input_ids).all()
    answers = [made["input_ids"][made["answer_mask"]] for made in (train, held_out)]
    assert not torch.equal(*answers)


@pytest.mark.parametrize("weights", [(), (0.0,), (1.0, -1.0), (float("nan"),), (1.0, float("inf"))])
def test_wrong_mixtures_are_refused(byte_corpus: Corpus, weights: tuple[float, ...]) -> None:
    mixture = [(ONE, weight) for weight in weights]
    with pytest.raises(ValueError, match="positive weights"):
        batch(mixture, byte_corpus, index=0, batch_size=1, **ROWS)


def test_empty_batches_are_refused(byte_corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        batch(ONE, byte_corpus, index=0, batch_size=0, **ROWS)


def test_one_task_is_a_mixture_of_one(byte_corpus: Corpus) -> None:
    alone = batch(MANY, byte_corpus, index=0, batch_size=2, **ROWS)["input_ids"].numpy()
    mixed = batch([(MANY, 0.3)], byte_corpus, index=0, batch_size=2, **ROWS)["input_ids"].numpy()
    np.testing.assert_array_equal(alone, mixed)
