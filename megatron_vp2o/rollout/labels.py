"""Which labels of weights a token may have: those of weights that a probe has proven.

Where servers get new weights while they generate, tokens of three labels may be in one response: of the weights before, of the new
ones before their probe (`api.UNPROVEN`), and of the same ones after it. Whether the second kind counts is known only once the
update is over, so whoever has an answer waits for that.

All of this happens in the pool's event loop.
"""

from __future__ import annotations

import asyncio


class Labels:
    """Labels of proven weights, with the version of each.

    Args:
        several: whether a response may have tokens of several versions.
    """

    def __init__(self, *, several: bool) -> None:
        self.several = several
        self.versions: dict[str, int] = {}
        self._settled = asyncio.Event()
        self._settled.set()

    async def hold(self) -> None:
        """An update begins: until `settle` nobody knows of the new weights' tokens whether they count."""
        self._settled.clear()

    def settle(self) -> None:
        """It is over."""
        self._settled.set()

    async def settled(self) -> None:
        """Wait until no update is under way."""
        await self._settled.wait()

    def forget(self) -> None:
        """No answer is waited for that may have tokens of earlier weights."""
        self.versions.clear()

    def prove(self, version: int, *labels: str) -> None:
        """A probe agreed."""
        self.versions.update(dict.fromkeys(labels, version))

    def accepted(self, label: str) -> dict[str, int]:
        """What tokens of a batch that is asked of this label may have, by version; it grows with later updates if they may be of
        several."""
        return self.versions if self.several else {label: self.versions[label]}
