"""Prompts on their way through the servers of a pool: each gets one group of samples, whoever makes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx

from megatron_vp2o.errors import RolloutError
from megatron_vp2o.rollout.answers import BadAnswer, OtherWeights, Sample
from megatron_vp2o.rollout.members import Member

Ask = Callable[[Member, Sequence[int]], Awaitable[list[Sample]]]
"""Asks a server for the whole group of a prompt. Raises httpx.HTTPError or BadAnswer."""

NEVER_ASKED = (httpx.ConnectError, httpx.ConnectTimeout)


class Batch:
    """A queue of prompts, and some workers for each server that take from it. What fails goes back into the queue.

    Args:
        ask: how a prompt is asked.
        attempts: tries of one prompt.
        in_flight: prompts at once to each server.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], members: Sequence[Member], ask: Ask, *, attempts: int, in_flight: int
    ) -> None:
        self.prompts, self.members, self.ask = prompts, members, ask
        self.attempts, self.in_flight = attempts, in_flight
        self.groups: list[list[Sample] | None] = [None] * len(prompts)
        self.tries = [0] * len(prompts)
        self.left = len(prompts)
        self.queue: asyncio.Queue[int] = asyncio.Queue()
        for number in range(len(prompts)):
            self.queue.put_nowait(number)
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.last_error = ""

    async def run(self, timeout: float) -> list[list[Sample]]:
        """All groups, in the order of the prompts. Raises RolloutError where they cannot be had."""
        workers = [
            asyncio.create_task(self._work(member))
            for _ in range(min(self.in_flight, len(self.prompts)))
            for member in self.members  # in turn, so that a batch smaller than in_flight does not all go to the first server
        ]
        everyone = asyncio.gather(*workers)
        try:
            either: set[asyncio.Future[Any]] = {self.over, everyone}
            await asyncio.wait(either, timeout=timeout, return_when="FIRST_COMPLETED")
            if self.over.done():
                self.over.result()
            elif everyone.done():
                everyone.result()  # an error of this program goes through
                raise self._failure("no server is left")
            else:
                raise self._failure(f"time is up after {timeout:g} s (rollout.server.batch_minutes)")
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await asyncio.gather(everyone, return_exceptions=True)
        return [group for group in self.groups if group is not None]

    def _failure(self, why: str) -> RolloutError:
        lost = "; ".join(member.lost for member in self.members if member.lost)
        return RolloutError(
            f"{self.left} of {len(self.prompts)} prompts have no rollouts, because {why}"
            + (f"; last error: {self.last_error}" if self.last_error else "")
            + (f"; lost servers: {lost}" if lost else "")
        )

    async def _work(self, member: Member) -> None:
        """Take prompts from the queue for one server until all are done or the server is lost."""
        while True:
            await member.open.wait()
            if member.lost:
                return
            number = await self.queue.get()
            life = member.begin()
            if life is None:  # it failed another prompt meanwhile, or is on trial: this one is for who can take it
                self.queue.put_nowait(number)
                continue
            try:
                group = await self.ask(member, self.prompts[number])
            except (httpx.HTTPError, BadAnswer) as error:
                self._failed(member, life, number, error)
            except BaseException:
                member.withdrawn(life)
                raise
            else:
                self._finished(member, life, number, group)

    def _finished(self, member: Member, life: int, number: int, group: list[Sample]) -> None:
        assert self.groups[number] is None  # a number is in the queue, or with one worker, or done
        self.groups[number] = group
        member.succeeded(life)
        member.samples += len(group)
        self.left -= 1
        if not self.left and not self.over.done():
            self.over.set_result(None)

    def _failed(self, member: Member, life: int, number: int, error: Exception) -> None:
        self.tries[number] += not isinstance(error, NEVER_ASKED)
        self.last_error = f"{member.url}: {words(error)}"
        # A connection that breaks says nothing of answers: whether the server lives is seen before its next prompt.
        bad = isinstance(error, BadAnswer | httpx.ReadTimeout) and not isinstance(error, OtherWeights)
        member.failed(life, blame=bad)
        if self.tries[number] >= self.attempts and not self.over.done():
            self.over.set_exception(
                self._failure(f"prompt {number} failed {self.tries[number]} times (rollout.server.attempts)")
            )
            return
        self.queue.put_nowait(number)


def words(error: Exception) -> str:
    """What an error says, or what it is where it says nothing."""
    return str(error) or type(error).__name__
