"""Generation beside training, by pools of fake servers and in whole runs.

A run of one process with three batches ahead is killed once; with VP2O_OVERLAP_KILLS so often (`make soak`: 5), and runs of two
processes with one batch ahead as well, and a run is asked to stop. VP2O_ROLLOUT_SEED (0) draws the moments.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_vp2o.errors import RolloutError
from megatron_vp2o.rollout.contract import SAMPLING
from megatron_vp2o.tracking.record import read
from tests.rollout.ahead_job import HAPPENS
from tests.rollout.fakes import FakeHarness
from tests.rollout.whole_runs import ENVIRONMENT, ROOT, answers, command, servers, train
from tests.test_end_to_end import without_times

SEED = int(os.environ.get("VP2O_ROLLOUT_SEED", "0"))
KILLS = int(os.environ.get("VP2O_OVERLAP_KILLS", "1"))
LONG = [pytest.mark.slow, pytest.mark.skipif("VP2O_OVERLAP_KILLS" not in os.environ, reason="make soak runs it")]


def batches(count: int) -> list[list[list[int]]]:
    return [[[2 + (7 * batch + n) % 22, 2 + n] for n in range(6 + batch)] for batch in range(count)]


def test_batches_come_one_after_another_and_are_what_they_would_be(tmp_path: Path) -> None:
    """Whatever order they are waited for in, and although a server dies meanwhile."""
    harness = FakeHarness(tmp_path, servers=2, fixed=True)
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    prompts = batches(3)
    alone = [pool.generate(batch, range(len(batch)), SAMPLING, 3) for batch in prompts]
    harness.arm(1, "die_generating", after=5)
    begun = [pool.begin(batch, range(len(batch)), SAMPLING, 3) for batch in prompts]
    together = dict(zip((2, 0, 1), (begun[n].result() for n in (2, 0, 1)), strict=True))
    for number, rollouts in enumerate(alone):
        assert torch.equal(rollouts.tokens_NS, together[number].tokens_NS)
        assert torch.equal(rollouts.logprobs_NS, together[number].logprobs_NS)
    spans = [(one.started_at, one.ended_at) for one in begun]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    limit = time.monotonic() + 30
    while pool.restarts < 1 and time.monotonic() < limit:  # the other server may answer everything meanwhile
        time.sleep(0.05)
    assert pool.restarts == 1
    pool.close()


def test_a_pool_that_is_closed_leaves_no_request_and_no_thread(tmp_path: Path) -> None:
    harness = FakeHarness(tmp_path, settings={"request_timeout_s": 30.0})
    pool = harness.engine
    pool.update_weights(harness.weights(0), 1, harness.probe(0))
    harness.arm(0, "slow", always=True)
    before = {thread for thread in threading.enumerate() if thread.name == "rollout-pool"}
    begun = [pool.begin(batch, range(len(batch)), SAMPLING, 3) for batch in batches(2)]
    time.sleep(0.5)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 3.5, "it waited for answers (4 s)"
    assert all(one.future.cancelled() for one in begun)
    after = {thread for thread in threading.enumerate() if thread.name == "rollout-pool"}
    assert not after & before and not any(process.running for process in harness.processes)
    with pytest.raises(RolloutError, match="closed"):
        pool.begin([[5]], [0], SAMPLING, 1)


@pytest.mark.distributed
def test_a_failure_in_either_thread_ends_both_ranks_with_its_reason(tmp_path: Path) -> None:
    job = [sys.executable, "-m", "tests.rollout.ahead_job", str(tmp_path)]
    done = subprocess.run(job, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    told = {what: rest for what, *rest in map(json.loads, done.stdout.splitlines())}
    assert tuple(told) == HAPPENS
    for what, (statuses, seconds, said) in told.items():
        assert all(statuses) and seconds < 25, (what, statuses, seconds, said)
    (_, _, said) = told["no server answers"]
    assert all("1 of 1 prompts have no rollouts, because time is up after 1 s" in text for text in said), said
    (_, _, said) = told["its pool has a bug"]
    assert "Traceback" in said[1] and "ZeroDivisionError: in the pool's thread" in said[1], said
    assert "rank 1 failed: ZeroDivisionError" in said[0], said
    (_, _, said) = told["training fails"]
    assert "KeyError: 'in the main thread'" in said[1] and "rank 1 failed: KeyError" in said[0], said


STEPS = 5


def kill_after(process: psutil.Popen, run_dir: Path, lines: int, seconds: float) -> bool:
    """kill -9 of all its processes so many seconds after so many lines of the record. Returns whether it still ran."""
    record = run_dir / "metrics.jsonl"
    while process.poll() is None and not (record.exists() and record.read_text().count("\n") >= lines):
        time.sleep(0.02)
    time.sleep(seconds)
    running = process.poll() is None
    for one in [*process.children(recursive=True), process] if running else []:
        one.kill()
    process.wait()
    return running


@pytest.mark.timeout(400 + 300 * KILLS)
@pytest.mark.parametrize(
    ("ranks", "ahead"), [(1, 3), *(pytest.param(2, ahead, marks=[*LONG, pytest.mark.distributed]) for ahead in (1, 3))]
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path, ranks: int, ahead: int) -> None:
    """At any moment, with evaluations and checkpoints between the steps. What is on disk is not generated again, also where other
    weights had generated it than the checkpoint has."""
    more = [
        f"rollout.ahead={ahead}",
        "algorithm=vp2o",
        "algorithm.trust_region.delta=0.5",
        f"algorithm.budget.max_age={1 if ahead > 1 else 2}",  # batches of several weights are queued, or of one
        f"algorithm.steps={STEPS}",
    ]
    rng = random.Random(SEED)
    with servers(0.05) as urls:
        whole = tmp_path / "whole"
        train(whole, urls, *more, ranks=ranks)
        wanted = _timeless(whole)
        assert wanted[1]["overlap/age"] == 0 and max(_ages(wanted)) >= ahead
        asked = int(answers(urls[0], "/served"))
        for number in range(KILLS):
            run_dir = tmp_path / f"killed{number}"
            lines, seconds = rng.randrange(2, STEPS), rng.random()
            told = f"seed {SEED}, {ranks} ranks, {ahead} ahead: killed {seconds:.2f} s after line {lines}"
            with (tmp_path / "output").open("wb") as output:
                started = psutil.Popen(
                    command(run_dir, urls, *more, ranks=ranks), cwd=ROOT, env=ENVIRONMENT, stdout=output, stderr=output
                )
                running = kill_after(started, run_dir, lines, seconds)
            said = train(run_dir, urls, *more, "resume=auto", ranks=ranks)
            assert _timeless(run_dir) == wanted, told
            print(
                f"{told}{'' if running else ' (it had ended)'}: {said.count('are taken from')} batches taken",
                flush=True,
            )
        again = int(answers(urls[0], "/served")) - asked
    assert again >= asked * KILLS and again - asked * KILLS <= KILLS * 2 * 4 * 4


def _ages(lines: list[dict[str, Any]]) -> list[float]:
    return [line["overlap/age"] for line in lines if line["overlap/age"] is not None]


def _timeless(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of a record without what depends on how fast things were; a step that was repeated has two equal lines."""
    by_step: dict[int, dict[str, Any]] = {}
    for line in without_times(run_dir):
        kept = {key: value for key, value in line.items() if not (key.startswith("overlap/") and key.endswith("_s"))}
        assert by_step.setdefault(line["step"], kept) == kept
    return list(by_step.values())


