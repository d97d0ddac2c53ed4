"""A reading that is stopped and goes on leaves what an uninterrupted one leaves."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drt import DRTForCausalLM
from drt.asking import ask
from drt.data import streaming
from drt.data.streaming import TextInput, list_inputs
from drt.data.tokenization import byte_tokenizer, encode, encode_with_offsets
from drt.ingestion import Ingestion, Progress
from drt.passages import PassageLog
from drt.testing import tiny_config

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "while", "\u20ac", "rain", "fell", "and", "dogs"),
    *("\U0001f600", "ran", "home", ""),
)


def make_model() -> DRTForCausalLM:
    torch.manual_seed(0)
    return DRTForCausalLM(tiny_config(vocab_size=300)).eval()


def make_texts(folder: Path) -> list[str]:
    """Three files of 0.5 to 3 KB, and rows."""
    rng = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("a.txt", 400), ("b.txt", 90), ("c.txt", 600)):
        lines = " ".join(rng.choices(WORDS, k=count)).replace("rain", "rain\n")
        (folder / name).write_text(lines)
    rows = [" ".join(rng.choices(WORDS, k=30)) for _ in range(5)]
    (folder / "d.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return [str(folder)]


def bpe() -> PreTrainedTokenizerBase:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return byte_tokenizer() if request.param == "bytes" else bpe()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


def test_offsets_end_where_tokens_end(tokenizer: PreTrainedTokenizerBase) -> None:
    text = " ".join(WORDS)
    ids, ends = encode_with_offsets(tokenizer, text)
    assert ids.tolist() == encode(tokenizer, text).tolist()
    assert ends[-1] == len(text.encode())
    for count in (1, 5, len(ids) // 2):
        whole = text.encode()[: ends[count - 1]].decode(errors="ignore")
        assert str(tokenizer.decode(ids[:count])).startswith(whole)


def test_what_was_read_is_the_text_with_chunks_closed_at_its_ends(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model, inputs = make_model(), list_inputs(make_texts(tmp_path / "texts"))
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory", dtype=None, segment_size=100)
    ingestion.read(inputs)
    ingestion.close()
    texts = [Path(item.name).read_text() for item in inputs[:3]]
    rows = Path(inputs[3].name).read_text().splitlines()
    texts += [json.loads(row)["text"] for row in rows]
    encoded = [encode(tokenizer, text) for text in texts]
    ids = torch.from_numpy(np.concatenate(encoded))[None]
    ends = torch.zeros_like(ids, dtype=torch.bool)
    ends[0, np.cumsum([len(part) for part in encoded]) - 1] = True
    state, _ = model.load_state(tmp_path / "memory")
    assert state.num_tokens == [ids.shape[1]]
    rest = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        got = model(rest, past_key_values=state.fork()).logits
        all_ends = torch.cat([ends, torch.zeros_like(rest, dtype=torch.bool)], 1)
        whole = model(torch.cat([ids, rest], 1), chunk_ends=all_ends).logits[:, -40:]
    assert (got - whole).abs().max() < 1e-4
    log = PassageLog(tmp_path / "memory")
    joined: dict[str, bytes] = {}
    for chunk in range(log.num_chunks):
        passage = log.passage(chunk)
        assert passage is not None
        assert len(joined.get(passage.source, b"")) == passage.start
        text = texts[len(joined) - (passage.source in joined)].encode()
        joined[passage.source] = joined.get(passage.source, b"") + text[passage.start : passage.end]
    assert list(joined.values()) == [text.encode() for text in texts]
    assert log.num_chunks == state.memory.counts[0]


def test_files_can_be_added_and_are_not_read_twice(tmp_path: Path) -> None:
    model, tokenizer = make_model(), byte_tokenizer()
    inputs = list_inputs(make_texts(tmp_path / "texts"))
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory", segment_size=64)
    first = ingestion.read(inputs[:2])
    ingestion.close()
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory", segment_size=64)
    assert ingestion.remaining(inputs) == inputs[2:]
    second = ingestion.read(inputs)
    assert first + second == ingestion.state.num_tokens[0]
    ingestion.close()
    log = PassageLog(tmp_path / "memory")
    assert len(log.sources()) == 8
    changed = inputs[0]._replace(size=3)
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory", segment_size=64)
    with pytest.raises(ValueError, match=r"a\.txt has 3 bytes, it had \d+ when it was read"):
        ingestion.read([changed])
    ingestion.close()


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}]
from test_ingestion import make_model, byte_tokenizer, list_inputs, Ingestion, streaming
streaming.PIECE_BYTES = 700
ingestion = Ingestion(make_model(), byte_tokenizer(), Path({folder!r}), segment_size=100,
                      commit_seconds=0.0)
print("begin", flush=True)
ingestion.read(list_inputs([{texts!r}]), on_progress=lambda p: print(p.tokens, flush=True))
ingestion.close()
print("done", flush=True)
"""


