"""The report's section of samples: what each run's model wrote at the last step that was kept, and what it earned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_vp2o.report import page
from megatron_vp2o.tracking.runs import Run
from megatron_vp2o.tracking.samples import SAMPLES_FILE, printable, read_samples

LONGEST = 1500  # characters of a text; its beginning and its end are kept
HEAD = "<tr><th>prompt</th><th>response</th><th>reward</th><th>advantage</th><th>why not more</th></tr>"


def samples(runs: Sequence[Run], names: Sequence[str]) -> str:
    """HTML; empty where no run kept samples."""
    parts = []
    for run, name in zip(runs, names, strict=True):
        path = run.folder / SAMPLES_FILE
        kept = read_samples(path) if path.is_file() else []
        if not kept:
            continue
        step = max(sample["step"] for sample in kept)
        rows = [row for sample in kept if sample["step"] == step for row in _rows(sample)]
        parts.append(f"<h3>{escape(name)}, step {step}</h3>{page.table(HEAD, rows, 'about samples')}")
    if not parts:
        return ""
    return page.paragraph(f"All samples that were kept are in {SAMPLES_FILE} of the run folder.") + "".join(parts)


def _rows(sample: Mapping[str, Any]) -> list[str]:
    responses = sample.get("responses", [])
    rows = []
    for i, response in enumerate(responses):
        prompt = f'<td rowspan="{len(responses)}">{_text(str(sample.get("prompt", "")))}</td>' if i == 0 else ""
        cut = "" if response.get("finished", True) else ' <i class="note">cut off</i>'
        rows.append(
            f"<tr>{prompt}<td>{_text(str(response.get('text', '')))}{cut}</td><td>{response.get('reward', 0):.3g}</td>"
            f"<td>{response.get('advantage', 0):+.3f}</td><td>{escape(str(response.get('reason', '')))}</td></tr>"
        )
    return rows


def _text(text: str) -> str:
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 3]}\n[...]\n{text[-2 * LONGEST // 3 :]}"
    return f'<span class="text">{escape(printable(text))}</span>'
