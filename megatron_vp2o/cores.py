"""Processor cores: how many there are for each of several processes."""

from __future__ import annotations

import os


def local_size() -> int:
    """Processes of this run on this node, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def share_of_cores(processes: int) -> int:
    """Cores for each of so many processes that share those which this process may use; at least 1.

    A job scheduler may have given this process a part of the machine's cores alone, so the machine's number is not asked.
    """
    return max(1, len(os.sched_getaffinity(0)) // processes)