def test_a_killed_reading_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 700)
    (texts,) = make_texts(tmp_path / "texts")
    plain = Ingestion(make_model(), byte_tokenizer(), tmp_path / "plain", segment_size=100)
    plain.read(list_inputs([texts]))
    plain.close()
    folder = tmp_path / "killed"
    code = CHILD.format(tests=str(Path(__file__).parent), folder=str(folder), texts=texts)
    rng = random.Random(3)
    for kill in range(4):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            # Somewhere in the work on the segments that follow.
            if kill < 3 and line.strip() not in ("begin", "done") and rng.random() < 0.3:
                time.sleep(rng.random() * 0.02)
                os.kill(child.pid, signal.SIGKILL)
                break
        child.wait()
    assert child.returncode == 0
    assert files(folder) == files(tmp_path / "plain")
    states = [make_model().load_state(where)[0] for where in (folder, tmp_path / "plain")]
    rest = torch.randint(0, 300, (1, 40))
    with torch.no_grad():
        logits = [make_model()(rest, past_key_values=state).logits for state in states]
    assert torch.equal(*logits)


def test_a_commit_brings_log_chunks_and_state_to_the_medium_in_this_order(
    tmp_path: Path, medium: Any
) -> None:
    (texts,) = make_texts(tmp_path / "texts")
    folder = tmp_path / "memory"
    ingestion = Ingestion(make_model(), byte_tokenizer(), folder, segment_size=500)
    ingestion.read(list_inputs([texts])[:2])
    medium.names.clear()
    ingestion.commit()
    # What the state counts on comes before the state.
    assert set(medium.names[:3]) == {"tokens.bin", "chunks.bin", "sources.jsonl"}
    assert medium.names[-4:] == ["journal.bin", "memory", "state.partial", "memory"]
    medium.held["state.safetensors"] = medium.held["state.partial"]
    medium.assert_holds(folder)
    ingestion.close()


