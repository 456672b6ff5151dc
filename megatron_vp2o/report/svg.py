"""Line charts as inline SVG, drawn by hand: no library, the page's own fonts, the same text for the same numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.runs import Point

WIDTH, HEIGHT = 520, 264
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 30, 42
_MOST_POINTS = 600  # of one line; denser ones are thinned to the extremes of each bucket
_MOST_MARKED = 40  # points of a line that are marked one by one; noisier lines get a moving average instead


@dataclass(frozen=True)
class Series:
    """One line. Long noisy ones are drawn thin, with a moving average on top."""

    name: str
    colour: str
    points: Sequence[Point]
    dash: str = ""
    noisy: bool = False
    band: Sequence[tuple[float, float, float]] = ()
    """x, low and high of an interval around the line, drawn as a shade."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows. `scale` turns the record's unit into the axis's: 1/60 for seconds as minutes."""

    label: str
    percent: bool = False
    whole: bool = False  # integers
    log: bool = False
    zero: bool = False  # begins at 0
    scale: float = 1.0

    def say(self, value: float) -> str:
        if self.percent:
            return fmt.percent(value)
        return fmt.number(round(value) if self.whole else value * self.scale)


@dataclass(frozen=True)
class _Range:
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False
    decimals: int = 0

    def fraction(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Chart:
    """A titled line chart with legend.

    Args:
        threshold: drawn as a dashed horizontal line, with a word.
    """

    title: str
    note: str
    x: Axis
    y: Axis
    series: Sequence[Series] = field(default_factory=tuple)
    threshold: tuple[float, str] | None = None

    def html(self) -> str:
        """A <figure>; nothing if there is nothing to draw."""
        series = [line for line in self.series if any(y is not None for _, y in line.points)]
        if not series:
            return ""
        return (
            f"<figure><figcaption><h3>{escape(self.title)}</h3><p>{escape(self.note)}</p>{self._legend(series)}"
            f"</figcaption>{self._svg(series)}</figure>"
        )

    def _legend(self, series: Sequence[Series]) -> str:
        items = []
        for line in series:
            last = [y for _, y in line.points if y is not None][-1]
            key = (
                f'<svg width="22" height="8" aria-hidden="true"><line x1="1" y1="4" x2="21" y2="4" '
                f'stroke="{line.colour}" stroke-width="3"{_dash(line)}/></svg>'
            )
            items.append(f"<li>{key} {escape(line.name)} <b>{escape(self.y.say(last))}</b></li>")
        return f'<ul class="legend">{"".join(items)}</ul>'

    def _svg(self, series: Sequence[Series]) -> str:
        across = _linear([x * self.x.scale for line in series for x, _ in line.points], zero=True, most=6, tight=True)
        values = [y * self.y.scale for line in series for _, y in line.points if y is not None]
        values += [y * self.y.scale for line in series for _, *bounds in line.band for y in bounds]
        if self.threshold is not None:
            values.append(self.threshold[0] * self.y.scale)
        up = _logarithmic(values) if self.y.log else None
        up = up or _linear(values, zero=self.y.zero, most=5)

        def place(point: Point) -> tuple[float, float] | None:
            x, y = point
            if y is None or (up.log and y <= 0):
                return None
            return _place_x(across, x * self.x.scale), _place_y(up, y * self.y.scale)

        parts = [*_grid(across, up, self.y.percent), *_axis_labels(self.x.label, self.y.label)]
        if self.threshold is not None:
            parts.append(self._threshold(up, *self.threshold))
        parts += [self._band(line, place) for line in series if line.band]
        for line in series:
            parts += self._line(line, place)
        label = escape(f"{self.title}: {self.y.label} over {self.x.label}", quote=True)
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" preserveAspectRatio="xMidYMid meet">'
            f"{''.join(parts)}</svg>"
        )

    def _threshold(self, up: _Range, value: float, word: str) -> str:
        y = _place_y(up, value * self.y.scale)
        return (
            f'<line class="threshold" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>'
            f'<text class="threshold" x="{WIDTH - _RIGHT}" y="{y - 4:.1f}" text-anchor="end">{escape(word)}</text>'
        )

    def _band(self, line: Series, place: Callable[[Point], tuple[float, float] | None]) -> str:
        edge = [(x, low) for x, low, _ in line.band] + [(x, high) for x, _, high in reversed(line.band)]
        corners = " ".join(f"{at[0]:.1f},{at[1]:.1f}" for point in edge if (at := place(point)) is not None)
        return f'<polygon class="band" points="{corners}" fill="{line.colour}"/>'

    def _line(self, line: Series, place: Callable[[Point], tuple[float, float] | None]) -> list[str]:
        stroke = f'fill="none" stroke="{line.colour}"{_dash(line)}'
        raw = _path([place(point) for point in _thinned(line.points)])
        if line.noisy and len(line.points) > _MOST_MARKED:
            mean = _path([place(point) for point in _thinned(_moving_average(line.points, geometric=self.y.log))])
            return [f'<path d="{raw}" {stroke} class="raw"/>', f'<path d="{mean}" {stroke} class="line"/>']
        parts = [f'<path d="{raw}" {stroke} class="line"/>']
        for point in line.points if len(line.points) <= _MOST_MARKED else ():
            where = place(point)
            if where is not None and point[1] is not None:
                at = f"{self.x.label.split(' (')[0]} {self.x.say(point[0])}"
                words = escape(f"{line.name}: {self.y.say(point[1])} at {at}")
                parts.append(
                    f'<circle cx="{where[0]:.1f}" cy="{where[1]:.1f}" r="3.2" fill="{line.colour}">'
                    f"<title>{words}</title></circle>"
                )
        return parts


