"""What a run does around its steps: what is due when, how it stops, goes on, and refuses to."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from megatron_vp2o.config.schema import CheckpointConfig, EvaluationConfig, GRPOConfig, TrainConfig
from megatron_vp2o.config.status import PREEMPTED
from megatron_vp2o.errors import CheckpointError, DeadRunError
from megatron_vp2o.parallel.groups import Groups
from megatron_vp2o.rl import stop
from megatron_vp2o.rl.loop import DATA, IDENTITIES, REFERENCE, Stopwatch, TrainingLoop, no_transform
from megatron_vp2o.rl.types import StepStats
from tests.rl.fakes import FakeCheckpointer, FakeSink, groups_of


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with groups_of() as made:
        yield made


@pytest.fixture(autouse=True)
def no_signal_came(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Signal handlers and the flag are the process's: put them back."""
    monkeypatch.setattr(stop, "_asked", False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


OUTCOMES = {
    "t": StepStats({}, 1.0, 0.1, skipped=False, tokens=7),  # taken
    "r": StepStats({}, 1.0, 0.1, skipped=False, tokens=7, rejected=True),
    "n": StepStats({}, float("nan"), 0.1, skipped=True, tokens=7),  # gradient not finite
    "e": StepStats({}, 0.0, 0.1, skipped=True, tokens=0),  # empty
}


class Loop(TrainingLoop):
    """Each step counts one of `outcomes`, a letter each; a `signals` step is sent a signal while it runs."""

    def __init__(
        self,
        groups: Groups,
        steps: int,
        outcomes: str = "t",
        *,
        evaluation: int = 0,
        checkpoint: int = 0,
        save_at_end: bool = False,
        signals: tuple[int, ...] = (),
        number: int = signal.SIGUSR1,
        **limits: int,
    ) -> None:
        config = TrainConfig(
            algorithm=GRPOConfig(steps=steps, **limits),  # type: ignore[arg-type]
            evaluation=EvaluationConfig(interval=evaluation),
            checkpoint=CheckpointConfig(interval=checkpoint, save_at_end=save_at_end),
        )
        self.log: list[str] = []
        self.sink_, self.saver = FakeSink(self.log), FakeCheckpointer(self.log)
        super().__init__(config, groups, self.sink_, self.saver)
        self.outcomes, self.signals, self.number = outcomes, signals, number

    def step(self, step: int, watch: Stopwatch) -> dict[str, float]:
        self.log.append(f"step {step}")
        if step in self.signals:
            os.kill(os.getpid(), self.number)
        self.count_update(OUTCOMES[self.outcomes[step % len(self.outcomes)]])
        self.progress.samples += 2
        return {"seen": float(step)}

    def evaluate(self, final: bool) -> dict[str, float]:
        self.log.append("evaluate, last" if final else "evaluate")
        return {"eval/found": 1.0}


def due(total: int, interval: int) -> list[int]:
    return list(range(interval, total + 1, interval)) if interval else []


@pytest.mark.parametrize("seed", range(12))
def test_evaluations_checkpoints_and_lines_come_when_they_are_due(groups: Groups, seed: int) -> None:
    random = Random(seed)
    total, evaluation, checkpoint = random.randrange(1, 14), random.randrange(6), random.randrange(6)
    save_at_end = random.random() < 0.5
    loop = Loop(groups, total, evaluation=evaluation, checkpoint=checkpoint, save_at_end=save_at_end)
    assert loop.run() == 0
    assert [step for step, _ in loop.sink_.lines] == list(range(total + 1))
    evaluated = [step for step, line in loop.sink_.lines if "eval/found" in line]
    assert evaluated == sorted({0, total, *due(total, evaluation)})
    assert [entry for entry in loop.log if "last" in entry] == ["evaluate, last"]
    saved = sorted({*due(total, checkpoint), *([total] if save_at_end else [])})
    assert list(loop.saver.saved) == saved
    for step, state in loop.saver.saved.items():
        assert (state["step"], state["samples"], state["tokens"]) == (step, 2 * step, 7 * step)
    for step, line in loop.sink_.lines[1:]:
        assert line["seen"] == step - 1 and line["samples"] == 2 * step and line["tokens"] == 7 * step
        assert line["time/elapsed_s"] >= line["time/step_s"] > 0
        # how long saving took is known only after the line of its own step was written
        assert ("time/checkpoint_s" in line) == (step - 1 in saved)
    expected = ["evaluate", "write 0"]
    for step in range(1, total + 1):
        expected.append(f"step {step - 1}")
        expected += ["evaluate, last"] if step == total else ["evaluate"] if step in evaluated else []
        expected.append(f"write {step}")  # before the checkpoint: a kill in between repeats the step and its line
        expected += [f"save {step}"] if step in saved else []
    assert loop.log == expected


def test_a_run_of_no_step_is_one_evaluation(groups: Groups) -> None:
    loop = Loop(groups, 0, evaluation=1, checkpoint=1, save_at_end=True)
    assert loop.run() == 0 and loop.log == ["evaluate, last", "write 0"]


@pytest.mark.parametrize("seed", range(8))
def test_a_signal_ends_the_run_with_a_checkpoint_and_it_goes_on(groups: Groups, seed: int) -> None:
    random = Random(seed)
    total = random.randrange(2, 12)
    at = random.randrange(total - 1)
    plan = {"evaluation": random.randrange(4), "checkpoint": random.randrange(4)}
    whole = Loop(groups, total, **plan)  # type: ignore[arg-type]
    assert whole.run() == 0
    number = random.choice([signal.SIGUSR1, signal.SIGTERM])
    first = Loop(groups, total, signals=(at,), number=number, **plan)  # type: ignore[arg-type]
    assert first.run() == PREEMPTED
    assert list(first.saver.saved)[-1] == at + 1 and first.log[-2:] == [f"write {at + 1}", f"save {at + 1}"]
    stop._asked = False  # another process
    second = Loop(groups, total, **plan)  # type: ignore[arg-type]
    second.restore(copy.deepcopy(first.saver.saved[at + 1]))
    assert second.run() == 0
    without_saves = [
        [entry for entry in log if not entry.startswith("save")] for log in (whole.log, first.log + second.log)
    ]
    assert without_saves[0] == without_saves[1]
    assert (second.progress.step, second.progress.tokens) == (total, 7 * total)
    assert second.progress.elapsed_s >= first.progress.elapsed_s > 0


def test_a_signal_in_the_last_step_changes_only_that_it_is_saved(groups: Groups) -> None:
    loop = Loop(groups, 3, signals=(2,))
    assert loop.run() == 0 and list(loop.saver.saved) == [3]


@pytest.mark.parametrize("seed", range(40))
def test_a_run_without_results_ends_when_its_limit_is_reached_and_saves_nothing_more(groups: Groups, seed: int) -> None:
    random = Random(seed)
    outcomes = "".join(random.choices("trne", weights=[1, 1, 3, 3], k=20))
    nonfinite, empty = random.randrange(1, 5), random.randrange(1, 5)

    def in_a_row(of: str, other: str, limit: int) -> int:
        """Steps up to the first row of so many; the other kind of skipped step neither counts nor breaks it."""
        for end in range(1, len(outcomes) + 1):
            if outcomes[:end].replace(other, "").endswith(of * limit):
                return end
        return len(outcomes) + 1

    ends = {"max_consecutive_nonfinite_steps": in_a_row("n", "e", nonfinite)}
    ends["max_consecutive_empty_steps"] = in_a_row("e", "n", empty)
    limits = dict(zip(ends, (nonfinite, empty), strict=True))
    loop = Loop(groups, len(outcomes), outcomes, checkpoint=1, **limits)  # type: ignore[arg-type]
    setting = min(ends, key=lambda name: ends[name])
    if ends[setting] > len(outcomes):
        assert loop.run() == 0
    else:
        match = (
            f"{limits[setting]} optimizer steps in a row, up to step {ends[setting]}, had .*{setting}={limits[setting]}"
        )
        with pytest.raises(DeadRunError, match=match):
            loop.run()
        assert loop.sink_.lines[-1][0] == ends[setting], "the record shows the end"
        assert list(loop.saver.saved) == list(range(1, ends[setting]))
    done = outcomes[: loop.progress.step]
    progress = loop.progress
    assert progress.optimizer_steps == done.count("t")
    assert progress.skipped == done.count("n") + done.count("e")
    assert progress.tokens == 7 * (len(done) - done.count("e"))


def test_a_resumed_run_knows_how_long_the_row_is(groups: Groups) -> None:
    first = Loop(groups, 2, "n", save_at_end=True, max_consecutive_nonfinite_steps=3)
    assert first.run() == 0
    second = Loop(groups, 9, "n", max_consecutive_nonfinite_steps=3)
    second.restore(first.saver.saved[2])
    with pytest.raises(DeadRunError, match="3 optimizer steps in a row, up to step 3"):
        second.run()


def test_data_and_reference_must_be_those_of_the_start(groups: Groups) -> None:
    first = Loop(groups, 1, save_at_end=True)
    first.identities = {DATA: "abc", REFERENCE: "123"}
    first.run()
    saved = first.saver.saved[1]
    assert saved["extra"][IDENTITIES] == {DATA: "abc", REFERENCE: "123"}
    for name, value, message in (
        (DATA, "other", "abc there, other here"),
        (REFERENCE, "9", "weights 123 there, 9 here"),
    ):
        second = Loop(groups, 2)
        second.identities = {DATA: "abc", REFERENCE: "123", name: value}
        with pytest.raises(CheckpointError, match=message):
            second.restore(copy.deepcopy(saved))
    second.identities = {DATA: "abc"}
    second.restore(copy.deepcopy(saved))
    # a checkpoint from before this identity was kept says nothing against it
    first.progress.extra[IDENTITIES] = {}
    second.restore(vars(first.progress).copy())
    assert second.progress.step == 1


@pytest.mark.parametrize("state", [{"step": 1, "invented": 2}, {"extra": 3}])
def test_another_programs_state_is_refused(groups: Groups, state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"another version of this program.*init_from"):
        Loop(groups, 2).restore(state)


def test_a_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    with watch("a"):
        pass
    first = watch.seconds["a"]
    with watch("a"), watch("b"):
        pass
    assert watch.seconds.keys() == {"a", "b"} and watch.seconds["a"] > first > 0
    assert no_transform().read() == {}
