"""Charts: every point where it belongs, no spike lost, ticks that a person would choose."""

import math
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vp2o.report import svg
from megatron_vp2o.report.svg import Axis, Chart, Series
from megatron_vp2o.tracking.runs import Point


def draw(*points, x=None, y=None, noisy=False, **options):
    """The <figure> of a chart with these lines, as a tree."""
    lines = [Series(f"run {i}", "#123456", line, noisy=noisy) for i, line in enumerate(points)]
    chart = Chart("Title", "Note.", x or Axis("samples"), y or Axis("value", zero=True), lines, **options)
    return ElementTree.fromstring(chart.html())


def ticks(figure):
    """{y pixel: value} of the horizontal grid."""
    texts = [text for text in figure.iter("text") if text.get("text-anchor") == "end" and text.get("class") is None]
    return {float(text.get("y")) - 4: float(text.text.replace(",", "").rstrip("%")) for text in texts}


def value_at(figure, pixel, log=False):
    """Read a value off the axis, as a person would, from its first and last tick."""
    (low_y, low), *_, (high_y, high) = ticks(figure).items()
    fraction = (pixel - low_y) / (high_y - low_y)
    if log:
        return 10 ** (math.log10(low) + fraction * (math.log10(high) - math.log10(low)))
    return low + fraction * (high - low)


def test_points_can_be_read_off_the_axes():
    values = [0.0, 2.0, 3.5, 9.0]
    figure = draw([(10.0 * i, y) for i, y in enumerate(values)])
    circles = list(figure.iter("circle"))
    assert [value_at(figure, float(c.get("cy"))) for c in circles] == pytest.approx(values, abs=0.02)
    across = [float(c.get("cx")) for c in circles]
    assert across[1] - across[0] == pytest.approx(across[3] - across[2], abs=0.2)
    assert [c.find("title").text for c in circles][1] == "run 0: 2.00 at samples 10.0"


def test_a_logarithmic_axis_has_decades():
    values = [1e-6, 3e-5, 1e-2]
    figure = draw([(i, y) for i, y in enumerate(values)], y=Axis("value", log=True))
    assert list(ticks(figure).values()) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2])
    read = [value_at(figure, float(c.get("cy")), log=True) for c in figure.iter("circle")]
    assert read == pytest.approx(values, rel=0.01)


def test_a_logarithmic_axis_is_linear_within_a_decade_and_leaves_out_zeros():
    figure = draw([(0, 1.0), (1, 3.0)], y=Axis("v", log=True, zero=True))
    assert list(ticks(figure).values()) == [0, 1, 2, 3]
    figure = draw([(0, 0.0), (1, 1e-3), (2, 1.0)], y=Axis("v", log=True))
    assert len(list(figure.iter("circle"))) == 2


def test_percent_and_time_axes():
    figure = draw([(0, 0.25), (90, 0.75)], x=Axis("time (min)", scale=1 / 60), y=Axis("share", percent=True, zero=True))
    assert set(ticks(figure).values()) >= {0, 20, 40, 60, 80}
    middle = [text.text for text in figure.iter("text") if text.get("text-anchor") == "middle"]
    assert middle[:4] == ["0.00", "0.25", "0.50", "0.75"]
    assert figure.find(".//b").text == "75.0%"


def test_lines_break_where_a_value_is_not_finite():
    points = [(float(i), None if i in (3, 4) else 1.0 + i) for i in range(8)]
    (path,) = [p for p in draw(points).iter("path")]
    assert path.get("d").count("M") == 2
    assert len(re.findall("[ML]", path.get("d"))) == 6


def test_nothing_to_draw_gives_nothing():
    assert Chart("T", "n", Axis("x"), Axis("y"), [Series("a", "#000", [(0.0, None)])]).html() == ""


def test_every_run_is_in_the_legend_with_its_last_value():
    figure = draw([(0, 1.0), (1, 2.0)], [(0, 5.0), (1, 7.0), (2, None)])
    items = ["".join(item.itertext()).split() for item in figure.iter("li")]
    assert items == [["run", "0", "2.00"], ["run", "1", "7.00"]]


