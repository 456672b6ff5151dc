"""The page's list of what is missing, and its plots."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from megatron_vp2o.study.plot import front_plot
from megatron_vp2o.study.report import markdown
from megatron_vp2o.study.results import Result
from megatron_vp2o.study.spec import Job, Study, TaskSpec
from megatron_vp2o.study.statistics import Estimate

SVG = "{http://www.w3.org/2000/svg}"


def estimate(mean: float, half: float) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 1.0)


def test_missing_runs_are_said_by_task_and_seeds() -> None:
    study = Study("s", {"t": TaskSpec("w", "r")}, {"grpo": (), "a": (), "b": ()}, (1, 2), "grpo")
    jobs = [
        Job("t", "warm_up", 0, ()),
        *(Job("t", v, s, ()) for s in (1, 2) for v in ("grpo", "a")),
        Job("t", "b", 2, ()),
    ]
    page = markdown(study, jobs, [], [], "make study")
    assert "Not finished: t warm_up (seed 0); t grpo, a (seeds 1, 2); t b (seed 2)." in page


def run(task: str, variant: str, seed: int, counts: list[int]) -> Result:
    """Problems with so many distinct answers among four samples, all of them right."""
    problems = [{"answers": {str(i): 4 // n + (i < 4 % n) for i in range(n)}, "samples": 4} for n in counts]
    done = {"commit": "c", "machine": "m"}
    series = {"eval/pass@1": [0.1, 0.2], "eval/distinct": [1.0, 1.0]}
    final = {"test/pass@1": 1.0, "test/response_length": 5.0, "actor/refreshes": 3.0}
    return Result(Job(task, variant, seed, ()), done, series, final, problems)


def test_all_tasks_together() -> None:
    """Ratios by task, over the seeds that both have; the mean only where a variant ran on every task."""
    study = Study(
        "s", {t: TaskSpec("w", "r") for t in ("one", "two")}, {"grpo": (), "a": (), "b": (), "c": ()}, (1, 2), "grpo"
    )
    results = [
        *(run(task, "grpo", seed, [1, 1, 2]) for task in ("one", "two") for seed in (1, 2)),
        *(run("one", "a", seed, [2, 2, 4]) for seed in (1, 2)),
        run("two", "a", 1, [4, 4, 4]),
        run("two", "b", 2, [1, 1, 2]),
        run("two", "c", 3, [4, 4, 4]),  # the baseline has no such seed
    ]
    page = markdown(study, [], results, [], "make study")
    section = page.split("### All tasks")[1].split("###")[0]
    rows = {line.split(" | ")[0][2:]: line for line in section.splitlines() if line.startswith("| ")}
    assert {"a", "b"} <= rows.keys() and "c" not in rows
    assert "| a | +0.0, 2.00x (2 seeds) | +0.0, 3.00x (1 seed) | 0.000 [0.000, 0.000] | 2.449 [" in rows["a"]
    assert rows["b"] == "| b |  | +0.0, 1.00x (1 seed) |  |  |"
    alone = Study("s", {"one": TaskSpec("w", "r")}, study.variants, (1, 2), "grpo")
    assert "### All tasks" not in markdown(alone, [], results, [], "make study")


def test_a_front_has_each_variant_where_its_numbers_are() -> None:
    points = {
        "grpo": (estimate(0.80, 0.02), estimate(2.0, 0.3)),
        "a < b": (estimate(0.79, 0.03), estimate(6.5, 0.8)),
        "worse": (estimate(0.40, 0.05), estimate(1.0, 0.1)),
    }
    root = ElementTree.fromstring(front_plot("study: task & more", points, {"grpo", "a < b"}, warm_up=(0.58, 11.4)))
    drawn = [circle for circle in root.iter(f"{SVG}circle") if circle.find(f"{SVG}title") is not None]
    x, y = ([float(circle.get(key, "nan")) for circle in drawn] for key in ("cx", "cy"))
    assert len(drawn) == 3 and x[2] < x[1] < x[0] and y[1] < y[0] < y[2]  # up is less in SVG
    # linear: differences of pixels are as those of values
    assert (x[0] - x[2]) / (x[0] - x[1]) == pytest.approx(0.40 / 0.01, rel=0.05)
    assert (y[0] - y[1]) / (y[2] - y[0]) == pytest.approx(4.5 / 1.0, rel=0.05)
    assert [circle.get("fill") == "white" for circle in drawn] == [False, False, True]
    assert "warm-up" in {text.text for text in root.iter(f"{SVG}text")}
    with pytest.raises(ValueError, match="no variant"):
        front_plot("t", {}, ())
