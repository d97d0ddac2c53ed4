"""Summarization, scored: read a document, write its summary, compare words with the references."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from drt.checkpoints import Checkpoint
from drt.data.permutation import Permutation
from drt.data.summaries import SummaryExample, SummarySource, check_room, load_summaries
from drt.data.summary_batches import Prompt, SummaryFormat
from drt.evaluation.reading import check_length
from drt.evaluation.rouge import ROUGE, References, Rouge, estimate_means, lead
from drt.tables import ruled


class WrittenSummary(NamedTuple):
    """What a model wrote about one document."""

    text: str
    """The summary."""
    num_tokens: int
    """Its tokens, without the end."""
    is_finished: bool
    """Whether the model ended it itself, before the limit."""


@dataclass(frozen=True, kw_only=True)
class SummarizationTask(SummarySource):
    """Summaries of documents that were not trained on, scored by ROUGE."""

    split: str = "test"
    """Which split is read."""
    n: int | None = 100
    """Examples, drawn by the seed without repetition; None = all of the split."""
    length: int | None = None
    """Tokens of a prompt, its summary and the end at most, the document cut at its end; None = it
    is read whole."""
    beyond_limit: bool = False
    """Whether a model with rotary positions may go on past those that it was made for."""
    num_beams: int = 1
    """Beams of the search; 1 = greedy."""
    batch_size: int = 1
    """Documents that are summarized at once."""
    references: References = "best"
    """Of several references: for each figure the best, or the mean over all."""
    lead_sentences: int = 3
    """Sentences of the summary that is compared with: how the document begins."""
    seed: int = 1
    """Seed of the choice of examples and of the bootstrap."""
    output: str | None = None
    """Folder for the texts, a file `TITLE.jsonl` a model, a line a text as soon
    as it is written, those of the longest documents first; None = they are not kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "num_beams", "batch_size", "lead_sentences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must be 0 or more")
        if self.length is not None:
            check_room(self.length, self.max_summary_tokens)

    def check_data(self) -> None:
        """Raise the errors of `evaluate` if there are no such summaries, or nothing to score with.

        A folder for the texts is made.
        """
        Rouge()
        self._choose()
        if self.output is not None:
            Path(self.output).mkdir(parents=True, exist_ok=True)

    def evaluate(self, checkpoint: Checkpoint, *, title: str) -> dict[str, Any]:
        """Write and score the summaries.

        Args:
            checkpoint: any causal language model with its tokenizer.
            title: what the progress bar and the file of texts are called.

        Returns:
            JSON values: for each of rouge1, rouge2 and rougeL, and in `lead` for the first
            sentences of the documents, mean, low and high in per cent; n, num_documents, num_cut
            (documents that were shortened), num_unfinished (summaries that reached the limit),
            prompt_tokens and summary_tokens (means), seconds, and the settings.

        Raises:
            ImportError: `rouge-score` or, for the hub, `datasets` is not installed.
            FileExistsError: `output` is a file.
            ValueError: nothing to read, or a prompt that the model's positions or the length have
                no room for; a `length` that fits the model cuts documents.
        """
        rouge, examples = Rouge(), self._choose()
        file = None if self.output is None else _texts_file(Path(self.output), title)
        written_as = SummaryFormat(self, checkpoint.tokenizer)
        room = None if self.length is None else self.length - self.max_summary_tokens - 1
        prompts = [written_as.prompt(example, length=room) for example in examples]
        longest = max(len(prompt.token_ids) for prompt in prompts)
        check_length(
            checkpoint.model.config,
            longest + self.max_summary_tokens,
            beyond_limit=self.beyond_limit,
        )
        started = time.perf_counter()
        written: dict[int, WrittenSummary] = {}
        scores = np.empty((len(examples), len(ROUGE)))
        with checkpoint.autocast():
            for number, summary in self._write(checkpoint.model, written_as, prompts, title):
                written[number] = summary
                (scores[number],) = self._scores(rouge, [examples[number]], [summary.text])
                if file is not None:
                    _append_text(file, examples[number], summary, scores[number])
        seconds = time.perf_counter() - started
        leads = [lead(example.document, self.lead_sentences) for example in examples]
        return {
            **self._figures(examples, scores),
            "lead": self._figures(examples, self._scores(rouge, examples, leads)),
            "n": len(examples),
            "num_documents": len({example.document_name for example in examples}),
            "num_cut": sum(prompt.num_cut > 0 for prompt in prompts),
            "num_unfinished": sum(not each.is_finished for each in written.values()),
            "prompt_tokens": float(np.mean([len(prompt.token_ids) for prompt in prompts])),
            "summary_tokens": float(np.mean([each.num_tokens for each in written.values()])),
            "seconds": seconds,
            "precision": checkpoint.precision,
            "settings": asdict(self),
        }

    @staticmethod
    def table(records: dict[str, dict[str, Any]]) -> str:
        """ROUGE with intervals as plain text, a row a model, and one for the first sentences.

        Args:
            records: model name -> what `evaluate` returned.
        """
        leads: dict[str, dict[str, Any]] = {}
        for record in records.values():
            # Models that were asked about the same examples share this row.
            if record["lead"] not in leads.values():
                again = f" ({len(leads) + 1})" if leads else ""
                leads[f"lead-{record['settings']['lead_sentences']}{again}"] = record["lead"]
        rows = {**records, **leads}
        lines = [["model", *(_HEADS[name] for name in ROUGE), "n"]]
        for name, row in rows.items():
            lines.append([name, *(_cell(row[figure]) for figure in ROUGE), str(row.get("n", ""))])
        return f"{ruled(lines)}\nper cent, in brackets 95 % intervals over documents"

    def _choose(self) -> list[SummaryExample]:
        found = load_summaries(self, self.split)
        order = Permutation(len(found), self.seed)
        count = len(found) if self.n is None else min(self.n, len(found))
        return [found[order(place)] for place in range(count)]

    @torch.no_grad()
    def _write(
        self, model: Any, written_as: SummaryFormat, prompts: Sequence[Prompt], title: str
    ) -> Iterator[tuple[int, WrittenSummary]]:
        """The summaries with the numbers of their prompts, those of the longest first."""
        model.eval()
        # Prompts of one length beside each other waste no padding; the longest show first whether
        # they fit the machine.
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].token_ids))
        with tqdm(total=len(order), desc=title, unit="document", mininterval=1.0) as bar:
            for first in range(0, len(order), self.batch_size):
                chosen = order[first : first + self.batch_size]
                ids = [prompts[number].token_ids for number in chosen]
                yield from zip(chosen, self._write_batch(model, written_as, ids), strict=True)
                bar.update(len(chosen))

    def _write_batch(
        self, model: Any, written_as: SummaryFormat, prompts: Sequence[np.ndarray]
    ) -> Iterable[WrittenSummary]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), written_as.end_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, longest - len(prompt) :] = 1
        made = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=self.max_summary_tokens + 1,
            num_beams=self.num_beams,
            do_sample=False,
            eos_token_id=written_as.end_id,
            pad_token_id=written_as.end_id,
        )
        for row in made[:, longest:].tolist():
            finished = written_as.end_id in row
            summary = row[: row.index(written_as.end_id)] if finished else row
            summary = summary[: self.max_summary_tokens]
            text = written_as.tokenizer.decode(summary, skip_special_tokens=True)
            assert isinstance(text, str)
            yield WrittenSummary(text.strip(), len(summary), finished)

    def _scores(
        self, rouge: Rouge, examples: Sequence[SummaryExample], texts: Sequence[str]
    ) -> np.ndarray:
        pairs = zip(texts, examples, strict=True)
        return np.stack([rouge.score(text, e.summaries, self.references) for text, e in pairs])

    def _figures(self, examples: Sequence[SummaryExample], scores: np.ndarray) -> dict[str, Any]:
        names = [example.document_name for example in examples]
        estimates = estimate_means(scores, names, seed=self.seed)
        return {name: each._asdict() for name, each in zip(ROUGE, estimates, strict=True)}


_HEADS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def _cell(figure: dict[str, float | None]) -> str:
    mean, low, high = (figure[name] for name in ("mean", "low", "high"))
    return f"{mean:.2f}" if low is None else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def _texts_file(folder: Path, title: str) -> Path:
    """An empty file for the texts of a model."""
    folder.mkdir(parents=True, exist_ok=True)
    # A title may be a path or a model's name on the hub.
    name = re.sub(r"[^\w.-]+", "-", title).strip("-")
    file = folder / f"{name}.jsonl"
    file.write_text("")
    return file


def _append_text(
    file: Path, example: SummaryExample, summary: WrittenSummary, score: np.ndarray
) -> None:
    row = {
        "document": example.document_name,
        "query": example.query,
        "text": summary.text,
        "is_finished": summary.is_finished,
        "summaries": list(example.summaries),
        **dict(zip(ROUGE, score.tolist(), strict=True)),
    }
    with file.open("a", encoding="utf-8") as opened:
        opened.write(json.dumps(row, ensure_ascii=False) + "\n")