def test_a_threshold_is_on_the_axis():
    figure = draw([(0, 1e-7), (1, 2e-7)], y=Axis("v", log=True), threshold=(1e-5, "bound"))
    (line,) = [line for line in figure.iter("line") if line.get("class") == "threshold"]
    assert value_at(figure, float(line.get("y1")), log=True) == pytest.approx(1e-5, rel=0.01)


def test_text_is_escaped():
    chart = Chart("<T>", 'a & "b"', Axis("<x>"), Axis("<y>"), [Series("<run>", "#000", [(0, 1.0), (1, 2.0)])])
    assert "<run>" not in chart.html()
    ElementTree.fromstring(chart.html())


def test_noisy_lines_get_their_moving_average():
    noisy = [(float(i), 1.0 + (i % 2)) for i in range(400)]
    raw, mean = draw(noisy, noisy=True).iter("path")
    assert (raw.get("class"), mean.get("class")) == ("raw", "line")
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", mean.get("d"))]
    wide = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", raw.get("d"))]
    assert max(heights) - min(heights) < 0.3 * (max(wide) - min(wide))


def test_the_moving_average_is_the_mean_of_its_window():
    points: list[Point] = [(float(i), float(i * i)) for i in range(200)]
    points[100] = (100.0, None)
    averaged = svg._moving_average(points, geometric=False)
    assert averaged[100] == (100.0, None)
    assert averaged[50][1] == pytest.approx(sum(i * i for i in range(46, 55)) / 9)
    window = [i * i for i in range(98, 107) if i != 100]
    assert averaged[102][1] == pytest.approx(sum(window) / 8)
    assert averaged[0][1] == pytest.approx((0 + 1 + 4 + 9 + 16) / 5)


def test_the_geometric_average_ignores_zeros_and_does_not_follow_one_spike():
    points = [(float(i), 1e-6) for i in range(200)]
    points[100] = (100.0, 1.0)
    points[20] = (20.0, 0.0)
    averaged = svg._moving_average(points, geometric=True)
    assert averaged[100][1] == pytest.approx(1e-6 * 1e6 ** (1 / 9))
    assert averaged[20][1] is None
    assert averaged[21][1] == pytest.approx(1e-6)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.integers(601, 5000), st.sampled_from([0.0, 0.02]))
def test_thinning_keeps_extremes_order_and_breaks(seed, count, broken):
    rng = random.Random(seed)
    values = [None if rng.random() < broken else rng.gauss(0, 1) ** 3 for _ in range(count)]
    points = [(float(i), y) for i, y in enumerate(values)]
    thin = svg._thinned(points)
    kept = [y for _, y in thin if y is not None]
    finite = [y for y in values if y is not None]
    assert [x for x, _ in thin] == sorted({x for x, _ in thin})
    assert set(thin) <= set(points)
    assert sum(y is None for _, y in thin) == values.count(None)
    if finite:
        assert (min(kept), max(kept)) == (min(finite), max(finite))
        assert len(kept) <= svg._MOST_POINTS + 2


@settings(deadline=None)
@given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=20), st.booleans())
def test_linear_axes_hold_their_values_with_few_even_ticks(values, zero):
    axis = svg._linear(values, zero=zero, most=5)
    slack = 1e-6 * max(map(abs, values))
    assert axis.low <= min(values) + slack and axis.high >= max(values) - slack
    assert 2 <= len(axis.ticks) <= 7
    steps = [b - a for a, b in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0.82], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0, 30_720], ["0", "10k", "20k", "30k", "40k"]),
        ([8.3, 9.2], ["8.2", "8.4", "8.6", "8.8", "9.0", "9.2"]),
        ([0, 1e-4], ["0", "2.0e-5", "4.0e-5", "6.0e-5", "8.0e-5", "1.0e-4"]),
        ([0, 0], ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ([0, 2_500_000], ["0", "0.5M", "1M", "1.5M", "2M", "2.5M"]),
        ([-0.03, 0.015], ["-0.03", "-0.02", "-0.01", "0.00", "0.01", "0.02"]),
    ],
)
def test_tick_labels(values, expected):
    axis = svg._linear(values, zero=values[0] == 0, most=5)
    assert [svg._tick_text(tick, axis, False) for tick in axis.ticks] == expected