@LONG[0]
@LONG[1]
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_run_whose_responses_go_on_with_new_weights(tmp_path: Path, ranks: int) -> None:
    """It is killed once. Which tokens are whose depends on how fast things are; what is trained on, and how often, does not."""
    more = [
        *("algorithm=vp2o", "algorithm.trust_region.delta=0.5", "algorithm.steps=8", "algorithm.budget.max_age=1"),
        *("rollout.ahead=2", "rollout.in_flight_updates=true", "algorithm.mismatch.correction=tis"),
        *("rollout.sampling.max_new_tokens=24", "algorithm.mismatch.high=1e9"),
    ]
    rng = random.Random(SEED)
    with servers(token_s=0.03) as urls:
        run_dir = tmp_path / "run"
        started = psutil.Popen(command(run_dir, urls, *more, ranks=ranks), cwd=ROOT, env=ENVIRONMENT)
        assert kill_after(started, run_dir, rng.randrange(3, 7), rng.random()), "it had ended"
        train(run_dir, urls, *more, "resume=auto", ranks=ranks)
    record = read(run_dir)
    assert record["step"][-1] == 8 and record["samples"][-1] == 8 * 4 * 2
    mixed = [value for value in record["overlap/mixed"] if value is not None]
    print(
        f"seed {SEED}: mixed {mixed}, ages {record['overlap/age']}, of tokens {record['overlap/token_age']}", flush=True
    )
    assert max(mixed) > 0, "no response had tokens of several weights"
    pairs = zip(record["overlap/age"], record["overlap/token_age"], strict=True)
    assert all(0 <= float(young) <= float(age) for age, young in pairs if age is not None and young is not None)
    assert record["overlap/again"][-1] in (0, 4 * 2, 2 * 4 * 2)


@LONG[0]
@LONG[1]
def test_a_run_that_is_asked_to_stop_leaves_nothing_and_goes_on(tmp_path: Path) -> None:
    """SIGTERM while servers generate."""
    more = ["algorithm=grpo", "algorithm.steps=6"]
    with servers(0.5) as urls:
        train(tmp_path / "whole", urls, *more)
        run_dir = tmp_path / "stopped"
        run = psutil.Popen(command(run_dir, urls, *more), cwd=ROOT, env=ENVIRONMENT)
        record = run_dir / "metrics.jsonl"
        while not (record.exists() and record.read_text().count("\n") >= 3):
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 75
        train(run_dir, urls, *more, "resume=must")
    assert _timeless(run_dir) == _timeless(tmp_path / "whole")
    assert read(run_dir)["overlap/queued"][-1] == 0


@LONG[0]
@LONG[1]
def test_a_replay_of_such_a_run_updates_bit_for_bit(tmp_path: Path) -> None:
    """The embedded engine may look ahead then: nothing is generated."""
    more = [
        "algorithm=vp2o",
        "algorithm.trust_region.delta=0.5",
        "algorithm.steps=4",
        "algorithm.mismatch.measure=true",
    ]
    with servers() as urls:
        train(tmp_path / "stored", urls, *more)
    replayed = ["rollout=in_process", "rollout.ahead=1", f"rollout.replay={tmp_path}/stored/rollouts"]
    train(tmp_path / "replayed", [], *more, *replayed)
    assert _timeless(tmp_path / "replayed") == _timeless(tmp_path / "stored")
