"""A study's front as an SVG file: accuracy across, distinct right answers up, one point a variant with its intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from megatron_vp2o.study.statistics import Estimate

WIDTH, HEIGHT = 760, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 170, 40, 48
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")


def front_plot(
    title: str,
    points: Mapping[str, tuple[Estimate, Estimate]],
    best: Collection[str],
    warm_up: tuple[float, float] | None = None,
) -> str:
    """The chart as text.

    Args:
        points: of each variant, accuracy and distinct right answers.
        best: variants on the front; drawn filled.
        warm_up: accuracy and distinct answers before reinforcement.

    Raises:
        ValueError: there is no point.
    """
    if not points:
        raise ValueError("no variant to draw")
    across = [v for accuracy, _ in points.values() for v in (accuracy.low, accuracy.high)]
    up = [v for _, distinct in points.values() for v in (distinct.low, distinct.high)]
    if warm_up is not None:
        across.append(warm_up[0])
        up.append(warm_up[1])
    x, y = _Scale(across, _LEFT, WIDTH - _RIGHT), _Scale([0.0, *up], HEIGHT - _BOTTOM, _TOP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *_axes(x, y),
    ]
    if warm_up is not None:
        place = f"{x(warm_up[0]):.1f} {y(warm_up[1]):.1f}"
        lines.append(f'<path d="M{place} m-5 -5 l10 10 m0 -10 l-10 10" stroke="black" fill="none"/>')
    for number, (name, (accuracy, distinct)) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        px, py = x(accuracy.mean), y(distinct.mean)
        fill = colour if name in best else "white"
        lines += [
            f'<path d="M{x(accuracy.low):.1f} {py:.1f} H{x(accuracy.high):.1f} M{px:.1f} {y(distinct.low):.1f} '
            f'V{y(distinct.high):.1f}" stroke="{colour}" fill="none"/>',
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2">'
            f"<title>{escape(name)}: {accuracy}, {distinct}</title></circle>",
        ]
    names = [(name, COLOURS[i % len(COLOURS)], name in best) for i, name in enumerate(points)]
    return "\n".join([*lines, *_legend(names, warm_up is not None), "</svg>"]) + "\n"


class _Scale:
    """Values to pixels, with some room at both ends, and round ticks."""

    def __init__(self, values: Sequence[float], begin: float, end: float) -> None:
        low, high = min(values), max(values)
        room = (high - low or 1.0) * 0.06
        self.low, self.high = (low - room if low > 0 else low), high + room
        self._begin, self._end = begin, end
        rough = (self.high - self.low) / 6
        power = 10 ** math.floor(math.log10(rough))
        step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough)
        self.ticks = [i * step for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def __call__(self, value: float) -> float:
        return self._begin + (value - self.low) / (self.high - self.low) * (self._end - self._begin)


def _axes(x: _Scale, y: _Scale) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    lines = [f'<path d="M{_LEFT} {_TOP} V{bottom} H{right}" stroke="black" fill="none"/>']
    for tick in x.ticks:
        lines.append(f'<path d="M{x(tick):.1f} {_TOP} V{bottom}" stroke="#ddd"/>')
        lines.append(f'<text x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks:
        lines.append(f'<path d="M{_LEFT} {y(tick):.1f} H{right}" stroke="#ddd"/>')
        lines.append(f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (_TOP + bottom) / 2
    return [
        *lines,
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">accuracy (pass@1) on test problems</text>',
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">distinct right answers</text>',
    ]


def _legend(names: Sequence[tuple[str, str, bool]], warm_up: bool) -> list[str]:
    lines, left = [], WIDTH - _RIGHT + 16
    for row, (name, colour, filled) in enumerate(names):
        y = _TOP + 12 + 18 * row
        fill = colour if filled else "white"
        lines.append(f'<circle cx="{left}" cy="{y}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{left + 12}" y="{y + 4}">{escape(name)}</text>')
    y = _TOP + 12 + 18 * len(names)
    if warm_up:
        lines.append(f'<path d="M{left} {y} m-5 -5 l10 10 m0 -10 l-10 10" stroke="black" fill="none"/>')
        lines.append(f'<text x="{left + 12}" y="{y + 4}">warm-up</text>')
    return [*lines, f'<text x="{left - 6}" y="{y + 24}" fill="#555">filled: on the front</text>']
