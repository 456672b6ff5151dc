"""The pool: every answer that does no harm gets its grade, whatever the others do to their workers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.errors import RewardError
from megatron_vp2o.rewards.grade import CRASH, MEMORY, TIME, Grade
from megatron_vp2o.rewards.pool import Item, WorkerPool

OWN = Path(__file__).parent / "own_rewards.py"
REASONS = {"hang": TIME, "spin": TIME, "abort": CRASH, "exit": CRASH, "allocate": MEMORY}


def make_pool(
    function: str, *, workers: int = 2, timeout_s: float = 1.0, batch: int = 8, memory_mib: int = 512
) -> WorkerPool:
    config = RewardConfig(path=f"{OWN}:{function}", workers=workers, memory_mib=memory_mib)
    return WorkerPool(config, {"own": timeout_s}, {"own": batch})


def item(number: int, response: str, answer: str = "right", **row: object) -> Item:
    return Item(number, "own", "a prompt", response, {"answer": answer, **row})


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids: list[int], seconds: float = 20.0) -> list[int]:
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left


@pytest.mark.smoke
def test_each_bad_answer_costs_itself_only() -> None:
    draw = random.Random(7)
    responses = [draw.choice(["right", "wrong"]) for _ in range(200)]
    bad = {draw.randrange(200): reason for reason in REASONS}
    for number, response in bad.items():
        responses[number] = response
    with make_pool("misbehaving") as pool:
        grades = dict(pool.grade(item(n, response) for n, response in enumerate(responses)))
        counts = pool.counts
    assert grades.keys() == set(range(200))
    for number, response in enumerate(responses):
        if number in bad:
            assert (grades[number].reward, grades[number].reason) == (0.0, REASONS[response])
        else:
            assert grades[number].reward == float(response == "right")
    assert counts.timed_out == sum(reason in ("hang", "spin") for reason in bad.values())
    assert counts.crashed == sum(reason in ("abort", "exit") for reason in bad.values())


def kill_again_and_again(pool: WorkerPool, stop: threading.Event, killed: list[int]) -> None:
    """One worker after another, but none whose answer has lost a worker before: the second loss says that the answer is bad."""
    while not stop.wait(0.15):
        for worker in list(pool._workers)[:1]:
            fresh = all(task.lost == 0 for task in list(worker.tasks))
            if worker.pid is not None and worker.pid not in killed and fresh:
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)


def test_workers_that_are_killed_in_mid_batch_lose_nothing() -> None:
    stop, killed = threading.Event(), list[int]()
    with make_pool("slow", batch=4, timeout_s=20.0) as pool:
        killer = threading.Thread(target=kill_again_and_again, args=(pool, stop, killed))
        killer.start()
        grades = dict(pool.grade(item(n, "right", answer=("right", "x")[n % 2]) for n in range(120)))
        stop.set()
        killer.join()
    assert len(killed) >= 3
    assert grades == {n: Grade(float(n % 2 == 0)) for n in range(120)}


def test_the_nursery_killed_in_mid_batch_loses_nothing() -> None:
    with make_pool("slow", batch=4, timeout_s=20.0) as pool:
        grades: dict[int, Grade] = {}
        first = pool._nursery
        assert first is not None
        for number, grade in pool.grade(item(n, "right") for n in range(40)):
            grades[number] = grade
            if len(grades) == 8:
                first.kill()
        assert pool._nursery is not first
    assert grades == {n: Grade(1.0) for n in range(40)}


def test_input_is_taken_as_workers_become_free() -> None:
    taken = 0

    def source() -> Iterator[Item]:
        nonlocal taken
        for n in range(2000):
            taken = n
            yield item(n, "right")

    with make_pool("equal") as pool:
        results = pool.grade(source())
        for _ in range(10):
            next(results)
        time.sleep(0.3)
        next(results)
        assert taken < 600  # of 2000: two workers with a batch each, and what waits for them
        results.close()
        assert dict(pool.grade([item(0, "right")])) == {0: Grade(1.0)}  # nothing of the call before is left


def test_a_caller_that_stops_to_do_something_else_makes_nobody_late() -> None:
    with make_pool("slow", batch=1, timeout_s=1.5) as pool:
        results = pool.grade(item(n, "right") for n in range(30))
        seen = [next(results) for _ in range(3)]
        time.sleep(2.5)  # longer than the limit
        seen += results
        assert [grade.reward for _, grade in seen] == [1.0] * 30
        assert pool.counts.timed_out == 0


def test_a_busy_machine_makes_no_answer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that compute for 0.3 s each, under a limit of 0.6 s, on a processor that they share with two others, and with what
    else runs beside the tests: so the last limit, which goes by the clock, is far away."""
    monkeypatch.setattr("megatron_vp2o.rewards.pool.PATIENCE", 200.0)
    cpu = min(os.sched_getaffinity(0))
    burn = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"]
    others = [subprocess.Popen(burn) for _ in range(2)]
    try:
        with make_pool("computes", batch=1, timeout_s=0.6) as pool:
            for pid in pool.worker_pids:
                os.sched_setaffinity(pid, {cpu})
            grades = dict(pool.grade(item(n, "right") for n in range(4)))
            assert pool.counts.timed_out == 0
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert grades == {n: Grade(1.0) for n in range(4)}


