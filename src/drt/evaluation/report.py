"""The report of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path
from typing import Any

from drt.evaluation.comparison import TASKS
from drt.evaluation.inspection import Inspection, Passage

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid #ddd;vertical-align:top}
th:first-child,td:first-child,td.text,th.text{text-align:left}
td.text{font-family:ui-monospace,monospace;font-size:.85em;white-space:pre-wrap;
word-break:break-word}
tr.hit{background:#e4f3ec}.bar{background:#0b6e4f;height:.6em;display:inline-block;
vertical-align:middle;margin-right:.4em}
.note{color:#666}img{max-width:100%}code{background:#f4f4f4;padding:0 .25em}
"""


def write_report(results: dict[str, Any], inspection: Inspection, figure: Path, to: Path) -> None:
    """Write results, picture and one inspected question as a self-contained page.

    Args:
        results: the content of results.json.
        inspection: one question and what was retrieved for it.
        figure: a PNG file, embedded.
        to: the HTML file.
    """
    picture = base64.b64encode(figure.read_bytes()).decode()
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width,initial-scale=1'>",
        f"<title>DRT: needles by context length</title><style>{_STYLE}</style></head><body>",
        "<h1>Needles by context length</h1>",
        f"<p class='note'>{escape(_summary(results))}</p>",
        "<img alt='Accuracy, time and memory by context length' "
        f"src='data:image/png;base64,{picture}'>",
        "<h2>Scores</h2>",
        _score_table(results["models"]),
        "<h2>What was retrieved</h2>",
        _inspection_html(inspection),
        "</body></html>",
    ]
    to.write_text("\n".join(parts), encoding="utf-8")


def _summary(results: dict[str, Any]) -> str:
    models = results["models"]
    sizes = ", ".join(
        f"{name} {model['parameters']:,} parameters" for name, model in models.items()
    )
    return (
        f"Trained on rows of {results['train_length']:,} tokens, seed {results['seed']}; {sizes}. "
        f"Whole run {results['seconds']['total']:,.0f} s, peak memory "
        f"{results['peak_rss_bytes'] / 2**30:.2f} GiB. {results['hardware']}"
    )


def _score_table(models: dict[str, Any]) -> str:
    rows = [
        "<table><tr><th>model</th><th class='text'>task</th><th>context, tokens</th>"
        "<th>questions</th><th>exact match</th><th>recall@K</th><th>s / context</th></tr>"
    ]
    for name, model in models.items():
        for task in TASKS:
            for row in model[task]:
                recall = "-" if row["recall"] is None else f"{row['recall']:.3f}"
                rows.append(
                    f"<tr><td>{escape(name)}</td><td class='text'>{task}</td>"
                    f"<td>{row['length']:,}</td><td>{row['n']}</td>"
                    f"<td>{row['exact_match']:.3f}</td><td>{recall}</td>"
                    f"<td>{row['seconds_per_example']:.2f}</td></tr>"
                )
    return "".join(rows) + "</table>"


def _inspection_html(inspection: Inspection) -> str:
    verdict = "right" if inspection.generated == inspection.expected else "wrong"
    head = (
        f"<p>A context of {inspection.length:,} tokens; the needle lies at token "
        f"{inspection.needle_position:,}. The question ends with "
        f"<code>{escape(inspection.question)}</code>; the model answered "
        f"<code>{escape(inspection.generated)}</code>, the answer is "
        f"<code>{escape(inspection.expected)}</code>: {verdict}. Chunks that hold digits of the "
        "answer are marked.</p>"
        "<table><tr><th>group</th><th>chunk</th><th>score</th><th class='text'>weight</th>"
        "<th class='text'>text</th></tr>"
    )
    return head + "".join(_passage_html(passage) for passage in inspection.passages) + "</table>"


def _passage_html(passage: Passage) -> str:
    bar = f"<span class='bar' style='width:{passage.weight * 80:.0f}px'></span>"
    return (
        f"<tr{' class=hit' if passage.holds_answer else ''}><td>{passage.group + 1}</td>"
        f"<td>{passage.chunk:,}</td><td>{passage.score:.2f}</td>"
        f"<td class='text'>{bar}{passage.weight:.3f}</td>"
        f"<td class='text'>{escape(passage.text)}</td></tr>"
    )
