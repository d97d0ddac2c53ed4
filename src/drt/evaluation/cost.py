"""What reading, decoding and training cost, by length: time, memory, floating-point operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from drt import hardware
from drt.checkpoints import Checkpoint
from drt.evaluation.held_bytes import held_bytes
from drt.evaluation.memory import peak_growth
from drt.evaluation.needles import check_sizes, common_chunk_size, temporary_memory
from drt.evaluation.pictures import short_length
from drt.evaluation.progress import token_bar
from drt.evaluation.reading import Reading, check_length, start_reading
from drt.flops import flops_if_known
from drt.tables import ruled

# Tokens that warm up what is measured: caches, kernels, the allocator.
_WARM_UP = 256


@dataclass(frozen=True)
class CostTask:
    """Time and memory of any causal language model, on random tokens.

    Each repeat measures every length once, so that what else the machine does strikes all alike.
    """

    lengths: list[int] = field(default_factory=lambda: [1024, 4096, 16384])
    """Tokens that are read before the decoding."""
    num_repeats: int = 3
    """Times that everything is measured, after a warm-up; the medians are reported."""
    num_chunks: int = 2
    """Chunks that are decoded token by token after each reading; two at least, since a DRT does
    more at the end of a chunk."""
    training_length: int | None = None
    """Tokens of a row of the training step; None = training is not measured."""
    training_rows: int = 1
    """Rows of the training step."""
    segment_size: int = 4096
    """Tokens of one forward while a text is read."""
    memory: Literal["device", "host", "disk"] = "device"
    """Where a DRT keeps its chunks; other models keep what they keep in their cache."""
    beyond_limit: bool = False
    """Whether rotary positions may go on beyond the model's `max_position_embeddings`."""
    seed: int = 0
    """Seed of the tokens, and of the noise of training."""

    def __post_init__(self) -> None:
        for name, least in (("num_repeats", 1), ("num_chunks", 2), ("training_rows", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if min(self.lengths, default=0) < 1:
            raise ValueError(f"lengths must be of at least 1 token, got {self.lengths}")
        if self.training_length is not None and self.training_length < 2:
            raise ValueError(f"training_length must be at least 2, got {self.training_length}")
        check_sizes(chunk_size=None, segment_size=self.segment_size)

    def check_model(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        """Raise the ValueError of `evaluate`."""
        decoded = 1 + self.num_chunks * common_chunk_size([config])
        for tokens in (max(self.lengths) + decoded, self.training_length or 0):
            check_length(config, tokens, beyond_limit=self.beyond_limit)

    def evaluate(self, checkpoint: Checkpoint, *, title: str) -> dict[str, Any]:
        """Measure a model.

        Args:
            checkpoint: a causal LM; its weights stay as they are.
            title: of the progress bar.

        Returns:
            A record, ready for JSON. `rows`, by length: wall seconds of reading, milliseconds of
            each decoded token (means of chunks), both with all samples; peak bytes of both beyond
            what was held before (None where the system does not tell); bytes held in the end.
            `training`: seconds, peak bytes and floating-point operations (see `flops_of_row`; None
            where they cannot be counted) of forward and backward, or None.

        Raises:
            ValueError: a length, that of training included, is beyond the model's positions.
        """
        measuring = _Measuring(self, checkpoint)
        self.check_model(checkpoint.tokenizer, checkpoint.model.config)
        lengths = sorted(set(self.lengths))
        samples: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
        steps: list[dict[str, Any]] = []
        total = self.num_repeats * sum(lengths)
        with token_bar(title, total) as bar:
            measuring.inference(min(lengths[0], _WARM_UP))
            if self.training_length is not None:
                measuring.training(self.training_length)
            for _ in range(self.num_repeats):
                if self.training_length is not None:
                    steps.append(measuring.training(self.training_length))
                for length in lengths:
                    samples[length].append(measuring.inference(length))
                    bar.update(length)
        training = self._training_record(steps, checkpoint.model) if steps else None
        return {
            "task": "cost",
            "settings": asdict(self),
            "parameters": checkpoint.model.num_parameters(),
            "hardware": hardware.describe(),
            "device": checkpoint.model.device.type,
            "precision": checkpoint.precision,
            "rows": [_row(length, found) for length, found in samples.items()],
            "training": training,
        }

    def _training_record(self, steps: list[dict[str, Any]], model: Any) -> dict[str, Any]:
        assert self.training_length is not None
        num_tokens = self.training_rows * self.training_length
        seconds = median(step["seconds"] for step in steps)
        flops = flops_if_known(model, self.training_length)
        return {
            "length": self.training_length,
            "rows": self.training_rows,
            "seconds": seconds,
            "seconds_samples": [step["seconds"] for step in steps],
            "tokens_per_second": num_tokens / seconds,
            "peak_bytes": _largest([step["peak_bytes"] for step in steps]),
            "flops": flops and self.training_rows * flops,
            "flops_per_token": flops and flops / self.training_length,
        }

    @staticmethod
    def table(records: dict[str, dict[str, Any]]) -> str:
        """A plain-text table: a row a model and length, and one a model for training.

        Args:
            records: what `evaluate` returned, by the name of the model.
        """
        head = ("model", "tokens", "read, s", "tokens/s", "ms/token", "peak MiB", "held MiB")
        lines = [
            (
                name,
                short_length(row["length"]),
                f"{row['prefill_seconds']:.3f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['decode_ms']:.2f}",
                _mebibytes(row["peak_bytes"]),
                _mebibytes(sum(row["held_bytes"].values())),
            )
            for name, record in records.items()
            for row in record["rows"]
        ]
        text = f"reading and decoding\n{ruled([head, *lines])}"
        head = ("model", "rows", "tokens", "step, s", "tokens/s", "peak MiB", "GFLOP/token")
        lines = [
            (
                name,
                str(step["rows"]),
                short_length(step["length"]),
                f"{step['seconds']:.3f}",
                f"{step['tokens_per_second']:,.0f}",
                _mebibytes(step["peak_bytes"]),
                "-" if (flops := step["flops_per_token"]) is None else f"{flops / 1e9:.3f}",
            )
            for name, record in records.items()
            if (step := record["training"]) is not None
        ]
        return f"{text}\n\ntraining\n{ruled([head, *lines])}" if lines else text

    @staticmethod
    def draw(records: dict[str, dict[str, Any]], path: Path) -> None:
        """Draw reading, decoding, peak memory and what is held by length.

        Args:
            records: what `evaluate` returned, by the name of the model.
            path: where to; its ending chooses the format.

        Raises:
            ValueError: there are no records.
        """
        from drt.evaluation.length_figures import draw_cost

        draw_cost(records, path)


class _Measuring:
    """One model under measurement."""

    def __init__(self, task: CostTask, checkpoint: Checkpoint) -> None:
        self.task, self.checkpoint = task, checkpoint
        self.model, self.device = checkpoint.model, checkpoint.model.device
        config = self.model.config.get_text_config()
        self.vocab_size = config.vocab_size
        # Models that know no chunks decode as many tokens as one of the usual size.
        self.chunk_size = common_chunk_size([config])

    def inference(self, length: int) -> dict[str, Any]:
        """Read a text, and decode some chunks after it."""
        self.model.eval()
        found: dict[str, Any] = {}
        found["peak_bytes"] = peak_growth(partial(self._read_on, length, found), self.device)
        return found

    def _read_on(self, length: int, found: dict[str, Any]) -> None:
        place = self.task.memory
        with (
            self.checkpoint.autocast(),
            start_reading(
                self.model,
                segment_size=self.task.segment_size,
                new_memory=None if place == "device" else partial(temporary_memory, place),
                beyond_limit=self.task.beyond_limit,
            ) as reading,
        ):
            ids = self._tokens(length)
            found["prefill_seconds"] = self._seconds(partial(reading.read, ids))
            found["decode_ms"] = self._decode_ms(reading)
            found["held_bytes"] = held_bytes(reading)

    def _decode_ms(self, reading: Reading) -> list[float]:
        """Milliseconds of a token, the mean of each chunk."""
        size, chunks = self.chunk_size, self.task.num_chunks
        # The first step after a text may differ from all others, and is left out.
        tokens = self._tokens(1 + chunks * size).split(1)
        reading.losses(tokens[0])
        times = [1e3 * self._seconds(partial(reading.losses, token)) for token in tokens[1:]]
        return [mean(times[first : first + size]) for first in range(0, len(times), size)]

    def training(self, length: int) -> dict[str, Any]:
        """Forward and backward of one step."""
        found: dict[str, Any] = {}

        def step() -> None:
            found["seconds"] = self._seconds(partial(self._train, length))

        with self._in_training():
            found["peak_bytes"] = peak_growth(step, self.device)
        return found

    def _train(self, length: int) -> None:
        ids = self._tokens(self.task.training_rows * length).view(self.task.training_rows, length)
        try:
            with self.checkpoint.autocast():
                loss = self.model(input_ids=ids, labels=ids).loss
            loss.backward()
        finally:
            self.model.zero_grad(set_to_none=True)

    @contextmanager
    def _in_training(self) -> Iterator[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        self.model.train()
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.task.seed)
                yield
        finally:
            self.model.eval()

    def _tokens(self, count: int) -> Tensor:
        """(count,) int64, always the same."""
        generator = torch.Generator().manual_seed(self.task.seed)
        return torch.randint(self.vocab_size, (count,), generator=generator).to(self.device)

    def _seconds(self, call: Callable[[], object]) -> float:
        """Wall seconds of a call, the work of the device included."""
        wait = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else None
        if wait:
            wait()
        start = perf_counter()
        call()
        if wait:
            wait()
        return perf_counter() - start


def _row(length: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    prefill = [sample["prefill_seconds"] for sample in samples]
    decode = [ms for sample in samples for ms in sample["decode_ms"]]
    return {
        "length": length,
        "prefill_seconds": median(prefill),
        "prefill_seconds_samples": prefill,
        "tokens_per_second": length / median(prefill),
        "decode_ms": median(decode),
        "decode_ms_samples": decode,
        "peak_bytes": _largest([sample["peak_bytes"] for sample in samples]),
        "held_bytes": samples[-1]["held_bytes"],
    }


def _largest(sizes: list[int | None]) -> int | None:
    return max((size for size in sizes if size is not None), default=None)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}"
