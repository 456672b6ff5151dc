"""Each race of a pool's bookkeeping by hand: no server, no clock, every step in the order that a test names."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import httpx
import pytest
import torch.distributed as dist

from megatron_vp2o.errors import RolloutError
from megatron_vp2o.rollout.answers import BadAnswer, OtherWeights, Sample
from megatron_vp2o.rollout.batch import Batch
from megatron_vp2o.rollout.board import Board, News
from megatron_vp2o.rollout.members import STRIKES, Member, State


def begun(member: Member) -> int:
    life = member.begin()
    assert life is not None
    return life


def test_requests_that_break_together_are_one_failure() -> None:
    member = Member("a")
    lives = [begun(member) for _ in range(64)]
    for life in lives:
        member.failed(life, blame=True)
    assert member.strikes == 1 and member.life == 1 and member.state is State.troubled
    assert member.begin() is None and not member.open.is_set() and member.trouble.is_set()


@pytest.mark.parametrize("mend", ["mended", "renewed", "admitted"])
def test_a_late_failure_says_nothing_of_a_server_that_is_back(mend: str) -> None:
    """A request of before the restart times out after it."""
    member = Member("a")
    late, first = begun(member), begun(member)
    member.failed(first, blame=False)
    {
        "mended": lambda: member.mended(trial=False),
        "renewed": member.renew,
        "admitted": lambda: member.admit(trial=False),
    }[mend]()
    member.failed(late, blame=True)
    assert member.state is State.ready and member.strikes == 0 and not member.trouble.is_set()


def test_a_late_success_does_not_acquit() -> None:
    """It was sampled before the server went bad."""
    member = Member("a")
    late, first = begun(member), begun(member)
    member.failed(first, blame=True)
    member.succeeded(late)
    assert member.strikes == 1 and member.state is State.troubled
    member.admit(trial=True)
    member.succeeded(late)
    assert member.state is State.trial and member.strikes == 1


def test_one_prompt_is_the_trial() -> None:
    member = Member("a")
    member.failed(begun(member), blame=True)
    member.admit(trial=True)
    life = begun(member)
    assert member.begin() is None and not member.open.is_set()
    member.withdrawn(life)  # the batch was over: the next one may try
    life = begun(member)
    member.succeeded(life)
    assert member.state is State.ready and member.strikes == 0 and member.open.is_set()


def test_strikes_are_counted_over_trials_and_end_with_a_good_answer() -> None:
    member = Member("a")
    for strikes in range(1, STRIKES + 1):
        member.failed(begun(member), blame=True)
        assert member.strikes == strikes
        member.admit(trial=True)
    member.succeeded(begun(member))
    assert member.strikes == 0


def test_a_lost_server_wakes_who_waits_and_stays_lost() -> None:
    member = Member("a")
    life = begun(member)
    member.failed(life, blame=False)
    member.lose("why")
    assert member.open.is_set() and not member.trouble.is_set() and member.begin() is None
    member.failed(member.life, blame=True)
    assert member.state is State.lost and member.strikes == 0
    member.renew()
    assert begun(member) > life and member.lost == ""


SAMPLE = Sample([1], [-1.0], True)


def run_batch(members: Sequence[Member], ask: object, prompts: int = 8, **more: int) -> list[list[Sample]]:
    async def go() -> list[list[Sample]]:
        batch = Batch([[n] for n in range(prompts)], members, ask, **({"attempts": 8, "in_flight": 64} | more))  # type: ignore[arg-type]
        return await batch.run(5.0)

    return asyncio.run(go())


def test_a_small_batch_is_shared() -> None:
    """Fewer prompts than a server may have in flight: each server gets its part, and not the first all of them."""
    members, asked = [Member("a"), Member("b"), Member("c")], Counter[str]()

    async def ask(member: Member, prompt: Sequence[int]) -> list[Sample]:
        asked[member.url] += 1
        await asyncio.sleep(0)
        return [SAMPLE]

    assert len(run_batch(members, ask, 12)) == 12
    assert asked == {"a": 4, "b": 4, "c": 4}


def test_the_last_server_is_lost_while_others_wait_for_prompts() -> None:
    """Workers that wait for a prompt, for the server, and for an answer all end."""
    members = [Member("a"), Member("b")]

    async def ask(member: Member, prompt: Sequence[int]) -> list[Sample]:
        await asyncio.sleep(0.01)
        member.lose(f"{member.url} is gone")
        raise httpx.ReadError("")

    with pytest.raises(
        RolloutError, match=r"8 of 8 prompts have no rollouts, because no server is left.*a is gone; b is gone"
    ):
        run_batch(members, ask)


@pytest.mark.parametrize("seed", range(20))
def test_every_prompt_is_answered_once_whatever_fails(seed: int) -> None:
    """Random failures, late answers, and a watcher that admits members at random moments; one server never fails for good."""
    rng = random.Random(seed)
    members, given, errors = [Member(str(n)) for n in range(3)], Counter[int](), 0

    async def ask(member: Member, prompt: Sequence[int]) -> list[Sample]:
        nonlocal errors
        assert member.state in (State.ready, State.tried)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        if errors < 60 and rng.random() < 0.4:
            errors += 1
            raise rng.choice([httpx.ReadError("x"), httpx.ConnectError("x"), BadAnswer("x"), OtherWeights("x")])
        given[prompt[0]] += 1
        return [Sample([prompt[0]], [-1.0], False)]

    async def watch(member: Member) -> None:
        while True:
            await member.trouble.wait()
            for _ in range(rng.randrange(5)):
                await asyncio.sleep(0)
            if rng.random() < 0.05 and member is not members[0]:
                member.lose("at random")
            elif member.strikes >= STRIKES:
                member.mended(trial=True)
            else:
                member.admit(trial=member.strikes > 0)

    async def go() -> list[list[Sample]]:
        watchers = [asyncio.create_task(watch(member)) for member in members]
        batch = Batch([[n] for n in range(40)], members, ask, attempts=1000, in_flight=rng.choice([1, 3, 64]))
        try:
            return await batch.run(20.0)
        finally:
            for watcher in watchers:
                watcher.cancel()

    groups = asyncio.run(go())
    assert [group[0].tokens for group in groups] == [[n] for n in range(40)]
    assert set(given.values()) == {1} and errors > 10
    assert sum(member.samples for member in members) == 40


def test_a_prompt_that_was_never_asked_was_not_tried() -> None:
    """Refused connections do not use up a prompt's tries; broken ones do."""
    member, calls = Member("a"), 0

    async def ask(member: Member, prompt: Sequence[int]) -> list[Sample]:
        nonlocal calls
        calls += 1
        error = httpx.ConnectError("refused") if calls <= 5 else httpx.ReadError("broke")
        asyncio.get_running_loop().call_later(0.001, lambda: member.admit(trial=False))
        raise error

    with pytest.raises(RolloutError, match="prompt 0 failed 2 times"):
        run_batch([member], ask, 1, attempts=2)
    assert calls == 7


def test_a_complaint_is_about_one_mend_of_one_version() -> None:
    board = Board(dist.HashStore())
    assert board.complaint("v1", 0, 0) == "" and board.news("v1", 0) == News()
    board.complain("v1", 0, 0, "garbage")
    assert board.complaint("v1", 0, 0) == "garbage"
    assert [board.complaint("v1", 0, 1), board.complaint("v1", 1, 0), board.complaint("v2", 0, 0)] == ["", "", ""]
    board.tell("v1", 0, News(1, ""))
    board.tell("v1", 1, News(0, "lost: 'why'"))
    assert (
        board.news("v1", 0) == News(1, "")
        and board.news("v1", 1).lost == "lost: 'why'"
        and board.news("v2", 0) == News()
    )