def test_an_answer_that_comes_while_the_pool_looks_at_its_worker_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool was kept from the processor between its look for answers and its look at a late worker."""

    def late_look(pid: int) -> tuple[str, float]:
        time.sleep(1.0)
        return "S", 0.0

    monkeypatch.setattr("megatron_vp2o.rewards.pool.process_state", late_look)
    with make_pool("computes", batch=1, timeout_s=0.1, workers=1) as pool:
        assert dict(pool.grade([item(0, "right")])) == {0: Grade(1.0)}


def test_no_process_is_left_when_the_pool_is_closed() -> None:
    with make_pool("misbehaving", timeout_s=100.0, batch=1) as pool:
        assert pool._nursery is not None
        results = pool.grade([item(0, "right"), item(1, "hang"), item(2, "spin")])
        next(results)
        pids = [pool._nursery.pid, *pool.worker_pids]
        assert len(pids) >= 2 and all(map(alive, pids))
    assert wait_until_gone(pids) == []


PARENT = """
import sys
from megatron_vp2o.config.reward import RewardConfig
from megatron_vp2o.rewards.pool import Item, WorkerPool
pool = WorkerPool(RewardConfig(path=sys.argv[1] + ":misbehaving", workers=2), {"own": 100.0}, {"own": 1})
results = pool.grade(Item(n, "own", "", response, {"answer": ""}) for n, response in enumerate(["", "hang", "spin"]))
next(results)
print(pool._nursery.pid, *pool.worker_pids, flush=True)
next(results)
"""


def test_no_process_is_left_when_the_parent_is_killed() -> None:
    """SIGKILL, with one worker asleep and one spinning."""
    with subprocess.Popen([sys.executable, "-c", PARENT, str(OWN)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) >= 2 and all(map(alive, pids))
        parent.kill()
    assert wait_until_gone(pids) == []


def test_a_pool_does_not_follow_into_a_forked_process() -> None:
    with make_pool("equal", workers=1) as pool:
        child = os.fork()
        if child == 0:
            try:
                list(pool.grade([item(0, "right")]))
            except RuntimeError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert dict(pool.grade([item(0, "right")])) == {0: Grade(1.0)}


@pytest.mark.parametrize("numbers", [[0], [9], [4, 5]])
def test_a_function_that_raises_is_an_error_that_names_the_row(numbers: list[int]) -> None:
    responses = ["raise" if n in numbers else "right" for n in range(10)]
    items = [item(n, response, __source__=f"rows.jsonl:{n + 1}") for n, response in enumerate(responses)]
    with make_pool("misbehaving", workers=1, batch=10) as pool:
        with pytest.raises(RewardError, match=rf"rows\.jsonl:{numbers[0] + 1} .*KeyError: 'boo' .*own_rewards\.py:\d+"):
            list(pool.grade(items))
        assert dict(pool.grade([item(0, "right")])) == {0: Grade(1.0)}  # and the pool goes on


def test_what_is_no_reward_is_an_error() -> None:
    wrong = {
        "not a list": None,
        "2 results for 1 responses": [1.0, 2.0],
        "not finite": [float("nan")],
        "is no reward": ["good"],
        "needs `reward`": [{"score": 1}],
        "canonical": [{"reward": 1, "canonical": {1: 2}}],
    }
    with make_pool("returns", workers=1) as pool:
        for message, returned in wrong.items():
            with pytest.raises(RewardError, match=message):
                list(pool.grade([item(0, "x", returns=returned)]))


def test_results_carry_everything() -> None:
    with make_pool("with_reasons", workers=1) as pool:
        ((_, grade),) = pool.grade([item(0, "four")])
    assert grade == Grade(4.0, "8 characters", ("a", 1), True, {"x": 2.0})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_file.py:f", "no file"),
        (f"{OWN}:equals", "no function equals; it has .*equal"),
        ("no_such_module_at_all:f", "importing no_such_module_at_all raises ModuleNotFoundError"),
    ],
)
def test_a_function_that_is_not_there_is_found_at_the_start(path: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        WorkerPool(RewardConfig(path=path, workers=1), {"own": 1.0}, {"own": 1})


def test_workers_import_no_torch() -> None:
    code = (
        "import sys, megatron_vp2o.rewards.worker\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
