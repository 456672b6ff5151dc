"""Studies as data: what is shipped is valid, and what is wrong is said."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_vp2o.config.compose import compose
from megatron_vp2o.errors import ConfigError
from megatron_vp2o.study import runner
from megatron_vp2o.study.runner import DONE, LOCK, is_done, run_all
from megatron_vp2o.study.spec import FOLDER, WARM_UP, jobs, load_study, parse_study

GOOD = {
    "tasks": {"addends": {"warm_up": "addends_tiny_supervised", "recipe": "addends_tiny_grpo"}},
    "variants": {"grpo": [], "vp2o": ["algorithm=vp2o"]},
    "seeds": [1, 2],
    "baseline": "grpo",
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_runs_of_a_shipped_study_compose(path):
    """Every variant on the first task; on each other one the warm-up, the baseline and one variant more, drawn anew each time."""
    study = load_study(path.stem)
    found = jobs(study, Path("folder"))
    assert len(found) == len(study.tasks) * (1 + len(study.variants) * len(study.seeds))
    assert len({job.name for job in found}) == len({job.folder for job in found}) == len(found)
    composed = {}
    everywhere = {WARM_UP, study.baseline, random.choice(list(study.variants))}
    for job in found:
        if job.seed in (0, study.seeds[0]) and (job.task == next(iter(study.tasks)) or job.variant in everywhere):
            config = compose(job.arguments[1], list(job.arguments[2:]))
            assert config.run_dir == job.folder and (job.variant == WARM_UP or config.seed == job.seed)
            composed[job.name] = config
    assert composed


@pytest.mark.parametrize(
    ("change", "quoted"),
    [
        ({"baseline": "nobody"}, "baseline=nobody"),
        ({"seeds": [1, 1]}, "twice"),
        ({"seeds": []}, "seeds=[]"),
        ({"seeds": ["x"]}, "'x'"),
        ({"variants": {"grpo": [], "A b": []}}, "'A b'"),
        ({"variants": {"grpo": [], "warm_up": []}}, "warm_up"),
        ({"tasks": {"addends": {"recipe": "x"}}}, "needs warm_up and recipe"),
        ({"sedes": [1]}, "sedes is unknown"),
        ({"first": ["vpo"]}, "first=['vpo']"),
        ({"first": "grpo"}, "first='grpo'"),
        ({"first": [["grpo"]]}, "first=[['grpo']]"),
    ],
)
def test_what_is_wrong_is_said(change, quoted):
    with pytest.raises(ConfigError, match=r"study\.yaml") as error:
        parse_study("study", {**GOOD, **change}, "study.yaml")
    assert quoted in str(error.value)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_runs(seed):
    rng = random.Random(seed)
    names = [f"v{i}" for i in range(5)]
    first = rng.sample(names, rng.randint(0, 5))
    tasks = {task: GOOD["tasks"]["addends"] for task in ("one", "two", "three")}  # type: ignore[index]
    body = {"tasks": tasks, "variants": {name: [] for name in names}, "seeds": [3, 1], "baseline": "v0", "first": first}
    found = jobs(parse_study("s", body, "s"), Path("folder"))
    assert [job.task for job in found[:3]] == list(tasks) and all(job.variant == WARM_UP for job in found[:3])
    place = {(job.variant not in first, job.seed, job.task, job.variant): i for i, job in enumerate(found[3:])}
    order = {3: 0, 1: 1}
    wanted = sorted(place, key=lambda run: (run[0], order[run[1]], [*tasks].index(run[2]), names.index(run[3])))
    assert [place[run] for run in wanted] == [*range(3 * 2 * 5)]


def test_an_unknown_study_names_those_that_there_are():
    with pytest.raises(ConfigError, match=r"STUDY=nothing.*smoke"):
        load_study("nothing")


def test_a_changed_study_does_not_pass_for_the_old_one(tmp_path):
    first, second = (
        jobs(parse_study("s", {**GOOD, "overrides": overrides}, "s"), tmp_path)[0]
        for overrides in ([], ["optimizer.lr=1e-4"])
    )
    place = Path(first.folder)
    place.mkdir(parents=True)
    assert not is_done(first)
    (place / DONE).write_text(json.dumps({"arguments": list(first.arguments)}))
    assert is_done(first)
    with pytest.raises(ConfigError, match="other arguments"):
        is_done(second)


def hold(folder: Path, seconds: float) -> int:
    """A process that holds the study's lock for so long, as the runs of one that was killed do until they are gone."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.write(tell, b"x")
            time.sleep(seconds)
        os._exit(0)
    os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    return pid


def test_two_processes_do_not_run_one_study(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LOCK_WAIT_S", 0.5)
    pid = hold(tmp_path, 60)
    try:
        with pytest.raises(ConfigError, match="another process is running this study"):
            run_all([], tmp_path, slots=1)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_what_is_left_of_a_killed_study_is_waited_for(tmp_path):
    """Its runs end moments after it: whoever starts it again at once gets no error."""
    said: list[str] = []
    pid = hold(tmp_path, 1.0)
    assert run_all([], tmp_path, slots=1, say=said.append) == []
    assert os.waitpid(pid, os.WNOHANG)[0] in (0, pid) and len(said) == 2 and "just killed" in said[0]
