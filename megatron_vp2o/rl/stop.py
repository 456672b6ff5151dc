"""Signals that ask a run to save and stop at the next step boundary."""

from __future__ import annotations

import signal
from types import FrameType

_asked = False
_heard: set[signal.Signals] = set()


def listen(*signals: signal.Signals) -> None:
    """From now on these signals ask for an early, saved end instead of killing the process."""

    def ask(number: int, frame: FrameType | None) -> None:
        global _asked
        _asked = True

    for number in signals:
        signal.signal(number, ask)
        _heard.add(number)


def finish() -> None:
    """The run has ended: a further signal changes nothing. A handler would not do, the interpreter drops it as it ends."""
    for number in _heard:
        signal.signal(number, signal.SIG_IGN)


def asked() -> bool:
    """Whether one of them has come, in this process."""
    return _asked
