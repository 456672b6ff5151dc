"""Whether a server lives, by looks at its health that have a short time limit of their own.

What a server does for this run may take minutes, and says nothing: a long generation and a dead engine look alike. /health does
not wait for either. vLLM's front process answers it at once while its engine is busy, with 503 once the engine is dead, and not at
all where the front itself hangs or is on its way out.

    200         it lives
    503         its engine is dead, for good: it is restarted at once
    refused     its process runs, and nobody listens: so at least `MISSES` times in a row and for `REFUSED_S`, it is taken for dead
    no answer   the same, for `silence_s`
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

from megatron_vp2o.rollout.answers import BadAnswer

T = TypeVar("T")
MISSES = 3
"""A server is never taken for dead by fewer looks: a trainer that was itself stopped for a while made at most one of them."""
EVERY_S = 5.0
"""Between two looks at a server that is well."""
LIMIT_S = 5.0
"""How long a look may take."""
REFUSED_S = 5.0
"""How long nobody may listen at the port of a server that had answered. One whose engine died stops to listen, and may then wait
for ever for requests that nobody answers."""


class Asked(Protocol):
    """What is looked at: `rollout.api.Server`."""

    async def health(self, limit_s: float) -> int:
        """Status of /health; 0 where there was no answer in time, -1 where nobody listens."""
        ...


class Pulse:
    """The looks at one server. Nobody else looks: the pool's one watcher of it does.

    Args:
        server: returns the server; called at each look.
        silence_s: how long a server may leave looks unanswered, seconds.
        every_s: between looks at a server that is well; after a look without an answer the next one comes four times as soon.
        clock: seconds, never going back.
    """

    def __init__(
        self,
        server: Callable[[], Asked],
        silence_s: float,
        *,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._server, self.silence_s, self.every_s, self._clock = server, silence_s, every_s, clock
        self.why = ""
        """Why the server is taken for dead; empty: it is not."""
        self.forget()

    def forget(self) -> None:
        """The server was started anew, or has just answered."""
        self.why, self.misses = "", 0  # looks in a row that were not answered
        self._silent_since = self._looked = self._clock()
        self._listens = True

    @property
    def pause_s(self) -> float:
        """Until the next look, after the last one."""
        return self.every_s / 4 if self.misses else self.every_s

    async def look(self) -> str:
        """Look now. Returns `why`."""
        began = self._clock()
        status = await self._server().health(min(LIMIT_S, self.silence_s))
        if status == 200:
            self.forget()
        elif status == 503:
            self.why = "it says that its engine is dead (/health answers 503)"
        else:
            if not self.misses:
                self._silent_since, self._listens = began, False
            self.misses += 1
            self._listens |= status >= 0
            silent = self._clock() - self._silent_since
            if self.misses >= MISSES and silent >= (
                self.silence_s if self._listens else min(REFUSED_S, self.silence_s)
            ):
                self.why = (
                    f"its process runs, and {self.misses} looks at its health in a row were not answered in {silent:.0f} s "
                    f"(rollout.server.silence_s={self.silence_s:g})"
                )
        self._looked = self._clock()
        return self.why

    async def look_when_due(self) -> str:
        """Look if the last look is long enough ago. Returns `why`."""
        return await self.look() if self._clock() >= self._looked + self.pause_s else self.why

    async def while_it_lives(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns, which asks the server for something that may take long. Raises BadAnswer, and gives the work up,
        when the server is found dead."""
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=self.pause_s))[0]:
                if why := await self.look():
                    raise BadAnswer(why)
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
