"""A server of a pool as one rank sees it: whether it may be asked, and who looks after it when it may not.

    ready ----a request failed----> troubled ----it holds the weights----> ready, or on trial where it had answered badly
      ^                                |  ^                                    |
      |                                |  +------------- it failed ------------+
      +---- brought back, or given ----+                                       |
      |     the weights again          +---- it cannot be brought back: lost   |
      +--------------------------- its trial succeeded ------------------------+

Nothing here waits for the network: the pool's watcher of a member does, one for each, and nobody else while the member is in
trouble. All of this happens in the pool's event loop, so no lock is needed.

Each failure ends a *life*. A request remembers in which life it began, and what it reports about an earlier life says nothing of
the present one: sixty-four requests that break together are one failure, and a late time-out does not condemn a server that
was restarted meanwhile.
"""

from __future__ import annotations

import asyncio
from enum import Enum

from megatron_vp2o.rollout.launch import Launched

STRIKES = 3
"""Bad answers in a row after which a server is not asked any more, and is restarted if it is ours."""


class State(Enum):
    """How a member stands."""

    ready = "ready"
    trial = "trial"  # it may be asked one prompt
    tried = "tried"  # it was asked that one prompt
    troubled = "troubled"  # its watcher finds out what it holds, and mends it
    lost = "lost"  # not used until the next update


class Member:
    """One server.

    Args:
        url: its address.
        process: what started it; None: it is somebody else's, or another rank's.
    """

    def __init__(self, url: str, process: Launched | None = None) -> None:
        self.url, self.process = url, process
        self.state = State.ready
        self.strikes = 0  # bad answers in a row
        self.lost = ""  # why it is not used any more; empty: it is
        self.mends = 0  # times that it was brought back since the last update
        self.samples = 0  # that counted
        self.life = 0
        self.open = asyncio.Event()  # it may be asked, or is lost: who waits should look
        self.open.set()
        self.trouble = asyncio.Event()  # its watcher has work

    def __repr__(self) -> str:
        return f"Member({self.url}, {self.state.value}, strikes={self.strikes}, life={self.life}, lost={self.lost!r})"

    def begin(self) -> int | None:
        """Before a request: the life that it belongs to, or None where the server may not be asked now."""
        if self.state is State.trial:
            self.state = State.tried
            self.open.clear()
            return self.life
        return self.life if self.state is State.ready else None

    def succeeded(self, life: int) -> None:
        """A request that began in this life was answered well."""
        if life != self.life:
            return
        self.strikes = 0
        if self.state is State.tried:
            self._open_as(State.ready)

    def failed(self, life: int, blame: bool) -> None:
        """A request that began in this life failed, or the process ended; blame: by an answer, so that a restart might help."""
        if life != self.life or self.state is State.lost:
            return
        self.life += 1
        self.strikes += blame
        self.state = State.troubled
        self.open.clear()
        self.trouble.set()

    def withdrawn(self, life: int) -> None:
        """A request was given up by who asked; it says nothing."""
        if life == self.life and self.state is State.tried:
            self._open_as(State.trial)

    def admit(self, *, trial: bool) -> None:
        """The watcher found that it holds the present weights."""
        self.trouble.clear()
        self._open_as(State.trial if trial else State.ready)

    def renew(self) -> None:
        """An update gave it weights: what was before is forgotten."""
        self.life += 1
        self.strikes = self.mends = 0
        self.lost = ""
        self.admit(trial=False)

    def mended(self, *, trial: bool) -> None:
        """It was restarted, or given the present weights again."""
        self.life += 1
        self.mends += 1
        self.strikes = 0
        self.admit(trial=trial)

    def lose(self, why: str) -> None:
        """It is not used any more until the next update."""
        self.life += 1
        self.lost, self.state = why, State.lost
        self.trouble.clear()
        self.open.set()

    def _open_as(self, state: State) -> None:
        self.state = state
        self.open.set()