def _place_x(across: _Range, x: float) -> float:
    return _LEFT + across.fraction(x) * (WIDTH - _LEFT - _RIGHT)


def _place_y(up: _Range, y: float) -> float:
    return HEIGHT - _BOTTOM - up.fraction(y) * (HEIGHT - _TOP - _BOTTOM)


def _dash(line: Series) -> str:
    return f' stroke-dasharray="{line.dash}"' if line.dash else ""


def _moving_average(points: Sequence[Point], *, geometric: bool) -> list[Point]:
    """Centred mean over about 2 % of the points on either side; broken where the line is.

    Geometric for a logarithmic axis, where one spike would otherwise lift a whole window.
    """
    half = max(1, len(points) // 50)
    known = [y is not None and not (geometric and y <= 0) for _, y in points]
    values = [
        (math.log(y) if geometric else y) if ok and y is not None else 0.0
        for (_, y), ok in zip(points, known, strict=True)
    ]
    total, count = [0.0, *itertools.accumulate(values)], [0, *itertools.accumulate(known)]
    out: list[Point] = []
    for i, (x, _) in enumerate(points):
        low, high = max(0, i - half), min(len(points), i + half + 1)
        mean = (total[high] - total[low]) / max(1, count[high] - count[low])
        out.append((x, (math.exp(mean) if geometric else mean) if known[i] else None))
    return out


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most about _MOST_POINTS points: the extremes of each bucket, so that no spike is lost, and its breaks."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    out: list[Point] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [i for i, (_, y) in enumerate(bucket) if y is not None]
        chosen = {i for i, (_, y) in enumerate(bucket) if y is None}
        if finite:
            chosen |= {f(finite, key=lambda i: bucket[i][1] or 0.0) for f in (min, max)}
        out += [bucket[i] for i in sorted(chosen)]
    return out


def _path(places: Sequence[tuple[float, float] | None]) -> str:
    commands, pen_down = [], False
    for place in places:
        if place is not None:
            commands.append(f"{'L' if pen_down else 'M'}{place[0]:.1f} {place[1]:.1f}")
        pen_down = place is not None
    return "".join(commands)


def _nice(step: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `step`."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= step * (1 - 1e-9))


def _linear(values: Sequence[float], *, zero: bool, most: int, tight: bool = False) -> _Range:
    """A range with at most about `most` nice ticks; it ends at a tick, or (`tight`) at the last value."""
    low, high = min(values), max(values)
    if zero and low >= 0:
        low = 0.0
    if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
        pad = abs(high) * 0.1 or 1.0
        low, high = (0.0 if zero and low >= 0 else low - pad), high + pad
    step = _nice((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(i * step for i in range(first, last + 1))
    exponent = math.floor(math.log10(step))
    decimals = max(0, -exponent + (round(step / 10.0**exponent, 6) == 2.5))
    if tight:
        inside = tuple(tick for tick in ticks if low <= tick <= high * (1 + 1e-9))
        return _Range(low, high, inside, decimals=decimals)
    return _Range(ticks[0], ticks[-1], ticks, decimals=decimals)


def _logarithmic(values: Sequence[float]) -> _Range | None:
    """Whole decades around the positive values; None where they span less than one, and a linear axis says more."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) < 10 * min(positive):
        return None
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    every = math.ceil((last - first) / 6)
    return _Range(10.0**first, 10.0**last, tuple(10.0**i for i in range(first, last + 1, every)), log=True)


def _tick_text(value: float, axis: _Range, percent: bool) -> str:
    if axis.log:
        exponent = round(math.log10(value))
        return f"{10.0**exponent:g}" if -2 <= exponent <= 3 else f"1e{exponent}"
    if percent:
        return f"{100 * value:.{max(0, axis.decimals - 2)}f}%"
    biggest = max(abs(axis.low), abs(axis.high))
    if biggest >= 10_000:
        unit, suffix = (1e6, "M") if biggest >= 1e6 else (1e3, "k")
        return f"{value / unit:g}{suffix}" if value else "0"
    if biggest < 1e-3:
        return fmt.number(value, 2 + (axis.decimals > -math.floor(math.log10(biggest))))
    return f"{value:,.{axis.decimals}f}"


def _grid(across: _Range, up: _Range, percent: bool) -> list[str]:
    parts = []
    for tick in up.ticks:
        y = _place_y(up, tick)
        text = _tick_text(tick, up, percent)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{y:.1f}" x2="{WIDTH - _RIGHT}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    bottom = HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{WIDTH - _RIGHT}" y2="{bottom}"/>')
    for tick in across.ticks:
        x = _place_x(across, tick)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>')
        text = _tick_text(tick, across, False)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{text}</text>')
    return parts


def _axis_labels(across: str, up: str) -> list[str]:
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    return [
        f'<text class="label" x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(across)}</text>',
        f'<text class="label" x="2" y="{_TOP - 14}">{escape(up)}</text>',
    ]
