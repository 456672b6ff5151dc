"""The look of a report: its style sheet, and the few HTML shapes that it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { --ink: #1b2530; --soft: #5a6673; --line: #dfe4e9; --wash: #f6f8fa; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, "DejaVu Sans", sans-serif; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 28px 60px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 4px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 14.5px; margin: 0; }
p { margin: 4px 0; max-width: 96ch; }
.soft, figcaption p, h2 + p { color: var(--soft); }
nav { margin: 12px 0 0; font-size: 14px; } nav a { margin-right: 16px; color: #0b5c95; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 16px; margin: 20px 0 8px; }
.tile { border: 1px solid var(--line); border-left: 5px solid var(--run); border-radius: 6px; padding: 12px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.3; font-weight: 650; }
.tile span { display: block; color: var(--soft); font-size: 13.5px; }
.tile .name { color: var(--ink); font-weight: 600; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin-top: 10px; } .wide + p, .charts + p { margin-top: 22px; color: var(--soft); }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 4px; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1.5px solid #b9c2cb; }
thead th.run { color: var(--ink); font-weight: 650; border-bottom: 3px solid var(--run); }
table.evaluation tr > :nth-child(2) { text-align: left; } tbody th { font-weight: 500; } td.first, th.first { padding-left: 24px; }
td.last { font-weight: 650; } td.best, td.delta { color: var(--soft); }
thead th[colspan], table.about th { text-align: left; }
table.about td { text-align: left; white-space: normal; vertical-align: top; }
.samples .text { white-space: pre-wrap; overflow-wrap: anywhere; } table.samples td { max-width: 560px; }
.charts { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 28px 26px; margin-top: 16px; }
.charts.pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 1000px) { .charts, .charts.pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 640px) { .charts, .charts.pairs { grid-template-columns: minmax(0, 1fr); } main { padding: 16px; } }
figure { margin: 0; display: flex; flex-direction: column; break-inside: avoid; }
figcaption { flex: 1; font-size: 13px; line-height: 1.4; }
figure > svg { width: 100%; height: auto; margin-top: 8px; overflow: visible; }
svg text { font-size: 12.5px; fill: var(--soft); } svg text.label { fill: var(--ink); }
.charts:not(.pairs) svg text { font-size: 15px; }
svg .grid { stroke: #e8ecef; } svg .axis { stroke: #98a3ae; }
svg line.threshold { stroke: #9a1f2b; stroke-dasharray: 5 4; } svg text.threshold { fill: #9a1f2b; }
svg .raw { stroke-width: 1; opacity: 0.35; } svg .line { stroke-width: 2.2; stroke-linejoin: round; }
svg circle { stroke: #fff; stroke-width: 1.2; } svg .band { opacity: 0.13; }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px; padding: 0; margin: 5px 0 0; }
ul.legend b { font-weight: 600; } .swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px;
  vertical-align: -1px; background: var(--run); }
.bar { display: flex; height: 30px; margin: 3px 0 16px; border-radius: 4px; overflow: hidden; gap: 2px; }
.bar div { min-width: 1px; overflow: hidden; color: #fff; font-size: 13px; line-height: 30px; text-align: center;
  background: var(--run); }
.health { display: grid; grid-template-columns: repeat(auto-fit, minmax(330px, 1fr)); gap: 20px 28px; }
.health ul { list-style: none; margin: 6px 0; padding: 0; font-size: 14px; }
.health li { padding: 3px 0 3px 22px; text-indent: -22px; } .health li span { color: var(--soft); }
i { font-style: normal; } .tile a { text-decoration: none; } .tile i { margin-right: 10px; }
.warning { color: #b3261e; font-weight: 650; } .note { color: #8a5a00; font-weight: 650; }
.good { color: #1a7340; }
.health summary { cursor: pointer; color: var(--soft); font-size: 14px; }
"""


def page(title: str, sections: Iterable[tuple[str, str, str]], head: str) -> str:
    """A whole document.

    Args:
        sections: (anchor, heading, HTML); those without HTML are left out.
        head: HTML between the title and the first section.
    """
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in kept)
    body = "\n".join(
        f'<section id="{anchor}"><h2>{escape(heading)}</h2>\n{content}</section>' for anchor, heading, content in kept
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main>\n<h1>{escape(title)}</h1>\n{head}\n<nav>{links}</nav>\n{body}\n</main></body></html>\n"
    )


def charts(figures: Sequence[str], *, pairs: bool = False) -> str:
    """A grid of figures, three abreast or in pairs; empty ones are left out, and the grid if all are."""
    kept = "\n".join(figure for figure in figures if figure)
    return f'<div class="charts{" pairs" if pairs else ""}">{kept}</div>' if kept else ""


def table(head: str, rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways where it is wider than the page; `head` and `rows` are HTML rows."""
    return f'<div class="wide"><table class="{kind}"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"