def test_a_kill_at_any_moment_of_a_commit_leaves_a_reading_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it is at every sync, and before every file is replaced, is what a kill leaves.

    What a process has only in its buffers dies with it, and is not in the folder either.
    """
    model, folder, left = make_model(), tmp_path / "memory", []
    (tmp_path / "a.txt").write_text("it rains and it rains. " * 9)
    inputs = list_inputs([str(tmp_path / "a.txt")])

    def open_memory(where: Path) -> Ingestion:
        return Ingestion(model, byte_tokenizer(), where, segment_size=50)

    def keep(*_: object) -> None:
        left.append(tmp_path / str(len(left)))
        shutil.copytree(folder, left[-1])

    def stop(progress: Progress) -> None:
        # The second commit has something to add to that of the first segment.
        if progress.tokens == 50:
            ingestion.commit()
        else:
            raise KeyboardInterrupt

    # A kill asks nothing of the medium.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    ingestion, replace = open_memory(folder), Path.replace
    with pytest.raises(KeyboardInterrupt):
        ingestion.read(inputs, on_progress=stop)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", keep)
        patch.setattr(Path, "replace", lambda file, to: (keep(), replace(file, to))[1])
        ingestion.commit()
    keep()
    ingestion.read(inputs)
    ingestion.close()
    # Three files of the log, two of a slab, the journal, the state, the folder twice.
    assert len(left) > 9
    read = []
    for killed in left:
        again = open_memory(killed)
        read.append(again.state.num_tokens[0])
        again.read(inputs)
        again.close()
        assert files(killed) == files(folder)
    # The state before the commit or that after it, never another.
    assert read == sorted(read)
    assert set(read) == {50, 100}


def test_wrong_folders_and_models_are_refused(tmp_path: Path) -> None:
    model, tokenizer = make_model(), byte_tokenizer()
    inputs = list_inputs(make_texts(tmp_path / "texts"))
    with pytest.raises(ValueError, match="is not empty and holds no memory"):
        Ingestion(model, tokenizer, tmp_path / "texts")
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory")
    ingestion.read(inputs[:1])
    with pytest.raises(BlockingIOError):
        Ingestion(model, tokenizer, tmp_path / "memory")
    ingestion.close()
    with pytest.raises(ValueError, match="made by another tokenizer"):
        Ingestion(model, bpe(), tmp_path / "memory")


def test_questions_are_answered_with_passages(tmp_path: Path) -> None:
    model, tokenizer = make_model(), byte_tokenizer()
    inputs = list_inputs(make_texts(tmp_path / "texts"))
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory", segment_size=64)
    ingestion.read(inputs)
    ingestion.close()
    memory = tmp_path / "memory"

    def found() -> dict[str, tuple[bytes, int]]:
        paths = memory.iterdir()
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    before = found()
    assert {"state.safetensors", "journal.bin", "tokens.bin", "lock"} <= before.keys()
    reply = ask(model, tokenizer, tmp_path / "memory", "Where did it rain? ", max_new_tokens=40)
    again = ask(model, tokenizer, tmp_path / "memory", "Where did it rain? ", max_new_tokens=40)
    assert reply == again
    # Neither content nor the time of the last write, not even that of the lock.
    assert found() == before
    assert reply.is_complete
    assert {passage.group for passage in reply.passages} == {0, 1}
    for passage in reply.passages:
        if passage.source.endswith(".txt"):
            data = Path(passage.source).read_bytes()[passage.start : passage.end]
            assert passage.text == data.decode(errors="replace")
    for group in (0, 1):
        weights = [p.weight for p in reply.passages if p.group == group]
        assert weights == sorted(weights, reverse=True)
        # float32 softmax over four chunks
        assert sum(weights) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="the question is empty"):
        ask(model, tokenizer, tmp_path / "memory", "")


def read_rain(model: DRTForCausalLM, folder: Path) -> None:
    """Read a short text of a folder into a memory there."""
    (folder / "a.txt").write_text("it rains and it rains. " * 20)
    ingestion = Ingestion(model, byte_tokenizer(), folder / "memory")
    ingestion.read(list_inputs([str(folder / "a.txt")]))
    ingestion.close()


def test_a_question_that_closes_no_chunk_is_shown_what_it_used(tmp_path: Path) -> None:
    model, tokenizer = make_model(), byte_tokenizer()
    read_rain(model, tmp_path)

    def asked(question: str) -> list[tuple[int, int]]:
        reply = ask(model, tokenizer, tmp_path / "memory", question, max_new_tokens=1)
        return [(passage.group, passage.chunk) for passage in reply.passages]

    question = "Where did it rain, and when? "
    # A chunk of 16 bytes is full there; the rest of the question closes none.
    full = asked(question[:16])
    assert full
    assert asked(question) != full
    model.config.close_prompt_chunk = False
    assert asked(question) == full
    assert asked(question[:15]) == []


def test_an_answer_ends_before_the_stop_and_is_not_made_any_longer(tmp_path: Path) -> None:
    model, tokenizer = make_model(), byte_tokenizer()
    read_rain(model, tmp_path)
    steps: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, ids, _o: steps.append(ids[0].numel()))

    def answer(stop: str | None) -> str:
        steps.clear()
        question = "Where did it rain? "
        return ask(
            model, tokenizer, tmp_path / "memory", question, max_new_tokens=24, stop=stop
        ).answer

    whole = answer(None)
    num_whole = len(steps)
    # Bytes that are no text stand in the answer as U+FFFD, and are nothing to stop at.
    stop = next(char for char in whole[1:] if char.isascii() and char != whole[0])
    assert answer(stop) == whole[: whole.index(stop)]
    # A step makes a token, at most one character: those behind the stop are not made.
    assert len(steps) <= num_whole - len(whole[whole.index(stop) + 1 :])
    assert answer("not in the answer") == whole


def test_a_question_to_a_memory_that_is_being_read_is_not_taken_for_what_follows(
    tmp_path: Path,
) -> None:
    model, tokenizer = make_model(), byte_tokenizer()
    (tmp_path / "a.txt").write_text("it rains and it rains. " * 20)
    ingestion = Ingestion(model, tokenizer, tmp_path / "memory", segment_size=64)
    ingestion.read(list_inputs([str(tmp_path / "a.txt")]))
    # The log is ahead of the state, as between two commits.
    chunks = ingestion.log.num_chunks
    for _ in range(20):
        ingestion.log.add_chunk(token=0, length=1, start=7, end=8, source=0)
    ingestion.log.commit()
    question = "where does it rain and when does it rain, and how does it rain? " * 3
    reply = ask(model, tokenizer, tmp_path / "memory", question, max_new_tokens=1)
    ingestion.close()
    own = [passage for passage in reply.passages if passage.chunk >= chunks]
    assert own
    for passage in reply.passages:
        assert (passage.source == "") == (passage.chunk >= chunks)
        text = question if passage.chunk >= chunks else "it rains and it rains. " * 20
        assert passage.text == text[passage.start : passage.end]


@pytest.mark.parametrize("mended", [True, False])
def test_a_text_that_cannot_be_read_is_left_out_or_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended: bool
) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 700)
    inputs = list_inputs(make_texts(tmp_path / "texts"))
    file = Path(inputs[1].name)
    whole = "a line of text\n" * 200
    file.write_bytes(whole.encode()[:2000] + b"\xff" + whole.encode()[2000:])
    inputs = list_inputs([str(tmp_path / "texts")])

    def open_memory() -> Ingestion:
        return Ingestion(
            make_model(), byte_tokenizer(), tmp_path / "m", segment_size=100, commit_seconds=0.0
        )

    for _ in range(3):
        # Its beginning is read once, however often it is tried.
        ingestion = open_memory()
        with pytest.raises(ValueError, match=r"b\.txt is not UTF-8 text"):
            ingestion.read(inputs)
        assert ingestion.unread is None
        ingestion.close()
    log = PassageLog(tmp_path / "m")
    assert [Path(name).name for name in log.sources()] == ["a.txt", "b.txt"]
    last = log.passage(log.num_chunks - 1)
    # Two pieces of whole lines: the byte is in the third.
    assert (Path(last.source).name, last.end) == ("b.txt", 1380)
    ingestion = open_memory()
    if mended:
        file.write_text(whole)
        ingestion.read(list_inputs([str(tmp_path / "texts")]))
    else:
        ingestion.read([inputs[0], *inputs[2:]])
    ingestion.close()
    names = [Path(name).name.split(":")[0] for name in PassageLog(tmp_path / "m").sources()]
    again = ["b.txt"] if mended else []
    assert names == ["a.txt", "b.txt", *again, "c.txt", *["d.jsonl"] * 5]


def test_what_was_looked_at_ahead_must_be_given_again(tmp_path: Path) -> None:
    model, folder = make_model(), tmp_path / "texts"
    folder.mkdir()
    for name, size in (("a.txt", 300), ("b.txt", 5), ("c.txt", 400), ("d.txt", 400)):
        (folder / name).write_text("so it goes on and on "[:size] * (size // 21 + 1))
    inputs = list_inputs([str(folder)])
    ingestion = Ingestion(
        model, byte_tokenizer(), tmp_path / "m", segment_size=300, commit_seconds=0.0
    )

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingestion.read(inputs, on_progress=stop)
    ingestion.commit()
    ahead = ingestion.notes.ahead
    ingestion.close()
    # The tokens that the upper layers see at the end of the first segment stand in these.
    assert [Path(name).name for name in ahead] == ["b.txt", "c.txt"]
    ingestion = Ingestion(model, byte_tokenizer(), tmp_path / "m", segment_size=300)
    with pytest.raises(ValueError, match=r"has read part of .*c\.txt: give it again"):
        ingestion.read([inputs[0], inputs[1], inputs[3]])
    assert ingestion.remaining(inputs[::-1]) == inputs
    ingestion.close()


def test_a_folder_of_a_reading_that_died_at_once_can_be_used(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    folder.mkdir()
    for name in ("lock", "state.partial", "manifest.json.new"):
        (folder / name).write_text("123\n")
    ingestion = Ingestion(make_model(), byte_tokenizer(), folder)
    assert ingestion.read(list_inputs(make_texts(tmp_path / "texts"))) > 0
    ingestion.close()


def test_a_reading_that_cannot_begin_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin() -> Ingestion:
        return Ingestion(make_model(), byte_tokenizer(), tmp_path / "memory")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("drt.ingestion.save_state", full)
        with pytest.raises(OSError, match="No space left"):
            begin()
    ingestion = begin()
    ingestion.read(list_inputs(make_texts(tmp_path / "texts")))
    ingestion.close()
    tokens = tmp_path / "memory" / "tokens.bin"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-40])
    for _ in range(2):
        # Kept, so that nothing is closed because nobody knows of it any more.
        with pytest.raises(ValueError, match=r"tokens\.bin or chunks\.bin was cut") as kept:
            begin()
        assert kept.traceback
    tokens.write_bytes(whole)
    begin().close()


def test_an_unfinished_input_must_be_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_model(), list_inputs(make_texts(tmp_path / "texts"))
    ingestion = Ingestion(
        model, byte_tokenizer(), tmp_path / "memory", segment_size=50, commit_seconds=0.0
    )

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingestion.read(inputs[:1], on_progress=stop)
    ingestion.commit()
    ingestion.close()
    ingestion = Ingestion(model, byte_tokenizer(), tmp_path / "memory", segment_size=50)
    assert ingestion.unread is not None
    assert not ask(model, byte_tokenizer(), tmp_path / "memory", "x", max_new_tokens=1).is_complete
    with pytest.raises(ValueError, match=r"has read part of .*a\.txt: give it again"):
        ingestion.read(inputs[1:])
    whole = Path(inputs[0].name).read_bytes()
    place = ingestion.unread
    # A file that was put in its place, as long as it but broken off, changes nothing.
    Path(inputs[0].name).write_bytes(b"\xff" * len(whole))
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        ingestion.read(inputs)
    assert ingestion.unread == place
    Path(inputs[0].name).write_bytes(whole)
    ingestion.read([inputs[1], inputs[0]])
    assert ingestion.unread is None
    ingestion.close()
    sources = PassageLog(tmp_path / "memory").sources()
    assert [Path(name).name for name in sources] == ["a.txt", "b.txt"]
    assert isinstance(inputs[0], TextInput)
