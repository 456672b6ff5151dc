"""When a server is taken for dead: only by looks that were not answered, often enough and for long enough, or by its own word."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_vp2o.rollout.answers import BadAnswer
from megatron_vp2o.rollout.contract import SAMPLING, check_form
from megatron_vp2o.rollout.pulse import MISSES, Pulse
from tests.rollout.fakes import FakeHarness
from tests.rollout.test_pool import MANY, check_all, descendants, wait_for

QUICK_LOOKS = {"silence_s": 1.0, "look_s": 0.1, "request_timeout_s": 60.0, "sync_timeout_s": 60.0}
"""With these, only a look can find out in time that a server hangs."""


class Scripted:
    """Answers looks from a list, and lets a clock of its own run meanwhile."""

    def __init__(self, script: list[tuple[int, float]]) -> None:
        self.script, self.now = script, 0.0

    async def health(self, limit_s: float) -> int:
        status, seconds = self.script.pop(0)
        self.now += seconds
        return status


@pytest.mark.parametrize("seed", range(30))
def test_a_row_of_misses(seed: int) -> None:
    """Against the history of all looks, judged at once."""
    rng = random.Random(seed)
    script = [(rng.choice([200, 0, -1, -1, -1, 502]), rng.uniform(0, 5)) for _ in range(60)]
    server, silence = Scripted(list(script)), rng.choice([0.5, 8.0, 20.0])
    pulse = Pulse(lambda: server, silence, clock=lambda: server.now)
    history: list[tuple[float, float, int]] = []
    verdicts = set()
    for status, _ in script:
        began = server.now
        why = asyncio.run(pulse.look())
        history.append((began, server.now, status))
        row: list[tuple[float, float, int]] = []
        for look in reversed(history):
            if look[2] == 200:
                break
            row.insert(0, look)
        dead = any(  # dead once, dead until it answers
            row[last][1] - row[0][0] >= (min(5.0, silence) if all(look[2] < 0 for look in row[: last + 1]) else silence)
            for last in range(MISSES - 1, len(row))
        )
        assert bool(why) == dead, (history, why)
        verdicts.add(dead)
        server.now += rng.uniform(0, 3)
    assert len(verdicts) == 2 or silence > 8, "both happened"


def test_a_trainer_that_was_stopped_has_looked_once() -> None:
    """An hour passes within one look; that is one miss."""
    server = Scripted([(0, 3600.0), (0, 1.0), (200, 0.0)])
    pulse = Pulse(lambda: server, 30.0, clock=lambda: server.now)
    assert [asyncio.run(pulse.look()) for _ in range(3)] == ["", "", ""]


def test_work_is_given_up_when_its_server_is_dead() -> None:
    async def go(script: list[tuple[int, float]], seconds: float) -> tuple[str, bool]:
        server, ended = Scripted(script), False

        async def work() -> str:
            nonlocal ended
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                ended = True
                raise
            return "done"

        pulse = Pulse(lambda: server, 1.0, every_s=0.01, clock=lambda: server.now)
        try:
            return await pulse.while_it_lives(work()), ended
        except BadAnswer as error:
            return str(error), ended

    assert asyncio.run(go([(200, 0.0)] * 10000, 0.2)) == ("done", False)
    said, ended = asyncio.run(go([(200, 0.0), (503, 0.0)], 60.0))
    assert "its engine is dead" in said and ended
    said, ended = asyncio.run(go([(200, 0.0), *[(0, 0.4)] * 3], 60.0))
    assert "3 looks at its health in a row were not answered" in said and ended


@pytest.mark.parametrize(
    ("moment", "kind"),
    [
        ("generating", "hangs"),
        ("syncing", "hangs"),
        ("generating", "engine_dead"),
        ("idle", "engine_dead"),
        ("syncing", "engine_dead"),
    ],
)
def test_a_server_that_stays_and_does_not_answer(tmp_path: Path, moment: str, kind: str) -> None:
    """Its front process is there, with requests in flight or without, and no time limit of a request is near: it is replaced within
    seconds, and holds the present weights."""
    harness = FakeHarness(tmp_path, settings=QUICK_LOOKS)
    pool = harness.engine

    def strike() -> None:
        if kind == "hangs":
            guard = harness.processes[0]._guard
            assert guard is not None
            os.kill(descendants(guard.pid)[0], signal.SIGSTOP)
        else:
            harness.arm(0, "engine_dead", always=True)

    try:
        pool.update_weights(harness.weights(0), 1, harness.probe(0))
        start = time.monotonic()
        if moment == "generating":
            harness.arm(0, "slow", always=True)
            thread = threading.Timer(0.5, strike)
            thread.start()
            check_all(harness)
            thread.join()
        else:
            strike()
            if moment == "idle":
                wait_for(lambda: pool.restarts == 1, 20)
            else:
                pool.update_weights(harness.weights(1), 2, harness.probe(1))
        check_all(harness)
        assert pool.restarts == 1 and time.monotonic() - start < 25
        assert harness.processes[0].starts == 2
    finally:
        pool.close()


def test_a_server_that_is_busy_is_left_alone(tmp_path: Path) -> None:
    """Each answer takes four times as long as a server may be silent."""
    harness = FakeHarness(tmp_path, settings=QUICK_LOOKS)
    try:
        harness.engine.update_weights(harness.weights(0), 1, harness.probe(0))
        harness.arm(0, "slow", always=True)
        start = time.monotonic()
        rollouts = harness.engine.generate(MANY, range(len(MANY)), SAMPLING, group_size=2)
        assert time.monotonic() - start > 3.5
        check_form(rollouts, [prompt for prompt in MANY for _ in range(2)], SAMPLING, harness)
        assert harness.engine.restarts == 0 and harness.processes[0].starts == 1
    finally:
        harness.engine.close()
