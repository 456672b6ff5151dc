"""Reading run folders, and what the record says of a run's health."""

import math
import re

import pytest

from megatron_vp2o.config.schema import Algorithm
from megatron_vp2o.report.health import Level, findings
from megatron_vp2o.tracking.record import RecordError
from megatron_vp2o.tracking.runs import load_run, load_runs, measures, short_names
from tests.tracking.synthetic import reinforcement_rows, supervised_rows, write_run


@pytest.fixture(scope="module")
def rows():
    return reinforcement_rows(60, 5, collapse=0.3)


def test_a_run_is_read_with_its_configuration(tmp_path, rows):
    run = load_run(write_run(tmp_path / "folder", rows, name="its name"))
    assert run.name == "its name"
    assert run.setting("model", "num_moe_experts") == 16
    assert run.setting("model", "unheard_of") is None and run.setting("seed", "deeper") is None
    assert run.versions["torch"] == "2.13.0"
    assert run.steps == 60 and not run.supervised
    assert [run.at("step", row) for row in run.evaluations()] == [0, 10, 20, 30, 40, 50, 60]


def test_a_run_needs_no_configuration(tmp_path, rows):
    folder = write_run(tmp_path / "folder", rows)
    (folder / "config.yaml").unlink()
    run = load_run(folder)
    assert (run.name, run.config, run.versions) == ("folder", {}, {})


@pytest.mark.parametrize("text", ["a: [1", "just text", "config: 3", "\0"])
def test_a_damaged_configuration_is_one_clear_error(tmp_path, rows, text):
    folder = write_run(tmp_path / "folder", rows)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(RecordError, match=r"config\.yaml is not"):
        load_run(folder)


def test_points_join_two_columns_and_break_at_nan(tmp_path):
    base = [{"step": s, "samples": 2 * s, "reward/mean": None if s == 0 else s / 10} for s in range(4)]
    base[2]["reward/mean"] = math.nan
    run = load_run(write_run(tmp_path / "run", base))
    assert run.points("samples", "reward/mean") == [(2.0, 0.1), (4.0, None), (6.0, 0.3)]
    assert run.points("samples", "unheard/of") == []
    assert run.values("reward/mean") == [0.1, 0.3]


def test_the_best_evaluation_is_the_earliest_of_equals(tmp_path):
    accuracy = [0.1, 0.5, 0.4, 0.5]
    run = load_run(write_run(tmp_path / "r", [{"step": s, "eval/greedy_accuracy": a} for s, a in enumerate(accuracy)]))
    assert run.best_evaluation() == 1


def test_measures_follow_what_was_evaluated(tmp_path, rows):
    one = load_run(write_run(tmp_path / "a", reinforcement_rows(2, 1, pass_at=(8, 1)), pass_at=(8, 1)))
    other = load_run(write_run(tmp_path / "b", rows))
    keys = [measure.key for measure in measures([one, other])]
    assert keys[:5] == ["greedy_accuracy", "pass@1", "pass@4", "pass@8", "pass@16"]


def test_equal_names_become_folders(tmp_path, rows):
    folders = [write_run(tmp_path / name, rows, name="same") for name in "ab"]
    assert [run.name for run in load_runs(folders)] == list(map(str, folders))


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["tiny_grpo", "tiny_vp2o"], ["grpo", "vp2o"]),
        (["a_grpo", "a_grpo_long"], ["grpo", "grpo_long"]),
        (["one"], ["one"]),
        (["a_", "a_b"], ["a_", "a_b"]),
        (["x", "y"], ["x", "y"]),
        (["runs/a-1", "runs/a-2"], ["1", "2"]),
    ],
)
def test_short_names(names, short):
    assert short_names(names) == short


def titles(run, level):
    return [finding.title for finding in findings(run) if finding.level is level]


def test_a_good_run_passes_every_check(tmp_path, rows):
    run = load_run(write_run(tmp_path / "run", rows))
    assert titles(run, Level.warning) == titles(run, Level.note) == []
    assert len(titles(run, Level.good)) == 12


def test_a_supervised_run_has_no_rollout_checks(tmp_path):
    run = load_run(write_run(tmp_path / "run", supervised_rows(100, 1), Algorithm.supervised))
    assert titles(run, Level.warning) == titles(run, Level.note) == []
    assert "Log-probabilities agree" not in titles(run, Level.good)


def from_step(step, **values):
    named = {key.replace("__", "/"): value for key, value in values.items()}
    return lambda row: row | (named if row["step"] >= step else {})


TROUBLES = {
    "NaN or infinity": (
        Level.warning,
        from_step(60, policy__loss=math.inf),
        "policy/loss, at 1 step; first at step 60",
    ),
    "Optimizer steps were skipped": (Level.warning, from_step(30, optimizer__skipped=2), "2 refused"),
    "Log-probabilities disagree": (
        Level.warning,
        from_step(60, policy__logprob_mismatch=3e-4),
        r"3\.0e-4 nats \(step 60\); the bound is 1\.0e-5",
    ),
    "Gradient spikes": (Level.note, from_step(60, optimizer__grad_norm=1e3), "Largest norm 1,000"),
    "Far off-policy": (Level.note, from_step(60, policy__clip_fraction=0.5), r"50\.0%"),
    "Little left to learn from": (
        Level.note,
        from_step(50, rollout__groups_kept=1, rollout__groups_filtered=31),
        r"3\.1% of the groups",
    ),
    "Many responses are cut": (Level.note, from_step(50, rollout__truncated=0.5), r"50\.0% of the responses"),
    "Entropy collapsed": (Level.note, from_step(50, policy__entropy=0.01), r"to 0\.0100 nats"),
    "Answers lost diversity": (Level.note, from_step(60, eval__coverage=0.1), r"to 10\.0%"),
    "Fell back from its best": (Level.note, from_step(60, eval__greedy_accuracy=0.2), r"last 20\.0%"),
}


@pytest.mark.parametrize("title", TROUBLES)
def test_trouble_is_found_and_nothing_else(tmp_path, rows, title):
    level, change, detail = TROUBLES[title]
    run = load_run(write_run(tmp_path / "run", rows, change=change))
    (found,) = [finding for finding in findings(run) if finding.level is not Level.good]
    assert (found.level, found.title) == (level, title)
    assert re.search(detail, found.detail)


def test_an_unfinished_run_is_noted(tmp_path, rows):
    run = load_run(write_run(tmp_path / "run", rows[:40], steps=60))
    assert titles(run, Level.note) == ["Not at its end"]


def test_missing_steps_are_found(tmp_path, rows):
    run = load_run(write_run(tmp_path / "run", [*rows[:20], *rows[25:]]))
    assert titles(run, Level.warning) == ["Steps are missing"]


def test_bfloat16_may_differ_more(tmp_path, rows):
    folder = write_run(tmp_path / "run", rows, change=from_step(1, policy__logprob_mismatch=0.02))
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("fp32", "bf16"))
    assert "Log-probabilities agree" in titles(load_run(folder), Level.good)
