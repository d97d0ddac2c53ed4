"""lm-eval takes a saved model as any other, once `drt` is imported; figures are those of a forward.

These tests need the extra `lm-eval`. They use no network: of RULER's tasks only some need none.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from drt import DRTForCausalLM
from drt.data import byte_tokenizer
from drt.testing import tiny_config

lm_eval = pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")

EOS = 257
LENGTH = 1024


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved model that never read a text: chunks of 16 tokens, a window of 24."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=258, eos_token_id=EOS, pad_token_id=256)
    made = tmp_path_factory.mktemp("model")
    DRTForCausalLM(config).save_pretrained(made)
    byte_tokenizer().save_pretrained(str(made))
    return str(made)


@pytest.fixture(scope="module")
def harness(folder: str) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def model(folder: str) -> DRTForCausalLM:
    return DRTForCausalLM.from_pretrained(folder).eval()


def ask(harness: Any, kind: str, *requests: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    made: Any = [Instance(kind, {}, request, number) for number, request in enumerate(requests)]
    return getattr(harness, kind)(made)


@torch.no_grad()
def log_probabilities(model: DRTForCausalLM, ids: list[int], start: int) -> tuple[float, bool]:
    """Of the tokens from `start` on, each given all before; and whether each was the likeliest."""
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    targets = torch.tensor(ids[start:])
    found = logits[start - 1 : -1]
    total = found.gather(1, targets[:, None]).sum()
    return float(total), bool((found.argmax(-1) == targets).all())


# Sums over up to 300 tokens of float32 log probabilities near -6 each, whose logits differ from
# ours only by the padding of the batch: 300 x 6 x 1e-6 at the worst.
TOLERANCE = {"rel": 1e-6, "abs": 2e-3}


def test_likelihoods_of_continuations(harness: Any, model: DRTForCausalLM) -> None:
    pairs = [("The quick brown fox" * 9, " jumps"), ("A", " b" * 60), ("Es war", " einmal")]
    found = ask(harness, "loglikelihood", *pairs)
    for (before, after), (value, is_greedy) in zip(pairs, found, strict=True):
        ids = [*(before + after).encode()]
        wanted = log_probabilities(model, ids, len(before.encode()))
        assert (value, is_greedy) == (pytest.approx(wanted[0], **TOLERANCE), wanted[1])


def test_the_likeliest_continuation_is_called_greedy(harness: Any, model: DRTForCausalLM) -> None:
    prompts = [f"{number} bottles of beer" for number in range(99)]
    with torch.no_grad():
        last = [int(model(torch.tensor([[*p.encode()]])).logits[0, -1].argmax()) for p in prompts]
    # A token that is no text by itself cannot be a request.
    prompt, token = next(pair for pair in zip(prompts, last, strict=True) if pair[1] < 128)
    likeliest, other = bytes([token]).decode(), "x" if token != ord("x") else "y"
    found = ask(harness, "loglikelihood", (prompt, likeliest), (prompt, other))
    assert [is_greedy for _, is_greedy in found] == [True, False]


def test_likelihoods_of_whole_texts(harness: Any, model: DRTForCausalLM) -> None:
    texts = ["Wir lasen die ganze Nacht. " * 11, "kurz"]
    found = ask(harness, "loglikelihood_rolling", *[(text,) for text in texts])
    for text, value in zip(texts, found, strict=True):
        # The harness puts the end of text before it, since there is no token that begins one.
        wanted, _ = log_probabilities(model, [EOS, *text.encode()], 1)
        assert value == pytest.approx(wanted, **TOLERANCE)


def generated(model: DRTForCausalLM, prompt: str, count: int) -> str:
    ids = torch.tensor([[*prompt.encode()]])
    made = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=256)
    return byte_tokenizer().decode(made[0, ids.shape[1] :], skip_special_tokens=True)  # type: ignore[return-value]


def test_texts_after_prompts_of_unequal_length(harness: Any, model: DRTForCausalLM) -> None:
    settings = {"until": [], "max_gen_toks": 40, "do_sample": False}
    prompts = ["The quick brown " * 9, "Hi", "Es war einmal ein Bauer"]
    found = ask(harness, "generate_until", *[(prompt, dict(settings)) for prompt in prompts])
    for prompt, text in zip(prompts, found, strict=True):
        assert text == generated(model, prompt, 40)
    assert len(set(found)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length"),
    [("niah_single_1", LENGTH), ("niah_multikey_2", LENGTH), ("niah_multikey_3", 2 * LENGTH)],
)
def test_needle_tasks_of_ruler(
    folder: str, harness: Any, model: DRTForCausalLM, name: str, length: int
) -> None:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

    # Only its folder is searched: the thousands of other tasks cost half a minute.
    settings = {"max_seq_lengths": [length], "tokenizer": folder}
    tasks = Path(lm_eval.__file__).parent / "tasks" / "ruler"
    manager = TaskManager(include_path=str(tasks), include_defaults=False, metadata=settings)
    task = manager.load([name])["tasks"][name]
    docs: list[dict[str, Any]] = task.dataset["test"].to_list()[:2]
    prompts = [f"{doc['input']} {doc['gen_prefix']}" for doc in docs]
    for doc, prompt in zip(docs, prompts, strict=True):
        # The prompt and the 128 tokens that are allowed as its answer fit the length asked for.
        assert 0.5 * length < len(prompt) + 128 <= length
        assert prompt.count(doc["outputs"][0]) == 1
    texts = [generated(model, prompt, 128) for prompt in prompts]
    # A model that never read a text finds no needle: let one answer be what it says there.
    docs[1]["outputs"] = [max(re.findall("[A-Za-z]+", texts[1]), key=len)]
    task.dataset = {"test": Dataset.from_list(docs)}
    result = lm_eval.simple_evaluate(harness, tasks=[task], metadata=settings, bootstrap_iters=0)
    samples = {each["doc_id"]: each for each in result["samples"][name]}
    assert [samples[number]["arguments"][0][0] for number in (0, 1)] == prompts
    assert [samples[number]["resps"] for number in (0, 1)] == [[[text]] for text in texts]
    assert docs[0]["outputs"][0] not in texts[0]
    assert result["results"][name][f"{length},none"] == 0.5
