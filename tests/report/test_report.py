"""The report: complete, self-contained, the same for the same records, and clear about what it cannot read."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.report import charts
from megatron_vp2o.report.report import report, write_report
from megatron_vp2o.tracking import format as fmt
from megatron_vp2o.tracking.record import RecordError
from megatron_vp2o.tracking.runs import load_run, load_runs
from megatron_vp2o.tracking.schema import schema_for
from tests.tracking.synthetic import PASS_AT, reinforcement_rows, supervised_rows, write_run

ROOT = Path(__file__).parents[2]
VOID = {"meta", "line", "path", "circle", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced, and gathers what tests ask for."""

    def __init__(self, html):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[list[str]] = []
        self.titles: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data
        if self.open and self.open[-1] == "h3" and "figcaption" in self.open:
            self.titles.append(data)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("runs")
    return [
        write_run(base / "tiny_supervised", supervised_rows(300, 1), Algorithm.supervised),
        write_run(base / "tiny_grpo", reinforcement_rows(50, 2)),
        write_run(base / "tiny_vp2o", reinforcement_rows(60, 3, collapse=0.5)[:41], steps=60),
    ]


@pytest.fixture(scope="module")
def html(folders):
    return report(load_runs(folders))


def test_the_page_needs_nothing_else(html):
    page = Page(html)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "image", "use"})
    assert not re.search(r"https?:|url\(|@import|@font-face|javascript:", html)
    links = [value for name, value in page.attributes if name in ("href", "src")]
    anchors = {value for name, value in page.attributes if name == "id"}
    assert links and all(link in {f"#{anchor}" for anchor in anchors} for link in links)


def test_the_page_is_the_same_for_the_same_records(html, folders, tmp_path):
    code = (
        "import sys; from megatron_vp2o.report.report import report; from megatron_vp2o.tracking.runs import load_runs;"
        "open(sys.argv[1], 'w').write(report(load_runs(sys.argv[2:])))"
    )
    for seed in ("1", "2"):  # the order of sets of strings hangs on it
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / seed), *map(str, folders)],
            check=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        )
        assert (tmp_path / seed).read_text() == html


def test_every_section_is_there(html):
    headings = re.findall(r"<h2>(.*?)</h2>", html)
    assert headings == [
        "Held-out results",
        "Learning curves",
        "Answer diversity",
        "Training",
        "Supervised training",
        "Where the time went",
        "Training health",
        "What was run",
    ]


def test_the_charts_that_a_reader_expects_are_there(html):
    titles = Page(html).titles
    for title in (
        *("Greedy accuracy", "pass@1", "pass@4", "pass@16", "Distinct right answers", "Coverage of right answers"),
        *("Answer entropy", "Mean reward", "Response length in rollouts", "Token entropy", "KL of a step"),
        *("Clipped tokens", "Gradient norm", "Log-probability mismatch", "Training loss", "Rollout speed"),
    ):
        assert title in titles
    assert titles.count("Greedy accuracy") == 3  # over samples, over time, and of the supervised run over steps
    assert titles.count("pass@16") == 2
    assert titles.index("Training loss") > titles.index("Mean reward")


def test_the_table_has_first_last_change_and_best(html, folders):
    rows = {cells[0]: cells[1:] for cells in reversed(Page(html).cells) if cells}
    run = load_run(folders[1])
    accuracy, coverage = run.values("eval/greedy_accuracy"), run.values("eval/coverage")
    best = accuracy.index(max(accuracy))
    assert rows["greedy accuracy"][4:8] == [
        fmt.percent(accuracy[0]),
        fmt.percent(accuracy[-1]),
        f"{100 * (accuracy[-1] - accuracy[0]):+.1f}",
        fmt.percent(accuracy[best]),
    ]
    assert rows["coverage of right answers"][6] == f"−{100 * (coverage[0] - coverage[-1]):.1f}"
    assert rows["coverage of right answers"][7] == fmt.percent(coverage[best])
    assert f"best ({best * 10})" in html


def test_test_problems_are_reported_for_runs_that_have_them(html, folders):
    (value,) = load_run(folders[1]).values("test/greedy_accuracy")
    assert ["greedy accuracy", fmt.percent(value)] in Page(html).cells


def test_runs_share_a_chart_and_keep_their_colour(html):
    (figure,) = re.findall(r"<figure><figcaption><h3>Mean reward</h3>.*?</figure>", html, re.DOTALL)
    assert re.findall(r"</svg> (\w+) <b>", figure) == ["grpo", "vp2o"]
    assert figure.count('class="line"') == 2
    for name, colour in (("supervised", "#0072b2"), ("grpo", "#d55e00"), ("vp2o", "#009e73")):
        strokes = re.findall(rf'stroke="(#\w+)" stroke-width="3"/></svg> {name} <b>', html)
        assert set(strokes) == {colour}


def test_time_shares_add_up(html):
    section = html[html.index('<section id="time">') :]
    bars = re.findall(r'<div class="bar">(.*?)</div></div>', section)
    assert len(bars) == 3
    for bar in bars:
        assert sum(map(float, re.findall(r"flex:([\d.]+) ", bar))) == pytest.approx(1.0, abs=1e-3)
    assert "rollout: " in bars[1] and "rollout: " not in bars[0]


def test_an_unfinished_run_is_said_to_be_so(html):
    assert "40 of 60" in html and "Not at its end" in html


def test_what_never_changes_is_a_sentence(html):
    assert "The same at every step: Learning rate 1.0e-4; Actor age 1." in html


def test_names_and_notes_cannot_break_the_page(tmp_path):
    folder = write_run(tmp_path / "r", reinforcement_rows(3, 1), name="<script>alert(1)</script> & \"co\" 'x'")
    html = report(load_runs([folder]))
    assert "script" not in Page(html).tags


def test_metrics_of_the_future_are_drawn(tmp_path):
    """A key that this version does not know: from a newer one, or from a plug-in."""
    folder = tmp_path / "run"
    folder.mkdir()
    keys = [*schema_for(Algorithm.grpo, PASS_AT), "stein/repulsion"]
    lines = [{**dict.fromkeys(keys), **row, "stein/repulsion": row["step"] ** 2} for row in reinforcement_rows(5, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = report(load_runs([folder]))
    assert "Further measurements" in html and "stein/repulsion" in Page(html).titles


def test_charts_are_of_registered_metrics_and_registered_metrics_have_charts(tmp_path):
    registered = set().union(*(schema_for(algorithm, PASS_AT) for algorithm in Algorithm))
    learning = [*charts.TRAINING, *charts.EXPERTS, *charts.DIVERSITY, *charts.SPEED]
    warm_up = [*charts.WARM_UP, *charts.SPEED]
    assert {spec.key for spec in learning + warm_up} <= registered
    for algorithm in Algorithm:
        keys = schema_for(algorithm, PASS_AT)
        lines = [{key: (i if key == "step" else 0.1 * (i + 1)) for key in keys} for i in range(4)]
        run = load_run(write_run(tmp_path / algorithm.name, lines, algorithm))
        chosen = warm_up if run.supervised else learning
        titles = Page(report([run])).titles
        for spec in [*chosen, *charts.further_specs([run], chosen)]:
            assert spec.title in titles or spec.key not in keys


@pytest.mark.parametrize("count", [1, 2, 11, 36])
def test_a_record_being_written_can_be_drawn(tmp_path, count):
    folder = write_run(tmp_path / "run", reinforcement_rows(60, 1)[:count], steps=60)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": ')
    Page(report(load_runs([folder])))


def test_a_run_without_evaluations_or_with_nan_everywhere_can_be_drawn(tmp_path):
    rows = [{"step": s, "samples": s, "reward/mean": float("nan"), "time/elapsed_s": 0.0} for s in range(3)]
    Page(report(load_runs([write_run(tmp_path / "run", rows)])))
    rows = [{"step": s, "samples": s, "eval/greedy_accuracy": float("nan")} for s in range(3)]
    Page(report(load_runs([write_run(tmp_path / "other", rows)])))


def test_the_file_goes_where_it_is_wanted(folders, tmp_path):
    assert write_report([folders[1]]) == folders[1] / "report.html"
    assert write_report(folders[:2]) == folders[1] / "comparison.html"
    out = tmp_path / "new" / "page.html"
    assert write_report(folders, out) == out
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_unreadable_runs_are_one_clear_error(tmp_path, folders):
    with pytest.raises(RecordError, match=r"metrics\.jsonl does not exist: .* is not the folder of a run"):
        write_report([folders[0], tmp_path / "nowhere"])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(RecordError, match="no line yet"):
        write_report([tmp_path])
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([])
    with pytest.raises(ConfigError, match="given 2 times"):
        write_report([folders[0], Path(f"{folders[0]}/../{folders[0].name}")])


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_command_prints_the_table_and_the_path(folders, tmp_path):
    out = tmp_path / "r.html"
    done = run_tool(*folders, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "greedy accuracy" in done.stdout
    assert done.stdout.splitlines()[-1] == str(out)
    Page(out.read_text())


def test_the_command_refuses_in_one_line(tmp_path):
    done = run_tool(tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
